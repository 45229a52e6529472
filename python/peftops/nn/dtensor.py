"""Tensors that are spread over processes (DTensors of `torch.distributed.tensor`), for code that has to tell them apart
from others without importing that package, which takes a while and which most programs never need.
"""

from __future__ import annotations

import sys

from torch import Tensor


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor; none exists before somebody has imported the package."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(value, package.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor on this process. Of a DTensor it gathers the parts: every rank has to call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def spread_like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value`, the same on every rank, on the devices and in the parts of `tensor`, which may be a plain one."""
    if not is_dtensor(tensor) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.detach(), tensor.device_mesh, tensor.placements)
