"""Runs checks in processes that may die: a kernel that faults or hangs costs its own check, not the others.

A worker writes a line of JSON to its log when it has listed its checks, when one begins and when one ends. The
supervisor reads along, ends a worker whose check takes too long, and starts another for the rest: what the log names is
not begun again.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: A worker's exit code where an error stuck to the device: the checks that are left need another process.
BROKEN = 3
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One check. `run` raises where it fails, :class:`Skipped` where it cannot be made here; what it returns is kept
    as facts.
    """

    name: str
    run: Callable[[], object]


class Skipped(Exception):
    """The check cannot be made on this device; the text says why."""


@dataclass(frozen=True)
class Result:
    """status: "ok", "failed", "skipped" or "not run"."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    facts: object = None


def work(cases: Iterable[Case], log: Path, synchronize: Callable[[], None]) -> int:
    """The worker: run every case that the log does not name yet. Returns the exit code."""
    cases = list(cases)
    seen = {line["begin"] for line in _lines(log) if "begin" in line}
    with log.open("a", encoding="utf-8") as file:

        def emit(line: dict) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        emit({"cases": [case.name for case in cases]})
        for case in cases:
            if case.name in seen:
                continue
            emit({"begin": case.name})
            began, end = time.monotonic(), {"end": case.name, "status": "ok"}
            try:
                end["facts"] = case.run()
                synchronize()
            except Skipped as reason:
                end |= {"status": "skipped", "reason": str(reason)}
            except Exception as error:
                end |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:2000]}
            emit({**end, "seconds": round(time.monotonic() - began, 3)})
            if end["status"] == "failed":
                try:
                    synchronize()
                except Exception:
                    return BROKEN
    return 0


def _lines(log: Path) -> list[dict]:
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last end of line is still being written
    return [json.loads(line) for line in lines]


@dataclass
class _Lane:
    """One worker after the other on one log."""

    command: Sequence[str]
    log: Path
    process: subprocess.Popen | None = None
    names: list[str] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    running: str = ""
    running_since: float = 0.0
    starts: int = 0
    told: int = 0

    def start(self) -> None:
        self.starts += 1
        self.running_since = time.monotonic()
        with self.log.with_suffix(".out").open("ab") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT)

    def read(self) -> None:
        lines = _lines(self.log)
        for line in lines[self.told :]:
            if "cases" in line:
                self.names = line["cases"]
            elif "begin" in line:
                self.running, self.running_since = line["begin"], time.monotonic()
            else:
                self.end(line["end"], line["status"], line["seconds"], line.get("reason", ""), line.get("facts"))
        self.told = len(lines)

    def end(self, name: str, status: str, seconds: float, reason: str, facts: object = None) -> None:
        self.results[name] = Result(name, status, seconds, reason, facts)
        self.running, self.running_since = "", time.monotonic()

    def output(self) -> str:
        lines = self.log.with_suffix(".out").read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-4:])

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def supervise(
    commands: Sequence[Sequence[str]],
    logs: Sequence[Path],
    *,
    until: float,
    case_seconds: float,
    start_seconds: float = 120.0,
    restarts: int = 8,
    tell: Callable[[Sequence[Result], int], None] = lambda results, total: None,
) -> list[Result]:
    """Run the workers beside each other until all are done or `time.monotonic()` reaches `until`.

    case_seconds: a check that takes longer fails. start_seconds: as much for imports and for listing the checks.
    tell: called with all results so far and the number of checks. A check that was not begun in time is "not run".
    """
    lanes = [_Lane(command, log) for command, log in zip(commands, logs, strict=True)]
    for lane in lanes:
        lane.start()
    try:
        open_lanes = list(lanes)
        while open_lanes and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            for lane in list(open_lanes):
                if not _step(lane, case_seconds, start_seconds, restarts):
                    open_lanes.remove(lane)
            tell([r for lane in lanes for r in lane.results.values()], sum(len(lane.names) for lane in lanes))
    finally:
        for lane in lanes:
            lane.kill()
    for lane in lanes:
        lane.read()
        if lane.running:
            lane.end(lane.running, "not run", 0.0, "out of time while it ran")
        for name in lane.names:
            lane.results.setdefault(name, Result(name, "not run", reason="out of time or no process left for it"))
    return [lane.results[name] for lane in lanes for name in lane.results]


def _step(lane: _Lane, case_seconds: float, start_seconds: float, restarts: int) -> bool:
    """Whether the lane still has work."""
    code = lane.process.poll()
    lane.read()
    allowed = case_seconds if lane.running else start_seconds
    overdue = code is None and time.monotonic() - lane.running_since > allowed
    if code is None and not overdue:
        return True
    if code == 0:
        return False
    lane.kill()
    how = f"no result after {allowed:g} s" if overdue else f"the process ended with code {code}: {lane.output()}"
    if lane.running:
        lane.end(lane.running, "failed", allowed if overdue else 0.0, how)
    elif code != BROKEN:
        lane.end(f"{lane.log.stem}: between checks", "failed", 0.0, how)
        return False
    if lane.starts > restarts:
        return False
    lane.start()
    return True
