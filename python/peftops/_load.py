"""Finds and loads the native libraries, once, when the package is imported."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "lib" / "libpeftops.so"
CUDA_LIBRARY = LIBRARY.with_name("libpeftops_cuda.so")

_NAMESPACE = "peftops"
_cuda_error: str | None = None
_refusals = torch.library.Library(_NAMESPACE, "IMPL")


def load_library() -> None:
    """Register the operators of libpeftops with torch, and the CUDA kernels of libpeftops_cuda where torch has CUDA.

    Raises ImportError with what is missing where the library was not built, torch is older than 2.10, or the
    environment variable PEFTOPS_CPU_LEVEL names a level that this machine does not run. CUDA kernels that cannot be
    had are no error here: the operators raise one on CUDA tensors.
    """
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < (2, 10):
        raise ImportError(f"peftops needs torch >= 2.10, but torch {torch.__version__} is installed")
    if not LIBRARY.exists():
        raise ImportError(
            f"peftops was installed without its native library ({LIBRARY.name}); build it with `pip install .`"
        )
    torch.ops.load_library(str(LIBRARY))
    level_error = ctypes.CDLL(str(LIBRARY)).peftops_cpu_level_error
    level_error.restype = ctypes.c_char_p
    if message := level_error().decode():
        raise ImportError(message)
    global _cuda_error
    _cuda_error = _load_cuda_library()
    if _cuda_error is not None:
        _refuse_cuda(_cuda_error)


def cuda_error() -> str | None:
    """Why the operators have no CUDA kernels in this process; None where they have them."""
    return _cuda_error


def _load_cuda_library() -> str | None:
    """Load libpeftops_cuda, or say why not. Nothing here or in the library's initialisers starts CUDA."""
    if torch.version.cuda is None:  # ROCm, too
        return f"torch {torch.__version__} was built without CUDA"
    if not CUDA_LIBRARY.exists():
        return f"peftops was built without nvcc, so {CUDA_LIBRARY.name} is missing; build it where nvcc is in PATH"
    wanted = _cuda_major()
    if torch.version.cuda.partition(".")[0] != wanted:
        return (
            f"torch {torch.__version__} was built for CUDA {torch.version.cuda}, but {CUDA_LIBRARY.name} "
            f"for CUDA {wanted}"
        )
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"{CUDA_LIBRARY.name} does not load: {error.__cause__ or error}"  # torch hides the loader's own words
    return None


def _cuda_major() -> str:
    """The major version of the CUDA runtime that the library's dynamic section asks for."""
    with CUDA_LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return re.search(rb"\0libcudart\.so\.(\d+)\0", content).group(1).decode()


def _refuse_cuda(reason: str) -> None:
    """Give every operator a CUDA kernel that raises RuntimeError with the reason."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operator = name.partition("::")
        if namespace == _NAMESPACE:
            _refusals.impl(operator, _refusal(operator.partition(".")[0], reason), "CUDA")


def _refusal(operator: str, reason: str):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"{operator}: no CUDA kernel, because {reason}")

    return refuse
