"""One adapter among those of a tuning, and what is done to the model for it."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..nn.adapter import Adapter, Factors
from ..nn.lora import LoRALayer, lora_class
from .files import load_adapter
from .lora import LoRA
from .model import all_parameters
from .peft_files import Loaded, from_files
from .saved import Saved

_LARGEST_WEIGHT = 1e30  # times a scaling it has to be a float32 number


@dataclass
class Entry:
    """One adapter of a tuning. layers: full names of those that it adapts; blank: of those that hold an empty place for
    it, left by a swap.
    """

    method: LoRA
    layers: list[str]
    saved: Saved
    trainable: bool
    skipped: dict[str, str]
    blank: list[str]

    @property
    def places(self) -> tuple[str, ...]:
        """The layers that hold memory for it."""
        return (*self.layers, *self.blank)


def read(model: nn.Module, directory: str | os.PathLike, action: str) -> Loaded:
    """The adapter in `directory`, compared with the model; what is wrong is named, after `action`."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError(f"{action}: the model has parameters on the meta device; materialise it first")
    config, tensors = load_adapter(directory)
    return from_files(model, config, tensors, f"{action}: {os.fspath(directory)}")


def fill(
    model: nn.Module, name: str, layers: dict[str, Adapter], factors: dict[str, Factors], capacity: int | None = None
) -> None:
    """Put the adapter into these layers, or into none of them."""
    done = []
    try:
        for path, adapter in layers.items():
            layer = model.get_submodule(path)
            if isinstance(layer, LoRALayer):
                layer.add_(name, adapter, factors.get(path), capacity)
            else:
                lora_class(layer).adapt_(layer, adapter, name, factors.get(path), capacity)
            done.append(layer)
    except BaseException:
        for layer in done:
            take_out(layer, name)
        raise


def take_out(layer: LoRALayer, name: str) -> None:
    """Make the layer a plain one again, or leave it to its other adapters."""
    if list(layer.adapters) == [name]:
        layer.remove_()
    else:
        layer.delete_(name)


def active_weights(which: object) -> dict[str, float]:
    """Name -> weight, from what `activate` takes. Raises TypeError and ValueError for anything else."""
    if which is None:
        weights = {}
    elif isinstance(which, str):
        weights = {which: 1.0}
    elif isinstance(which, Mapping):
        weights = dict(which)
    elif isinstance(which, Sequence):
        weights = dict.fromkeys(which, 1.0)
    else:
        raise TypeError(f"activate: got {which!r}, but it must be a name, names, name -> weight, or None")
    for name, weight in weights.items():
        if not isinstance(weight, numbers.Real) or isinstance(weight, bool) or not abs(weight) <= _LARGEST_WEIGHT:
            raise ValueError(f"activate: the weight of {name!r} is {weight!r}, but it must be a number")
        weights[name] = float(weight)
    return weights


def check_apart(saved: Mapping[str, Saved], action: str) -> None:
    """Raise ValueError where two adapters have their own values for one tensor of the model."""
    owner: dict[str, str] = {}
    for name, own in saved.items():
        for tensor in own.tensors():
            if tensor in owner:
                raise ValueError(
                    f"{action}: {owner[tensor]!r} and {name!r} both have {tensor}; one of them can be active"
                )
            owner[tensor] = name


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards, also after an error, the parameters that were there have their requires_grad of before."""
    flags = {name: p.requires_grad for name, p in all_parameters(model)}
    try:
        yield
    finally:
        for name, parameter in all_parameters(model):
            if name in flags:
                parameter.requires_grad_(flags[name])
