"""A short name for a base model, so that an adapter can tell whether it meets the base that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..nn.dtensor import whole
from ..nn.lora import LoRALayer

SAMPLE = 256


def fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """SHA-256 (hexadecimal) over the base parameters' names and shapes, and at most 256 values of each adapted weight.

    It is the same before an adapter is attached, while one is, merged or not (as long as the base is kept), and after
    the base was loaded again, on every device. Of dtypes only the values count: a base that was loaded in a wider dtype
    than its checkpoint's keeps its fingerprint, a base that was rounded has another one. A change that misses the
    sampled values is not seen.

    model: the base model, with or without adapters; names: full names of the adapted layers.

    Raises ValueError for an adapted weight on the meta device, AttributeError for a name that the model has not.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(_base_shapes(model).items()):
        digest.update(f"{name} {list(shape)}\n".encode())
    for name in sorted(names):
        digest.update(f"{name}\n".encode())
        digest.update(_sample(name, _base_weight(model.get_submodule(name))).numpy().tobytes())
    return digest.hexdigest()


def _base_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Full name -> shape of the parameters that are no adapter's."""
    added: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            start = f"{name}." if name else ""
            added += [f"{start}{kind}." for kind in ("lora_a", "lora_b", "lora_bias")]
            if module.merged and module._kept is not None and module._kept["bias"] is None:
                added.append(f"{start}bias")  # made by the merge
    return {name: p.shape for name, p in model.named_parameters() if not name.startswith(tuple(added))}


def _base_weight(layer: nn.Module) -> Tensor:
    """The weight as it was before an initialisation or a merge changed it."""
    if isinstance(layer, LoRALayer) and not layer.disabled:  # switched off, it is in its place
        if layer._original is not None:
            return layer._original
        if layer._kept is not None:
            return layer._kept["weight"]
    return layer.weight.detach()


def _sample(name: str, weight: Tensor) -> Tensor:
    """Values at evenly spaced places, exactly widened to float64, on the host."""
    if weight.is_meta:
        raise ValueError(f"fingerprint: {name}.weight is on the meta device, but its values are needed")
    count = min(SAMPLE, weight.numel())
    places = torch.arange(count) * weight.numel() // max(count, 1)
    indices = torch.unravel_index(places.to(weight.device), weight.shape)
    return whole(weight)[indices].to("cpu").to(torch.float64)
