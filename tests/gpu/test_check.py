"""The checks of `make gpu-check` rehearsed on the CPU: they pass where all is well, and each sees what it is for."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peftops.ops.contract import CONTRACTS

from tests.gpu import calls, cases, check, lora, modules, record
from tests.gpu.cases import Setting
from tests.gpu.device import Rehearsal
from tests.gpu.runner import Result
from tests.ledger import Entry
from tests.testing import faults

ROOT = record.ROOT
LINEAR = "lora_linear-bfloat16"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(part, name: str, device: Rehearsal | None = None) -> object:
    """Run one check of a part."""
    (case,) = (c for c in part(Setting(device or Rehearsal(), fuzz=5)) if c.name == name)
    return case.run()


def test_check_names_are_unique_in_every_part():
    for part, (listed, _) in cases.PARTS.items():
        names = [case.name for case in listed(Setting(Rehearsal(), fuzz=3))]
        assert names and len(set(names)) == len(names), part


def test_smoke_and_kit_cover_every_schema_and_dtype_but_float64():
    device = Rehearsal()
    device.device = torch.device("cuda")  # nothing is run
    setting = Setting(device)
    names = {case.name for part in (cases.smoke, cases.kit) for case in part(setting)}
    for contract in CONTRACTS.values():
        for dtype in contract.dtypes:
            name = calls.short(contract, dtype)
            wanted = dtype in contract.dtypes_on(device.device)
            assert (f"{name}-poison" in names) == (f"{name}-values" in names) == wanted
    assert not any("float64" in name or "gradcheck" in name for name in names)


def test_random_calls_are_the_same_for_the_same_seed_and_reach_many_tokens_and_large_ranks():
    device, shapes = torch.device("cpu"), []
    for index in range(60):
        _, sample = lora.fuzz(device, 3, index)
        shapes.append((sample.args[0].shape[0], sample.args[3].shape[0]))
    assert max(m for m, _ in shapes) > 1000 and max(r for _, r in shapes) > 64
    (_, one), (_, two) = lora.fuzz(device, 3, 8), lora.fuzz(device, 3, 8)
    assert one.label == two.label and torch.equal(one.args[3], two.args[3])
    assert lora.fuzz(device, 4, 8)[1].label != one.label


# ---- every part sees its fault ---------------------------------------------------------------------------------------


def test_the_law_of_random_calls_sees_a_wrong_operator():
    contract = faults.DROPPED_TAIL
    sample = next(s for s in contract.sample_inputs(torch.device("cpu"), torch.float32, 0) if s.label == "ragged")
    with pytest.raises(AssertionError, match="results and gradients"):
        cases._law(contract, sample, 0)


def test_a_kernel_on_another_stream_reads_what_was_there_before(monkeypatch):
    run(cases.stream, LINEAR)
    monkeypatch.setattr(calls.ExactCall, "overwrite", lambda self, other: None)
    with pytest.raises(AssertionError, match="on a side stream: result 0: .* got nan"):
        run(cases.stream, LINEAR)


class Stale(Rehearsal):
    """Replays write nothing new."""

    def capture(self, call):
        return call(), lambda: None


class FrozenArgument(Rehearsal):
    """Replays use one argument as it was when the graph was captured."""

    def __init__(self, name: str):
        self.name = name

    def capture(self, call):
        bound = call.__self__.bound
        kept = bound[self.name]
        kept = kept.clone() if isinstance(kept, torch.Tensor) else kept
        results, replay = super().capture(call)

        def replay_with_frozen() -> None:
            if isinstance(kept, torch.Tensor):
                bound[self.name].copy_(kept)
            replay()

        return results, replay_with_frozen


def test_a_graph_that_writes_nothing_is_seen():
    run(cases.graph, LINEAR)
    with pytest.raises(AssertionError, match="replay with other values: result 0"):
        run(cases.graph, LINEAR, Stale())


@pytest.mark.parametrize(
    ("name", "argument", "text"),
    [
        (LINEAR, "x", "replay with other values"),
        (LINEAR, "seed", "replay with another dropout seed"),
        ("lora_linear.tensor_scale-bfloat16", "scale", "replay with scale 0"),
        ("lora_dropout_mask-float32", "seed", "replay with another dropout seed"),
        ("grouped_lora_linear-bfloat16", "adapter_ids", "replay with (no adapters|one adapter|every adapter)"),
    ],
)
def test_a_graph_with_an_argument_baked_in_is_seen(name, argument, text):
    run(cases.graph, name)
    with pytest.raises(AssertionError, match=text):
        run(cases.graph, name, FrozenArgument(argument))


def test_bits_that_change_from_run_to_run_are_seen(monkeypatch):
    monkeypatch.setattr(cases, "REPEATS", 5)
    run(cases.repeats, "lora-1")
    honest, turns = cases.results_of, itertools.count()

    def wavering(*arguments):
        evaluate = honest(*arguments)
        return lambda bound: tuple(t + (next(turns) == 17) for t in evaluate(bound) if t is not None)

    monkeypatch.setattr(cases, "results_of", wavering)
    with pytest.raises(AssertionError, match="result . run . gives other bits|gives other bits"):
        run(cases.repeats, "lora-1")


class Growing(Rehearsal):
    """An allocator that holds more each time it is asked."""

    held = 0

    def allocated(self) -> int:
        self.held += 512
        return self.held


def test_a_leak_is_seen(monkeypatch):
    run(cases.leak, f"{LINEAR}-plain")
    with pytest.raises(AssertionError, match="512 bytes more are held after 200 steps"):
        run(cases.leak, f"{LINEAR}-checkpoint", Growing())
    kept = []
    monkeypatch.setattr(cases, "fresh", lambda bound, real=cases.fresh: kept.append(real(bound)) or kept[-1])
    with pytest.raises(AssertionError, match="outlive their step"):
        run(cases.leak, f"{LINEAR}-no grad")


def test_replays_that_repeat_a_mask_are_seen():
    modules.graph_draws_new_masks(Rehearsal())
    with pytest.raises(AssertionError, match="8 replays drew only 1 masks"):
        modules.graph_draws_new_masks(Stale())


def test_rows_behind_32_bits_that_are_wrong_are_seen(monkeypatch):
    cpu = torch.device("cpu")
    lora.huge_input(cpu, 5000, 256)
    lora.huge_mask(cpu, 5000, 256)
    honest = lora.lora_linear

    def wrong(x, *rest):
        return honest(x, *rest) * (torch.arange(len(x)) < 4990)[:, None]

    monkeypatch.setattr(lora, "lora_linear", wrong)
    with pytest.raises(AssertionError, match="the last rows' output differs"):
        lora.huge_input(cpu, 5000, 256)
    monkeypatch.setattr(lora, "lora_dropout_mask", lambda *a, real=lora.lora_dropout_mask: real(*a).roll(1, 0))
    with pytest.raises(AssertionError, match="the last rows' mask is wrong"):
        lora.huge_mask(cpu, 5000, 256)


def test_what_does_not_fit_the_memory_is_skipped():
    with pytest.raises(cases.Skipped, match="needs 40 GiB, 0 GiB are free"):
        run(cases.huge, "lora-input")


# ---- the run and its record ------------------------------------------------------------------------------------------


def gpu_check(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=ROOT)


def test_a_rehearsal_writes_a_record_of_every_check(tmp_path):
    path = tmp_path / "record.json"
    done = gpu_check("--device", "cpu", "--part", "fuzz", "--part", "stream", "--part", "huge", "--fuzz", "4",
                     "--processes", "2", "--output", str(path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(path.read_text())
    assert made["passed"] and made["family"] == "gpu-check" and made["device"]["kind"] == "cpu"
    fuzzed = {f"fuzz::{family.__name__.rpartition('.')[2]}-{i}" for family in cases.FAMILIES for i in range(4)}
    assert made["parts"]["fuzz"]["ok"] == len(fuzzed) and made["parts"]["huge"]["skipped"] >= 2
    assert {name for name in made["checks"] if name.startswith("fuzz")} == fuzzed
    assert made["checks"]["stream::lora_linear-bfloat16"].startswith("ok ")
    assert "GiB are free" in made["reasons"]["huge::lora-input"]
    assert {"commit", "date", "versions", "seconds", "seed"} <= made.keys()
    assert made["kernels"] == []  # a CPU has no machine code of theirs
    assert "stream" in done.stdout and "passed in" in done.stdout


def test_without_time_nothing_passes(tmp_path):
    path = tmp_path / "record.json"
    done = gpu_check("--device", "cpu", "--part", "smoke", "--part", "stream", "--budget", "0", "--output", str(path))
    assert done.returncode == 1
    assert not json.loads(path.read_text())["passed"]


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = gpu_check()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "gpu-check: torch sees no GPU\n"


FACTS = {"device": {"kind": "cuda", "model": "NVIDIA H200", "capability": "9.0"}, "commit": "abc"}


def record_of(*results: Result, differs: str | None = None) -> dict:
    parts: dict[str, list[Result]] = {}
    for result in results:
        parts.setdefault(result.name.partition("::")[0], []).append(result)
    return record.of_check(FACTS, parts, 0, 10, 12.0, differs)


@pytest.mark.parametrize(
    ("statuses", "passed"),
    [(["ok", "ok"], True), (["ok", "skipped"], True), (["ok", "waived"], True), (["ok", "failed"], False),
     (["ok", "not run"], False), ([], False)],
)  # fmt: skip
def test_a_run_passes_only_if_everything_was_made_and_nothing_failed(monkeypatch, statuses, passed):
    monkeypatch.setattr(record.verified, "read", lambda: [])
    made = record_of(*(Result(f"kit::{i}", status) for i, status in enumerate(statuses)))
    assert made["passed"] is passed


def test_kernels_of_the_device_come_with_hash_and_whether_they_ran(monkeypatch):
    Kernel = record.verified.Kernel
    kernels = [Kernel("a", "sm_80", "1"), Kernel("a", "sm_90a", "2"), Kernel("b", "sm_90a", "3")]
    monkeypatch.setattr(record.verified, "read", lambda: kernels)
    made = record_of(Result("kernels::launched", "ok", facts=["void a(Task)", "other(Task)"]))
    assert made["launched"] == ["other(Task)", "void a(Task)"]
    assert made["kernels"] == [
        {"name": "a", "arch": "sm_90a", "hash": "2", "launched": True},
        {"name": "b", "arch": "sm_90a", "hash": "3", "launched": False},
    ]
    other = record_of(Result("kernels::launched", "ok", facts=["void a(Task)"]), differs="a: other machine code")
    assert other["kernels"] == [] and "the library is not that of kernels.txt: a: other" in check.table(other)


def test_the_library_at_hand_is_compared_with_the_list(monkeypatch):
    tools = record.kernels
    one, two = tools.Kernel("a", "sm_80", hash="1"), tools.Kernel("a", "sm_90a", hash="2")
    monkeypatch.setattr(tools, "kernels", lambda library: [one, two])
    listed = {(kernel.name, kernel.arch): kernel.recorded for kernel in (one, two)}
    monkeypatch.setattr(tools, "read_record", lambda path: ("13", listed))
    assert record.library_differs() is None
    listed["a", "sm_80"] = {**listed["a", "sm_80"], "hash": "3"}
    assert record.library_differs().startswith("a for sm_80: other machine code")

    def missing(library):
        raise SystemExit("cuobjdump is missing")

    monkeypatch.setattr(tools, "kernels", missing)
    assert record.library_differs() == "cuobjdump is missing"


def test_the_ledger_waives_known_failures_and_refuses_unexpected_passes():
    ledger = (Entry("tests/gpu/cases.py::kit::lora_linear-*-values", "cuda", 12, "known"),)
    failed, passes = Result("kit::lora_linear-float16-values", "failed", reason="x"), Result("kit::other", "ok")
    assert record.waived(failed, ledger).status == "waived"
    assert record.waived(failed, ledger).reason == "issue 12: known"
    assert record.waived(passes, ledger) == passes
    unexpected = record.waived(Result(failed.name, "ok"), ledger)
    assert unexpected.status == "failed" and "the ledger waives it" in unexpected.reason


def test_an_entry_that_waives_nothing_fails():
    entries = tuple(Entry(f"tests/gpu/cases.py::{name}", "cuda", 1, "r") for name in ("kit::a-*", "kit::b-*"))
    results = {"kit": [Result("kit::a-values", "ok")]}
    (dead,) = record.stale_waivers(results, entries)
    assert dead.status == "failed" and "kit::b-*" in dead.name
    assert record.stale_waivers(results, entries[:1]) == []


def test_without_the_library_one_line_says_so(tmp_path):
    for name in ("tests", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    package = tmp_path / "python" / "peftops"
    shutil.copytree(ROOT / "python" / "peftops", package, ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.check"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": "python"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "without its native library (libpeftops.so)" in done.stderr


def test_neighbouring_parts_share_processes():
    assert check.groups(["smoke", "kit", "fuzz", "stream", "graph"], 4) == [
        (["smoke"], 1),
        (["kit", "fuzz"], 4),
        (["stream", "graph"], 1),
    ]
