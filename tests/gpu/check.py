"""`make gpu-check`: everything that only a GPU can show, in one run of under nine minutes.

    python -m tests.gpu.check                          all parts; writes bench/results/gpu-check-<device>.json
    python -m tests.gpu.check --part smoke --part kit  some; writes nothing unless --output says where
    python -m tests.gpu.check --device cpu             a rehearsal on the CPU, where there is nothing to verify

Needs the libraries in python/peftops/lib and PYTHONPATH=python, no `_C`. The exit status is 0 only if every check that
the device can make was made and passed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu import record
from tests.gpu.runner import Case, Result, supervise, work

#: Seconds for all parts together, for one check, and for Python, torch and CUDA to start.
BUDGET, CASE_SECONDS = 520.0, 90.0
TOLD_EVERY = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    # Before CUDA starts: without a workspace of fixed size the vendor's GEMM is refused in deterministic mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        args = _arguments(argv)
    except ImportError as error:  # peftops says what is missing
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    return worker(args) if args.worker else run(args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from tests.gpu.cases import PARTS

    parser = argparse.ArgumentParser(prog="gpu-check", description="Everything that only a GPU can show.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this part; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="the integer from which all data is derived")
    parser.add_argument("--fuzz", type=int, default=300, help="number of random calls")
    parser.add_argument("--processes", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything; default: %(default)g")
    parser.add_argument("--output", type=Path, help="where the record goes")
    parser.add_argument("--worker", metavar="LOG", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lane", default="0/1", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---- a worker --------------------------------------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> int:
    """Run this lane's share of the parts. Check names are `part::name`."""
    from tests.gpu.cases import PARTS, Setting
    from tests.gpu.device import open_device

    setting = Setting(open_device(args.device), args.seed, args.fuzz)
    lane, lanes = (int(number) for number in args.lane.split("/"))
    cases = [
        Case(f"{part}::{case.name}", case.run)
        for part in args.part
        for case in itertools.islice(PARTS[part][0](setting), lane, None, lanes)
    ]
    return work(cases, args.worker, setting.device.synchronize)


# ---- the run ---------------------------------------------------------------------------------------------------------


def groups(parts: Sequence[str], processes: int) -> list[tuple[list[str], int]]:
    """Neighbouring parts that share their processes, and the number of those."""
    from tests.gpu.cases import PARTS

    return [
        (list(members), processes if spread else 1)
        for spread, members in itertools.groupby(parts, key=lambda part: PARTS[part][1])
    ]


def run(args: argparse.Namespace) -> int:
    from tests.gpu.cases import PARTS
    from tests.gpu.device import open_device

    if why := record.unfit(args.device):
        print(f"gpu-check: {why}", file=sys.stderr)
        return 2
    parts = [part for part in PARTS if args.part is None or part in args.part]
    began = time.monotonic()
    device = record.device_of(open_device(args.device))
    facts = record.environment(device)
    print(f"gpu-check on {facts['device']['model']}, torch {facts['versions']['torch']}, commit {facts['commit']}")
    results: dict[str, list[Result]] = {part: [] for part in parts}
    for members, lanes in groups(parts, args.processes):
        until = began + args.budget
        for result in _together(members, lanes, args, until, Teller(began, ", ".join(members))):
            part = result.name.partition("::")[0]
            results[part if part in results else members[0]].append(result)
    results = {part: [record.waived(result) for result in found] for part, found in results.items()}
    if args.part is None and (dead := record.stale_waivers(results)):
        results["ledger"] = dead
    seconds = time.monotonic() - began
    differs = record.library_differs() if args.device == "cuda" else None
    made = record.of_check(facts, results, args.seed, args.fuzz, seconds, differs)
    print(table(made))
    record.save(made, device, args.output, args.part is None and args.device == "cuda")
    return 0 if made["passed"] else 1


def _together(parts: list[str], lanes: int, args: argparse.Namespace, until: float, teller: Teller) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{parts[0]}-{lane}.jsonl" for lane in range(lanes)]
        commands = [
            [sys.executable, "-m", "tests.gpu.check", "--worker", str(log), "--lane", f"{lane}/{lanes}"]
            + ["--device", args.device, "--seed", str(args.seed), "--fuzz", str(args.fuzz)]
            + [word for part in parts for word in ("--part", part)]
            for lane, log in enumerate(logs)
        ]
        return supervise(commands, logs, until=until, case_seconds=CASE_SECONDS, tell=teller)


class Teller:
    """A line at most every few seconds, and one for every failure."""

    def __init__(self, began: float, title: str):
        self.began, self.title = began, title
        self.told, self.failures = 0.0, set()

    def __call__(self, results: Sequence[Result], total: int) -> None:
        now = time.monotonic()
        for result in results:
            if result.status == "failed" and result.name not in self.failures:
                self.failures.add(result.name)
                print(f"{now - self.began:5.0f} s  FAILED {result.name}: {result.reason[:300]}", flush=True)
        if now - self.told > TOLD_EVERY:
            self.told = now
            print(f"{now - self.began:5.0f} s  {self.title}: {len(results)} of {total}", flush=True)


def table(made: dict) -> str:
    """The record's outcome on the screen."""
    lines = [f"{'part':10} {'ok':>5} {'failed':>7} {'skipped':>8} {'not run':>8} {'seconds':>8}"]
    for part, counts in made["parts"].items():
        cells = [counts.get(status, 0) for status in ("ok", "failed", "skipped", "not run")]
        lines.append(f"{part:10} {cells[0]:5} {cells[1]:7} {cells[2]:8} {cells[3]:8} {counts['seconds']:8.1f}")
    for name, reason in made["reasons"].items():
        lines.append(f"{made['checks'][name].partition(' ')[0].upper():8} {name}: {reason}")
    ran = sum(kernel["launched"] for kernel in made["kernels"])
    lines.append(f"kernels: {ran} of {len(made['kernels'])} ran")
    if made["library_differs"]:
        lines.append(f"no kernel counts as verified: the library is not that of kernels.txt: {made['library_differs']}")
    lines.append(f"{'passed' if made['passed'] else 'FAILED'} in {made['seconds']:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
