"""peftops: fast, memory-lean building blocks for parameter-efficient fine-tuning, as PyTorch operators, modules and methods."""

from ._load import load_library

load_library()

from . import ops  # noqa: E402

__all__ = ["ops"]
__version__ = "0.1.0"
