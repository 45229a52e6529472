"""The supervisor: every check gets its outcome, whatever happens to the process that makes it."""

from __future__ import annotations

import json
import sys
import textwrap
import time

from tests.gpu.runner import BROKEN, Case, Skipped, supervise, work

TOY = """
    import os, sys, time
    from pathlib import Path
    from tests.gpu.runner import Case, Skipped, work
    broken = []
    def boom(): raise AssertionError("wrong by one")
    def stick(): broken.append(1); raise RuntimeError("an illegal memory access was encountered")
    def no(): raise Skipped("needs two")
    def synchronize():
        if broken: raise RuntimeError("the device is lost")
    CASES = {"good": lambda: 7, "wrong": boom, "dies": os.abort, "sticks": stick, "hangs": lambda: time.sleep(60),
             "cannot": no, "slow": lambda: time.sleep(0.7), "late": lambda: None}
    names = sys.argv[2:]
    sys.exit(work([Case(name, CASES[name]) for name in names], Path(sys.argv[1]), synchronize))
"""


def outcome(tmp_path, *lanes: str, seconds: float = 60, case_seconds: float = 5) -> dict:
    logs = [tmp_path / f"lane{index}.jsonl" for index in range(len(lanes))]
    code = textwrap.dedent(TOY)
    commands = [[sys.executable, "-c", code, str(log), *lane.split()] for log, lane in zip(logs, lanes, strict=True)]
    results = supervise(commands, logs, until=time.monotonic() + seconds, case_seconds=case_seconds)
    assert len({r.name for r in results}) == len(results)
    return {r.name: r for r in results}


def test_a_failure_a_skip_and_facts_are_kept(tmp_path):
    found = outcome(tmp_path, "good wrong cannot late")
    assert [(r.name, r.status) for r in found.values()] == [
        ("good", "ok"),
        ("wrong", "failed"),
        ("cannot", "skipped"),
        ("late", "ok"),
    ]
    assert found["good"].facts == 7
    assert found["wrong"].reason == "AssertionError: wrong by one"
    assert found["cannot"].reason == "needs two"


def test_a_dying_process_costs_its_own_check_only(tmp_path):
    found = outcome(tmp_path, "good dies late")
    assert [r.status for r in found.values()] == ["ok", "failed", "ok"]
    assert "the process ended with code -6" in found["dies"].reason


def test_an_error_that_sticks_to_the_device_does_not_reach_the_next_check(tmp_path):
    found = outcome(tmp_path, "good sticks late")
    assert [r.status for r in found.values()] == ["ok", "failed", "ok"]
    assert "illegal memory access" in found["sticks"].reason


def test_a_check_that_hangs_is_ended(tmp_path):
    found = outcome(tmp_path, "good hangs late", case_seconds=1.5)
    assert [r.status for r in found.values()] == ["ok", "failed", "ok"]
    assert found["hangs"].reason == "no result after 1.5 s"


def test_what_does_not_fit_the_time_is_not_run(tmp_path):
    found = outcome(tmp_path, "good slow hangs late", seconds=4, case_seconds=60)
    assert [r.status for r in found.values()] == ["ok", "ok", "not run", "not run"]
    assert found["hangs"].reason == "out of time while it ran"


def test_lanes_run_beside_each_other(tmp_path):
    found = outcome(tmp_path, "good slow", "wrong", "late dies")
    assert {name: r.status for name, r in found.items()} == {
        "good": "ok",
        "slow": "ok",
        "wrong": "failed",
        "late": "ok",
        "dies": "failed",
    }


def test_a_worker_that_does_not_start_is_one_failure_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "raise ImportError('no library')"]
    (result,) = supervise([command], [tmp_path / "kit.jsonl"], until=time.monotonic() + 30, case_seconds=5)
    assert result.status == "failed" and result.name == "kit: between checks"
    assert "ImportError: no library" in result.reason


def test_processes_are_not_started_for_ever(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(TOY), str(tmp_path / "a.jsonl"), "dies", "sticks", "late"]
    results = supervise([command], [tmp_path / "a.jsonl"], until=time.monotonic() + 30, case_seconds=5, restarts=1)
    assert [r.status for r in results] == ["failed", "failed", "not run"]


def fail(text: str) -> None:
    raise RuntimeError(text)


def test_a_worker_goes_on_after_a_failure_and_stops_where_the_device_is_lost(tmp_path):
    made: list[str] = []
    cases = [Case("a", lambda: fail("wrong")), Case("b", lambda: made.append("b"))]
    assert work(cases, tmp_path / "one", lambda: None) == 0 and made == ["b"]
    assert work(cases, tmp_path / "two", lambda: fail("lost")) == BROKEN and made == ["b"]


def test_an_error_that_shows_late_belongs_to_the_check_that_caused_it(tmp_path):
    log = tmp_path / "log"
    assert work([Case("a", lambda: None), Case("b", lambda: None)], log, lambda: fail("illegal access")) == BROKEN
    (end,) = (line for line in map(json.loads, log.read_text().splitlines()) if "end" in line)
    assert (end["end"], end["status"], end["reason"]) == ("a", "failed", "RuntimeError: illegal access")


def test_skipping_is_not_failing(tmp_path):
    def cannot() -> None:
        raise Skipped("no")

    assert work([Case("a", cannot)], tmp_path / "log", lambda: None) == 0
    assert '"status": "skipped"' in (tmp_path / "log").read_text()
