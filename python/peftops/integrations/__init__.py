"""Doors into other libraries; each module imports its library only when it is used."""

from . import hf_peft

__all__ = ["hf_peft"]
