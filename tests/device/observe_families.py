"""In a process of standin.Process that records: calls of the operators beside lora_linear."""

from __future__ import annotations

from typing import Any

import torch
from peftops.ops import grouped_lora_linear, lora_linear_multi

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


def observe_multi(
    *,
    rows: int,
    features: int,
    widths: list[int],
    ranks: list[int],
    dtype: str = "bfloat16",
    factor_dtype: str | None = None,
    dropout_p: float = 0.0,
    gradients: str = "",
    unused: int = 0,
    **where: Any,
) -> dict:
    """One call of lora_linear_multi, and the named gradients; the last `unused` results have none."""

    def call(device: str):
        factors = factor_dtype or dtype
        tensors = {
            "x": _empty(device, dtype, rows, features),
            "weights": [_empty(device, dtype, n, features) for n in widths],
            "biases": [_empty(device, dtype, n) for n in widths],
            "lora_a": [_empty(device, factors, r, features) for r in ranks],
            "lora_b": [_empty(device, factors, n, r) for n, r in zip(widths, ranks, strict=True)],
        }
        used = len(widths) - unused
        chosen = [tensors[name] for name in gradients.split()]
        leaves = [t.requires_grad_() for c in chosen for t in (c[:used] if isinstance(c, list) else [c])]
        scales = _empty(device, "float32", len(widths))
        seeds = _empty(device, "int64", len(widths)) if dropout_p else None
        upstream = [_empty(device, dtype, rows, n) for n in widths[:used]]

        def run() -> list:
            ys = lora_linear_multi(*tensors.values(), scales, dropout_p, seeds)
            return [*ys, *(torch.autograd.grad(ys[:used], leaves, upstream) if leaves else ())]

        return run

    return _observe(call, **where)
