"""The operators of peftops: `torch.ops.peftops.*` with their Python entries."""

from .lora import lora_dropout_mask, lora_linear
from .lora_packed import lora_linear_packed, pack_weight

__all__ = ["lora_dropout_mask", "lora_linear", "lora_linear_packed", "pack_weight"]
