"""One adapter of a LoRA layer: its hyperparameters, its values, and the modules that hold them by its name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import inits

ADAPTER = "default"
BASE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def factor_dtype(base: torch.dtype, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of the factors over a base weight of dtype `base`; ValueError where the operator has no such pair."""
    if adapter_dtype is None or adapter_dtype == base:
        return base
    if adapter_dtype == torch.float32 and base in (torch.bfloat16, torch.float16):
        return adapter_dtype
    raise ValueError(
        f"adapter_dtype is {name_of(adapter_dtype)}, but over a {name_of(base)} weight it must be {name_of(base)}"
        + (" or float32" if base in (torch.bfloat16, torch.float16) else "")
    )


def check_hyperparameters(rank: int, alpha: float, dropout: float, init: str | Callable) -> None:
    """Raise ValueError, naming the argument, for a hyperparameter outside its range."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}, but it must be an integer of at least 1")
    if not _is_number(alpha) or alpha <= 0:
        raise ValueError(f"alpha is {alpha!r}, but it must be a positive number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}, but it must be in [0, 1)")
    inits.check(init, rank)


def check_name(name: object) -> None:
    """Raise ValueError for a name that an adapter cannot have: it becomes an attribute of the layers' modules."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", name):
        raise ValueError(
            f"name is {name!r}, but it must be made of letters, digits, _ and -, and not begin with a digit or -"
        )
    if hasattr(ByName(), name) or hasattr(Scales(), name):
        raise ValueError(f"name is {name!r}, which torch.nn uses itself; choose another")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Adapter:
    """One adapter in one layer. Arguments as those of :class:`peftops.LoRA`; ValueError for one out of its range."""

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    use_rslora: bool = False
    init: str | Callable = "kaiming"
    adapter_dtype: torch.dtype | None = None
    lora_bias: bool = False

    def __post_init__(self):
        check_hyperparameters(self.rank, self.alpha, self.dropout, self.init)

    @property
    def scaling(self) -> float:
        """s = alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, "rsLoRA", 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Factors(NamedTuple):
    """Values of one adapter in one layer: A [rank, in_features], B [out_features, rank], B's bias [out_features] or
    None.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-d float32 tensor, as the operator takes its scale."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for backward later
        return torch.full((), value, dtype=torch.float32, device=device)


class ByName(nn.Module):
    """Parameters of one kind, by the adapter's name. Not an `nn.ParameterDict`, whose entries are not in the replicas
    that `nn.DataParallel` makes.
    """

    def __getitem__(self, name: str) -> nn.Parameter:
        return getattr(self, name)

    def __setitem__(self, name: str, parameter: nn.Parameter) -> None:
        self.register_parameter(name, parameter)

    def __delitem__(self, name: str) -> None:
        delattr(self, name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def get(self, name: str) -> nn.Parameter | None:
        return getattr(self, name, None)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: {list(value.shape)} {name_of(value.dtype)}" for name, value in self._parameters.items()
        )


class Scales(nn.Module):
    """One 0-d float32 buffer per adapter, by its name. A value gets a new tensor and is not written in place: a graph
    that was recorded before may still need the old one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, float] = {}

    def put(self, name: str, value: float, device: torch.device) -> None:
        if self._values.get(name) == value and getattr(self, name).device == device:
            return
        self._values[name] = value
        self.register_buffer(name, scalar(value, device), persistent=False)

    def drop(self, name: str) -> None:
        delattr(self, name)
        del self._values[name]

    def _apply(self, fn, recurse=True):
        # Refilled and not converted: bfloat16 would round it, to_empty would leave it uninitialised.
        for name, value in self._values.items():
            moved = fn(getattr(self, name))
            if moved is not getattr(self, name):
                setattr(self, name, scalar(value, moved.device))
        return self
