"""Drop-in modules built on the operators."""

from .lora import LoRALinear

__all__ = ["LoRALinear"]
