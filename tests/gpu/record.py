"""What a run on a GPU leaves behind.

A record names device, versions and commit, every check with its outcome, and every kernel of the library that has
machine code for the device, with the hash of that code and whether it ran. bench/verified.py reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import harness
import torch
import verified

from tests.build import kernels
from tests.gpu.device import Cuda, Rehearsal
from tests.gpu.runner import Result
from tests.ledger import LEDGER, stale, waivers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = harness.RESULTS
#: Ledger entries waive checks under this path: `tests/gpu/cases.py::kit::lora_linear-float32-values`.
PATH = "tests/gpu/cases.py"


def device_of(device: Cuda | Rehearsal) -> harness.Device:
    return harness.this_gpu() if device.real else harness.this_cpu()


def unfit(kind: str) -> str | None:
    """Why nothing can be checked on a device of this kind here; None where it can."""
    try:
        from peftops import _load
    except ImportError as error:
        return str(error)
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return _load.cuda_error() if kind == "cuda" else None


def save(made: dict, device: harness.Device, output: Path | None, whole: bool) -> None:
    """Write a record where it was asked for; that of a whole run on a GPU without being asked, into bench/results."""
    if output is None and whole:
        output = RESULTS / f"{made['family']}-{device.slug}.json"
    if output is not None:
        harness.write(output, made)
        print(f"written to {output}")


def library_differs() -> str | None:
    """How the CUDA library at hand differs from kernels.txt, whose hashes a record takes over; None where it does not.

    The library of an archive was compared when it was packed; on the machine where it was built, the tools are there.
    """
    if (ROOT / "COMMIT").exists():
        return None
    try:
        _, recorded = kernels.read_record(kernels.RECORD)
        changes = kernels.changes(kernels.kernels(kernels.LIBRARY), recorded)
    except SystemExit as reason:  # a tool is missing
        return str(reason)
    return f"{changes[0]}, and {len(changes) - 1} more" if changes else None


def environment(device: harness.Device) -> dict:
    """Device, versions, commit and date."""
    return harness.environment(device, ("torch", "triton"))


def waived(result: Result, ledger: Sequence = LEDGER) -> Result:
    """The result as the ledger sees it: a known failure is waived, and an unexpected pass fails."""
    test_id = f"{PATH}::{result.name}"
    entry = waivers(ledger, [test_id], "cuda").get(test_id)
    if entry is None or result.status in ("skipped", "not run"):
        return result
    if result.status == "failed":
        return replace(result, status="waived", reason=f"issue {entry.issue}: {entry.reason}")
    return replace(result, status="failed", reason=f"passes, but the ledger waives it (issue {entry.issue})")


def stale_waivers(results: Mapping[str, Sequence[Result]], ledger: Sequence = LEDGER) -> list[Result]:
    """A failure for every ledger entry that matches no check of a full run."""
    ids = [f"{PATH}::{result.name}" for found in results.values() for result in found]
    return [
        Result(f"ledger::{entry.tests}", "failed", reason="the entry matches no check")
        for entry in stale(ledger, ids, "cuda", ROOT)
    ]


def of_check(
    facts: dict, results: Mapping[str, Sequence[Result]], seed: int, fuzz: int, seconds: float, differs: str | None
) -> dict:
    """The record of a run of `check.py`. `results`: part -> results of its checks; `differs`: library_differs()."""
    every = [result for found in results.values() for result in found]
    launched = {name for result in every if result.name == "kernels::launched" for name in result.facts or ()}
    capability = facts["device"].get("capability")
    return {
        "family": "gpu-check",
        **facts,
        "seed": seed,
        "fuzz": fuzz,
        "seconds": round(seconds, 1),
        "passed": bool(every) and all(result.status in ("ok", "skipped", "waived") for result in every),
        "parts": {
            part: {**Counter(r.status for r in found), "seconds": round(sum(r.seconds for r in found), 1)}
            for part, found in results.items()
        },
        "checks": {result.name: f"{result.status} {result.seconds:.2f} s" for result in every},
        "reasons": {result.name: result.reason for result in every if result.reason},
        "launched": sorted(launched),
        "library_differs": differs,
        "kernels": verified.of_device(verified.read(), capability, launched) if capability and not differs else [],
    }
