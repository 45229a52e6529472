"""`make gpu-sanitize` with a stand-in for compute-sanitizer that says what it is told to."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from tests.gpu import sanitize
from tests.gpu.record import ROOT

ERROR = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void peftops::lora::shrink<float, (int)16>(peftops::lora::ShrinkTask)+0x1f0
=========     by thread (32,0,0) in block (0,0,0)
=========     Access at 0x7f0000000100 is out of bounds
=========         Host Frame: void peftops::lora::launch(...) [0x1234] in libpeftops_cuda.so
=========\x20
========= ERROR SUMMARY: 1 error
"""
VENDOR = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at nvjet_tst_128x64_64x8_1x2_h_bz_TNT+0x40
=========     by thread (0,0,0) in block (0,0,0)
=========         Host Frame: peftops::lora::forward(...) [0x99] in libpeftops_cuda.so
=========\x20
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE = """========= Error: Race reported between Write access at void peftops::lora::shrink<float>(Task)+0x80
=========     and Read access at void peftops::lora::shrink<float>(Task)+0x120 [64 hazards]
=========\x20
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = "========= Error: Device not supported. Please refer to the documentation\n"

# The stand-in runs what it is given, then writes the log that stands for the tool (and for a planted fault) and returns
# the exit code that was asked for where the log reports something.
TOOL = """#!{python}
import json, subprocess, sys
script = json.load(open({script!r}))
arguments = sys.argv[1:]
tool, log = (arguments[arguments.index(name) + 1] for name in ("--tool", "--log-file"))
code = int(arguments[arguments.index("--error-exitcode") + 1])
with open({calls!r}, "a") as file:
    file.write(json.dumps(arguments) + "\\n")
planted = "--plant" in arguments
text, found = script.get(tool + (" planted" if planted else ""), script.get("planted" if planted else "other"))
open(log, "w").write(text)
if not planted and script.get("run"):
    print("calls: 5")
sys.exit(code if found else 0)
"""


@pytest.fixture
def tool(tmp_path):
    """Makes a stand-in from {tool or "tool planted": (log, whether something was found)}."""

    def make(**script) -> str:
        path = tmp_path / "compute-sanitizer"
        given = {name.replace("_", " "): value for name, value in script.items()}
        given = {"run": True, "planted": (ERROR, True), "other": (CLEAN, False), **given}
        (tmp_path / "script.json").write_text(json.dumps(given))
        path.write_text(
            TOOL.format(python=sys.executable, script=str(tmp_path / "script.json"), calls=str(tmp_path / "calls"))
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def run(tool: str, tmp_path, capsys, *arguments: str) -> tuple[int, dict, str]:
    output = tmp_path / "record.json"
    code = sanitize.main(["--device", "cpu", "--sanitizer", tool, "--output", str(output), *arguments])
    return code, json.loads(output.read_text()), capsys.readouterr().out


def test_all_tools_clean(tool, tmp_path, capsys):
    code, made, out = run(tool(), tmp_path, capsys)
    assert code == 0 and made["passed"] and made["family"] == "gpu-sanitize"
    assert {name: t["status"] for name, t in made["tools"].items()} == dict.fromkeys(sanitize.TOOLS, "ok")
    assert made["tools"]["racecheck"]["calls"] == 5 and "memcheck: ok; 5 calls" in out
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [("--plant" in c, c[c.index("--tool") + 1]) for c in calls] == [
        (True, "memcheck"),
        (False, "memcheck"),
        (False, "synccheck"),
        (True, "initcheck"),
        (False, "initcheck"),
        (False, "racecheck"),
    ]
    # initcheck has to see the vendor's kernels write what the library's read
    assert [("kns=peftops" in c) for c in calls] == [True, True, True, False, False, True]


@pytest.mark.parametrize(
    ("name", "log"),
    [("memcheck", ERROR), ("synccheck", ERROR), ("initcheck", ERROR), ("racecheck", RACE)],
    ids=["memcheck", "synccheck", "initcheck", "racecheck"],
)
def test_a_finding_fails_the_run_and_names_kernel_and_tool(tool, tmp_path, capsys, name, log):
    code, made, out = run(tool(**{name: (log, True)}), tmp_path, capsys)
    assert code == 1 and not made["passed"]
    assert {n for n, t in made["tools"].items() if t["status"] == "found"} == {name}
    assert f"{name}: found" in out
    (finding,) = made["tools"][name]["findings"]
    assert finding.startswith(
        "Error: Race reported between Write access at void peftops::lora::shrink<"
        if log is RACE
        else "Invalid __global__ read of size 16 bytes: at void peftops::lora::shrink<"
    )


def test_calls_that_end_at_a_finding_are_no_tool_that_cannot_run(tool, tmp_path, capsys):
    _, made, _ = run(tool(memcheck=(ERROR, True), run=False), tmp_path, capsys)
    assert made["tools"]["memcheck"]["status"] == "found"


def test_what_initcheck_says_of_other_libraries_does_not_count(tool, tmp_path, capsys):
    code, made, _ = run(tool(initcheck=(VENDOR, True)), tmp_path, capsys)
    assert code == 0 and made["tools"]["initcheck"]["status"] == "ok"
    assert made["tools"]["initcheck"]["findings"] == []


def test_a_tool_that_cannot_run_is_reported_and_fails_nothing(tool, tmp_path, capsys):
    code, made, out = run(tool(racecheck=(REFUSED, True), run=False, synccheck=(REFUSED, True)), tmp_path, capsys)
    assert code == 1 and {t["status"] for t in made["tools"].values()} == {"unavailable"}
    assert "Device not supported" in made["tools"]["racecheck"]["reason"] and "racecheck: unavailable" in out
    tools = {"memcheck": {"status": "ok"}, "racecheck": {"status": "unavailable"}}
    assert sanitize.passed(tools)
    assert not sanitize.passed({**tools, "synccheck": {"status": "out of time"}})


def test_a_tool_that_is_blind_to_the_planted_fault_has_shown_nothing(tool, tmp_path, capsys):
    code, made, _ = run(tool(planted=(CLEAN, False)), tmp_path, capsys)
    assert code == 1
    assert {n for n, t in made["tools"].items() if t["status"] == "blind"} == {"memcheck", "initcheck"}


def test_calls_that_did_not_end_are_not_clean(tool, tmp_path, capsys):
    code, made, _ = run(tool(run=False), tmp_path, capsys)
    assert code == 1 and {t["status"] for t in made["tools"].values()} == {"unavailable"}


def test_without_the_program_nothing_passes(tmp_path, capsys):
    code, made, out = run("no-such-sanitizer", tmp_path, capsys)
    assert code == 1 and {t["status"] for t in made["tools"].values()} == {"unavailable"}
    assert "nothing could be checked" in out


def test_time_is_kept(tool, tmp_path, capsys, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    code, made, _ = run(str(slow), tmp_path, capsys, "--tool", "synccheck", "--budget", "2")
    assert code == 1 and made["tools"]["synccheck"]["status"] == "out of time"
    assert made["seconds"] < 10


def test_every_tool_but_racecheck_sees_where_a_tensor_ends():
    assert all(
        ("PYTORCH_NO_CUDA_MEMORY_CACHING" in sanitize.environment(name)) == (name != "racecheck")
        for name in sanitize.TOOLS
    )


def test_the_smoke_calls_run_and_are_counted():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.smoke", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.removeprefix("calls: ")) > 100
