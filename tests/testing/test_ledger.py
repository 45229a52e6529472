"""The ledger waives exactly what it names, and is as strict as the suite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ledger import Entry, stale, waivers

TESTS = Path(__file__).parent.parent
ENTRY = Entry("tests/test_x.py::test_y[*-bfloat16-*]", "cpu", 7, "rounds twice")


def test_pattern_treats_brackets_literally():
    assert ENTRY.matches("tests/test_x.py::test_y[lora-bfloat16-values]")
    assert not ENTRY.matches("tests/test_x.py::test_y[lora-float16-values]")
    assert not ENTRY.matches("tests/test_x.py::test_yb")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("tests/*.py::test", "cpu", 1, "r"), "name one file"),
        (("tests/test_x.py", "cpu", 1, "r"), "name one file"),
        (("tests/test_x.py::test", "gpu", 1, "r"), "backend must be cpu or cuda"),
        (("tests/test_x.py::test", "cpu", 0, "r"), "issue number and a reason"),
        (("tests/test_x.py::test", "cpu", 1, " "), "issue number and a reason"),
    ],
)
def test_entries_are_complete(arguments, text):
    with pytest.raises(ValueError, match=text):
        Entry(*arguments)


def test_waivers_and_stale(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").touch()
    hit, miss = "tests/test_x.py::test_y[a-bfloat16-b]", "tests/test_x.py::test_z"
    assert waivers([ENTRY], [hit, miss], "cpu") == {hit: ENTRY}
    assert waivers([ENTRY], [hit, miss], "cuda") == {}
    with pytest.raises(ValueError, match="two ledger entries"):
        waivers([ENTRY, ENTRY], [hit], "cpu")
    assert stale([ENTRY], [hit, miss], "cpu", tmp_path) == []
    assert stale([ENTRY], [miss], "cpu", tmp_path) == [ENTRY]
    assert stale([ENTRY], ["tests/other.py::test"], "cpu", tmp_path) == []
    (tmp_path / "tests/test_x.py").unlink()
    assert stale([ENTRY], ["tests/other.py::test"], "cpu", tmp_path) == [ENTRY]


SUITE = """
import pytest
def test_fails(): assert False
def test_passes(): pass
def test_crashes(): raise SystemExit(3)
"""


def run_suite(tmp_path: Path, entries: str, *arguments: str) -> str:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests/__init__.py").touch()
    shutil.copy(TESTS / "conftest.py", tmp_path / "tests")
    text = (TESTS / "ledger.py").read_text()
    assert "LEDGER: tuple[Entry, ...] = ()" in text, "this test replaces the empty ledger"
    (tmp_path / "tests/ledger.py").write_text(text.replace("LEDGER: tuple[Entry, ...] = ()", f"LEDGER = ({entries})"))
    (tmp_path / "tests/test_x.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or ["tests"])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    return result.stdout + result.stderr


FAILS = 'Entry("tests/test_x.py::test_fails", "cpu", 1, "known"),'
CRASHES = 'Entry("tests/test_x.py::test_crashes", "cpu", 2, "ends the process", quarantine=True),'


def test_failures_are_waived_and_unexpected_passes_fail(tmp_path):
    text = run_suite(
        tmp_path, FAILS + CRASHES + 'Entry("tests/test_x.py::test_passes", "cpu", 3, "repaired long ago"),'
    )
    assert "XPASS(strict)" in text and "1 failed, 1 skipped, 1 xfailed" in text


def test_stale_entry_fails(tmp_path):
    text = run_suite(tmp_path, FAILS + CRASHES + 'Entry("tests/test_x.py::test_gone", "cpu", 4, "renamed"),')
    assert "ledger entries match no test: tests/test_x.py::test_gone" in text


def test_single_failure_prints_how_to_reproduce_it(tmp_path):
    # part of a file says nothing about the rest: the entry for test_crashes is not stale
    text = run_suite(tmp_path, CRASHES, "tests/test_x.py::test_fails", "--peftops-seed=41")
    assert "python -m pytest 'tests/test_x.py::test_fails' --peftops-seed=41" in text
