"""The operators of peftops: `torch.ops.peftops.*` with their Python entries."""

from .lora import lora_dropout_mask, lora_linear

__all__ = ["lora_dropout_mask", "lora_linear"]
