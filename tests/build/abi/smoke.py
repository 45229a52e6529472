"""Runs in an environment that has another PyTorch and the package's wheel, and prints as JSON what works there.

`python smoke.py kit`: the whole oracle kit on the CPU; what the package says of CUDA, and that its import starts none.
`python smoke.py cuda [RUNTIME]`: loads the CUDA library, with the CUDA runtime RUNTIME where torch has another one.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import sys
from collections import Counter

import torch

CPU_ONLY = {"peftops::lora_linear_packed", "peftops::pack_weight"}


def kit() -> dict:
    """Every check of every contract, by name: how often it passed. The first failure ends the run."""
    import peftops
    from peftops.ops.contract import CONTRACTS
    from peftops.testing import plan, run
    from peftops.testing.dispatch import check_errors

    assert not torch.cuda.is_initialized(), "import peftops started CUDA"
    works_after_fork(peftops)
    torch.set_num_threads(1)
    cpu, passed = torch.device("cpu"), Counter()
    for contract in CONTRACTS.values():
        check_errors(contract, cpu)
        passed["errors"] += 1
    for contract, dtype, check in plan(CONTRACTS.values()):
        run(check, contract, cpu, dtype, seed=0)
        passed[check.name] += 1
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "passed": passed,
        "no CUDA kernels, because": peftops._load.cuda_error(),
        "schemas": sorted(str(contract.op._schema) for contract in CONTRACTS.values()),
    }


def works_after_fork(peftops) -> None:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        peftops.ops.lora_dropout_mask(torch.tensor([1]), 4, 4, 0.5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def cuda(runtime: str | None) -> dict:
    """The CUDA library loads, which resolves all its symbols, and its operators stand at the CUDA key."""
    if runtime:
        # In a process where the package was not imported: it would refuse this CUDA.
        from importlib.util import find_spec
        from pathlib import Path

        ctypes.CDLL(runtime)
        folder = Path(find_spec("peftops").origin).parent / "lib"
        for name in ("libpeftops.so", "libpeftops_cuda.so"):
            torch.ops.load_library(str(folder / name))
    else:
        import peftops

        assert peftops._load.cuda_error() is None, peftops._load.cuda_error()
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("peftops::")]
    without = {name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert names and without <= CPU_ONLY, f"no CUDA kernel for {without}"
    assert not torch.cuda.is_initialized(), "the CUDA library started CUDA"
    return {"torch": torch.__version__, "runtime": "its own" if runtime is None else "another", "operators": len(names)}


def main() -> None:
    what, *arguments = sys.argv[1:]
    result = kit() if what == "kit" else cuda(arguments[0] if arguments else None)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
