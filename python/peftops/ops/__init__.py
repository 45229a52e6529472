"""The operators of peftops: `torch.ops.peftops.*` with their Python entries."""

from .grouped_lora import grouped_lora_linear
from .lora import lora_dropout_mask, lora_linear
from .lora_multi import lora_linear_multi
from .lora_packed import lora_linear_packed, pack_weight

__all__ = [
    "grouped_lora_linear",
    "lora_dropout_mask",
    "lora_linear",
    "lora_linear_multi",
    "lora_linear_packed",
    "pack_weight",
]
