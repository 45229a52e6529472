"""Finds and loads the native library, once, when the package is imported."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "lib" / "libpeftops.so"


def load_library() -> None:
    """Register the operators of libpeftops with torch.

    Raises ImportError with what is missing where the library was not built, torch is older than 2.10, or the
    environment variable PEFTOPS_CPU_LEVEL names a level that this machine does not run.
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
