"""Drop-in modules built on the operators."""

from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .embedding import LoRAEmbedding
from .fused import LoRAFusedLinear
from .grouped import GroupedLoRALinear
from .linear import LoRALinear

__all__ = [
    "GroupedLoRALinear",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAFusedLinear",
    "LoRALinear",
]
