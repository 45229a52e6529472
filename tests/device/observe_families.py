"""In a process of standin.Process that records: calls of the operators beside lora_linear."""

from __future__ import annotations

from typing import Any

import torch
from peftops.ops import grouped_lora_linear

from .observe import _observe


def _empty(device: str, dtype: str, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def observe_grouped(
    *,
    rows: int,
    features: int,
    out_features: int,
    rank: int,
    adapters: int,
    dtype: str = "bfloat16",
    factor_dtype: str | None = None,
    ids: str = "int64",
    ranks: bool = False,
    gradients: str = "",
    **where: Any,
) -> dict:
    """One call of grouped_lora_linear, and the named gradients."""

    def call(device: str):
        factors = factor_dtype or dtype
        tensors = {
            "x": _empty(device, dtype, rows, features),
            "weight": _empty(device, dtype, out_features, features),
            "bias": _empty(device, dtype, out_features),
            "lora_a": _empty(device, factors, adapters, rank, features),
            "lora_b": _empty(device, factors, adapters, out_features, rank),
        }
        leaves = [tensors[name].requires_grad_() for name in gradients.split()]
        scales, own = _empty(device, "float32", adapters), _empty(device, ids, adapters) if ranks else None
        adapter_ids, upstream = _empty(device, ids, rows), _empty(device, dtype, rows, out_features)

        def run() -> list:
            y = grouped_lora_linear(*tensors.values(), scales, adapter_ids, own)
            return [y, *(torch.autograd.grad(y, leaves, upstream) if leaves else ())]

        return run

    return _observe(call, **where)
