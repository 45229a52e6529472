"""`make test`: the operators' tests once per instruction-set level that this machine runs, everything else once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from peftops import _C

LEVEL = "PEFTOPS_CPU_LEVEL"
# What torch does around an operator is the same at every level: tested at the highest alone.
ONCE = "compile or dynamic or export or inductor or opcheck"
ROOT = Path(__file__).resolve().parent.parent
SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected|warnings?)\b")


def levels() -> list[str]:
    """The levels that are compiled and that this machine runs, lowest first."""
    return _C.cpu_levels[: _C.cpu_levels.index(_C.best_cpu_level()) + 1]


def run(title: str, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run pytest, showing its output as it comes; its exit code and its summary line."""
    print(f"---- {title}", flush=True)
    command = [sys.executable, "-m", "pytest", *arguments]
    summary = "no summary: pytest did not end"
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            if SUMMARY.search(line) and re.search(r"in [\d.]+s", line):
                summary = line.strip("= \n")
    return process.returncode, summary


def main() -> int:
    began = time.perf_counter()
    *lower, highest = levels()
    parts = [(f"tests/ops, {level}", ["tests/ops", "-k", f"not ({ONCE})"], {LEVEL: level}) for level in lower]
    parts.append((f"tests/ops, {highest}", ["tests/ops"], {LEVEL: highest}))
    parts.append(("everything else", ["tests", "--ignore=tests/ops"], {}))
    results = [(title, *run(title, arguments, environment)) for title, arguments, environment in parts]

    print("---- summary")
    total: Counter[str] = Counter()
    for title, code, summary in results:
        print(f"{title}: {summary}" + (f" (exit code {code})" if code else ""))
        total.update({outcome: int(count) for count, outcome in SUMMARY.findall(summary)})
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in total.items())
    print(f"==== {outcomes} in {time.perf_counter() - began:.2f}s ====")
    return int(any(code for _, code, _ in results))


if __name__ == "__main__":
    sys.exit(main())
