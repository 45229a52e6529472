"""Randomness of the tests: everything is derived from one integer, so that one integer reproduces a failure."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *labels: object) -> int:
    """A 63-bit seed for the purpose that `labels` name: independent of Python's hash seed, platform and call order."""
    text = "/".join(str(part) for part in (seed, *labels))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *labels: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by :func:`derive`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *labels))
