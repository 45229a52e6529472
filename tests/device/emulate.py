"""Inside a process of standin.Process: torch with CUDA devices that are none, and functions that tests call by name.

`python -m tests.device.emulate RUNTIME BACKEND [LIBRARY]`: the stand-ins of standin.py and, for the emulator, peftops'
CUDA library as the C++ compiler made it. Without it the CUDA library that was built with the package is loaded, as on
a machine with a GPU, and its kernels are recorded instead of run. Calls come as lines of JSON on standard input,
results go to standard output; what a library prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path


class Device:
    """The stand-ins of this process."""

    def __init__(self, runtime: str, backend: str):
        # Before torch is imported, because on import it asks once and for all what there is for CUDA.
        libraries = Path(find_spec("torch").origin).parent / "lib"
        ctypes.CDLL(str(libraries / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self.runtime = ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        self.backend = ctypes.CDLL(backend, mode=ctypes.RTLD_GLOBAL)
        self.backend.torch_cuda_damage.restype = ctypes.c_char_p
        self.backend.torch_cuda_live_blocks.restype = ctypes.c_size_t

        import torch

        # Python's part of torch was built without CUDA: nothing to initialise, and autocast would switch itself off.
        torch.cuda._lazy_init = lambda: None
        torch.cuda.amp.common.amp_definitely_not_available = lambda: False
        torch.cuda.is_bf16_supported = lambda including_emulation=True: True

    def record(self, on: bool = True) -> None:
        """From now on memory is address space only, and operators of torch work out shapes."""
        self.backend.torch_cuda_record(on)

    def set_stream(self, device: int, handle: int) -> None:
        """Make the stream with this handle current on a device, for this thread."""
        self.backend.torch_cuda_set_stream(device, ctypes.c_int64(handle))

    def set_seed(self, seed: int) -> None:
        """Shuffle blocks, warps and lanes of all launches from now on by this seed."""
        self.runtime.cudart_set_emulator_seed(ctypes.c_uint64(seed))

    def damage(self) -> str:
        """What was written around blocks of memory since the last call; empty if nothing was."""
        return self.backend.torch_cuda_damage().decode()

    def live_blocks(self) -> int:
        """How many blocks of memory are in use."""
        return self.backend.torch_cuda_live_blocks()


device: Device


def _load(runtime: str, backend: str, library: str | None = None) -> None:
    global device
    device = Device(runtime, backend)
    import torch

    if library is None:
        torch.version.cuda = "13.0"
    import peftops

    if library is not None:
        peftops._load._refusals._destroy()
        torch.ops.load_library(library)
    assert peftops._load.cuda_error() is None or library is not None, peftops._load.cuda_error()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        module, _, name = request["function"].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            # A test that standin.runs_in sent here must not be sent once more.
            reply = {"result": getattr(function, "body", function)(**request["arguments"])}
            damage = device.damage()
            assert not damage, damage
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)
    # Past the end of the interpreter, which autograd's threads for devices do not always survive.
    os._exit(0)


if __name__ == "__main__":
    # Under its own name, so that functions that tests call find the same `device`.
    from tests.device import emulate

    emulate._load(*sys.argv[1:])
    emulate._serve()
