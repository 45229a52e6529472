"""Fast, memory-lean building blocks for parameter-efficient fine-tuning: PyTorch operators, modules and methods."""

from ._load import load_library

load_library()

from . import nn, ops  # noqa: E402
from .methods import LoRA, MultiLoRA, attach, check_trainable, combine, load  # noqa: E402

__all__ = ["LoRA", "MultiLoRA", "attach", "check_trainable", "combine", "load", "nn", "ops"]
__version__ = "0.1.0"
