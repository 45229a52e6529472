"""What the CUDA library is built with: nvcc and CUTLASS. As a program: the path of nvcc, or nothing for no CUDA."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

CUTLASS = "nvidia-cutlass==4.2.0.0"
ON, OFF = {"1", "on", "true", "yes"}, {"0", "off", "false", "no"}


def nvcc() -> str | None:
    """The compiler that CUDACXX names, or that of CUDA_HOME, or the one on PATH."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    if (home := os.environ.get("CUDA_HOME")) and (found := shutil.which("nvcc", path=str(Path(home, "bin")))):
        return found
    return shutil.which("nvcc")


def wanted() -> bool:
    """Whether to build the CUDA library: where nvcc is found, or as the environment variable PEFTOPS_CUDA says."""
    choice = os.environ.get("PEFTOPS_CUDA", "").lower()
    if choice not in {"", *ON, *OFF}:
        raise SystemExit(f"peftops: PEFTOPS_CUDA is {choice}, but must be 1, 0 or empty")
    if choice in ON and nvcc() is None:
        raise SystemExit("peftops: PEFTOPS_CUDA is 1, but nvcc is neither CUDACXX, nor in CUDA_HOME, nor on PATH")
    return choice not in OFF and nvcc() is not None


def cutlass() -> Path | None:
    """The directory with CUTLASS's include/: CUTLASS_DIR, or that of the package nvidia-cutlass."""
    if directory := os.environ.get("CUTLASS_DIR"):
        return Path(directory).resolve()
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin).parent / "source" if spec else None


if __name__ == "__main__":
    sys.stdout.write(str(nvcc()) if wanted() else "")
