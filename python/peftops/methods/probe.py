"""Running a model on one batch without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn


def arguments_of(batch: object) -> tuple[tuple, dict]:
    """Positional and keyword arguments: a mapping gives keywords, a tuple or list positions, anything else one."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name, None))


@contextmanager
def preserved(model: nn.Module, arguments: tuple, keywords: dict) -> Iterator[None]:
    """Afterwards, also after an error, random number generators, the modes of all modules, buffers and the gradients of
    parameters and arguments are what they were; within it there are no gradients. Other attributes that a model sets in
    its forward are not looked at.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    modes = [(module, module.training) for module in model.modules()]
    owners = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    with torch.random.fork_rng(devices=cuda), gradients_kept([*model.parameters(), *tensors_in((arguments, keywords))]):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for owner, entries in owners:
                owner.clear()
                owner.update(entries)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])


@contextmanager
def gradients_kept(tensors: list[Tensor]) -> Iterator[None]:
    """Within it the tensors start without gradients, and no hook that acts on a finished gradient runs: an optimizer
    that steps inside backward would change the model.
    """
    leaves = {id(tensor): tensor for tensor in tensors if tensor.is_leaf and not tensor.is_inference()}
    gradients = [(tensor, tensor.grad) for tensor in leaves.values()]
    hooks = [tensor._post_accumulate_grad_hooks for tensor in leaves.values()]
    entries = [(registered, dict(registered)) for registered in hooks if registered]
    try:
        for tensor, _ in gradients:
            tensor.grad = None
        for registered, _ in entries:
            registered.clear()
        yield
    finally:
        for tensor, gradient in gradients:
            tensor.grad = gradient
        for registered, hooks in entries:
            registered.update(hooks)
