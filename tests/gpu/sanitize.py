"""`make gpu-sanitize`: compute-sanitizer's tools over the smoke calls, in under nine minutes.

    python -m tests.gpu.sanitize                  all tools; writes bench/results/gpu-sanitize-<device>.json
    python -m tests.gpu.sanitize --tool racecheck one of them; writes nothing unless --output says where

Only the library's kernels are watched, except by initcheck, which must see every kernel that writes memory and of whose
findings only those in the library's kernels count. memcheck and initcheck first show that they see a planted fault. A
tool that cannot run here is reported and fails nothing; the exit status is 0 if at least one ran and none found
anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BUDGET = 520.0
#: In the order in which they run, with the options that each takes beside those of all.
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": ("--kernel-name", "kns=peftops", "--report-api-errors", "no"),
    "synccheck": ("--kernel-name", "kns=peftops"),
    "initcheck": (),
    "racecheck": ("--kernel-name", "kns=peftops"),
}
PLANTED = ("memcheck", "initcheck")
#: The least that a tool gets where the budget is shared.
SHARE = {"memcheck": 0.3, "synccheck": 0.3, "initcheck": 0.5, "racecheck": 1.0}
FOUND, NOTHING_RAN = 9, 2


def environment(tool: str) -> dict[str, str]:
    """Every tensor in an allocation of its own, so that its end is the end; racecheck sees shared memory only."""
    return {} if tool == "racecheck" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def command(sanitizer: str, tool: str, log: Path, device: str, plant: bool) -> list[str]:
    watch = [sanitizer, "--tool", tool, *TOOLS[tool], "--log-file", str(log), "--error-exitcode", str(FOUND)]
    watch += ["--print-limit", "100000", "--destroy-on-device-error", "kernel", "--require-cuda-init", "no"]
    smoke = [sys.executable, "-m", "tests.gpu.smoke", "--device", device]
    return [*watch, *smoke, *(["--plant", tool] if plant else [])]


def findings(log: str) -> list[str]:
    """What a tool says about kernels of the library: each finding's first line, and where it is."""
    found = []
    for block in re.split(r"^=========\s*$", log, flags=re.MULTILINE):
        lines = [line.removeprefix("=========").strip() for line in block.strip().splitlines()]
        lines = [line for line in lines if line != "COMPUTE-SANITIZER" and not line.startswith("Host Frame")]
        place = next((line for line in lines if re.search(r"\bat .*peftops", line)), None)
        if place is not None:
            found.append(place if place == lines[0] else f"{lines[0]}: {place}")
    return found


def summary(log: str) -> str | None:
    """The line with which a tool ends; None where it did not get there."""
    matches = re.findall(r"^========= ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, flags=re.MULTILINE)
    return matches[-1] if matches else None


def run_tool(sanitizer: str, tool: str, device: str, seconds: float, plant: bool = False) -> dict:
    """status: "ok", "found", "unavailable" or "out of time"; with what was found and how many calls were watched."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        try:
            done = subprocess.run(
                command(sanitizer, tool, log, device, plant),
                env=os.environ | environment(tool),
                capture_output=True,
                text=True,
                timeout=max(seconds, 1.0),
            )
        except subprocess.TimeoutExpired:
            return {"status": "out of time", "seconds": round(time.monotonic() - began, 1)}
        text = log.read_text(errors="replace") if log.exists() else ""
    result = {"seconds": round(time.monotonic() - began, 1), "summary": summary(text), "findings": findings(text)}
    made = re.search(r"^calls: (\d+)$", done.stdout, flags=re.MULTILINE)
    if made:
        result["calls"] = int(made[1])
    # All but initcheck watch the library's kernels alone, so whatever they found is the library's.
    found = result["findings"] or (made and tool != "initcheck" and done.returncode == FOUND)
    if not found and not (made and result["summary"]):
        tail = (text + done.stderr).strip().splitlines()
        return {**result, "status": "unavailable", "reason": " | ".join(tail[-3:])[:600]}
    return {**result, "status": "found" if found else "ok"}


def judge(planted: dict | None, result: dict) -> dict:
    """The tool's result in the light of the planted fault: a tool that is blind to it has shown nothing."""
    if planted is None or planted["status"] == "found" or result["status"] != "ok":
        return result
    return {**result, "status": "blind", "reason": "it does not see the planted fault"}


def passed(tools: dict[str, dict]) -> bool:
    """Whether at least one tool ran to its end, and none of those that ran found anything or was blind."""
    statuses = [tool["status"] for tool in tools.values()]
    return "ok" in statuses and all(status in ("ok", "unavailable") for status in statuses)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-sanitize", description="compute-sanitizer over the operators.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tool", choices=list(TOOLS), action="append")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program; default: %(default)s")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything; default: %(default)g")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)

    from tests.gpu import record
    from tests.gpu.device import open_device

    if why := record.unfit(args.device):
        print(f"gpu-sanitize: {why}", file=sys.stderr)
        return NOTHING_RAN
    sanitizer = shutil.which(args.sanitizer)
    began = time.monotonic()
    device = record.device_of(open_device(args.device))
    tools: dict[str, dict] = {}
    for tool in (name for name in TOOLS if args.tool is None or name in args.tool):
        if sanitizer is None:
            tools[tool] = {"status": "unavailable", "seconds": 0.0, "reason": f"there is no {args.sanitizer}"}
        else:
            left = args.budget - (time.monotonic() - began)
            planted = run_tool(sanitizer, tool, args.device, SHARE[tool] * left, True) if tool in PLANTED else None
            left = args.budget - (time.monotonic() - began)
            tools[tool] = judge(planted, run_tool(sanitizer, tool, args.device, SHARE[tool] * left))
        print(f"{time.monotonic() - began:5.0f} s  {line(tool, tools[tool])}", flush=True)
    made = {
        "family": "gpu-sanitize",
        **record.environment(device),
        "seconds": round(time.monotonic() - began, 1),
        "passed": passed(tools),
        "tools": tools,
    }
    record.save(made, device, args.output, args.tool is None and args.device == "cuda")
    print("passed" if made["passed"] else "FAILED" if sanitizer else "nothing could be checked")
    return 0 if made["passed"] else 1


def line(tool: str, result: dict) -> str:
    said = [f"{tool}: {result['status']}", f"{result['calls']} calls" if "calls" in result else ""]
    said += [result.get("summary") or "", result.get("reason", ""), *result.get("findings", [])[:5]]
    return "; ".join(part for part in said if part)


if __name__ == "__main__":
    sys.exit(main())
