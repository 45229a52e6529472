"""What merging an adapter costs: the rounding error of the stored weights and the change of the model's output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.adapter import name_of
from .probe import arguments_of, preserved, tensors_in

# Elements that are widened to float64 at a time.
_CHUNK = 1 << 22
_SHOWN = 20


@dataclass(frozen=True)
class LayerError:
    """Rounding error of one merged weight against the exact sum W + s B A, in the weight's units.

    dtype: of the stored weight; elements: their number; largest, mean: of the absolute error; delta: Euclidean norm of
    s B A; lost: norm of the error / norm of s B A, the share of the update that rounding took (0 where nothing was
    rounded); unchanged: share of the entries with an update that kept their old value.
    """

    name: str
    dtype: torch.dtype
    elements: int
    largest: float
    mean: float
    delta: float
    lost: float
    unchanged: float


@dataclass(frozen=True)
class OutputChange:
    """Merged against unmerged output on one batch.

    largest, mean: of the absolute difference; relative: norm of the difference / norm of the unmerged output. For
    logits: kl, the mean over positions of KL(unmerged || merged) in nats; changed, the share of positions whose most
    likely entry is another one. None for other outputs.
    """

    largest: float
    mean: float
    relative: float
    kl: float | None = None
    changed: float | None = None

    def __str__(self) -> str:
        text = f"output: largest change {self.largest:.3g}, mean {self.mean:.3g}, relative {self.relative:.3g}"
        if self.kl is not None:
            text += f"; KL divergence {self.kl:.3g} nats, most likely entry changed at {self.changed:.2%} of positions"
        return text


@dataclass(frozen=True)
class MergeReport:
    """What a merge cost; `print` shows a table, the layers that lost the largest share of their update first.

    layers: in the model's order; output: None without a probe batch.
    """

    layers: tuple[LayerError, ...]
    output: OutputChange | None = None

    @property
    def largest(self) -> float:
        """Largest absolute rounding error of all layers."""
        return _largest(layer.largest for layer in self.layers)

    @property
    def mean(self) -> float:
        """Mean absolute rounding error over all elements."""
        elements = sum(layer.elements for layer in self.layers)
        return sum(layer.mean * layer.elements for layer in self.layers) / elements if elements else 0.0

    @property
    def lost(self) -> float:
        """Norm of all errors / norm of all updates."""
        error = math.hypot(*(layer.lost * layer.delta for layer in self.layers))
        return _ratio(error, math.hypot(*(layer.delta for layer in self.layers)))

    def __str__(self) -> str:
        rows = [("layer", "dtype", "largest error", "mean error", "update lost", "entries unchanged")]
        # A layer whose share is NaN (a weight that is not finite) stands first.
        worst = sorted(self.layers, key=lambda layer: (not math.isnan(layer.lost), -layer.lost))
        for layer in worst[:_SHOWN]:
            errors = f"{layer.largest:.3g}", f"{layer.mean:.3g}", f"{layer.lost:.2%}", f"{layer.unchanged:.2%}"
            rows.append((layer.name, name_of(layer.dtype), *errors))
        if len(worst) > _SHOWN:
            rows.append((f"and {len(worst) - _SHOWN} more", "", "", "", "", ""))
        rows.append((f"all {len(worst)}", "", f"{self.largest:.3g}", f"{self.mean:.3g}", f"{self.lost:.2%}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, str(self.output)] if self.output else lines)


@torch.no_grad()
def measure_layer(name: str, before: Tensor, delta: Tensor, after: Tensor) -> LayerError:
    """The rounding error of `after`, the stored sum of the weight `before` and the update `delta`, all of one shape.

    The exact sum is formed in float64, a few million elements at a time; the tensors may be on different devices.

    Raises ValueError for different shapes.
    """
    if not before.shape == delta.shape == after.shape:
        shapes = f"before {list(before.shape)}, delta {list(delta.shape)}, after {list(after.shape)}"
        raise ValueError(f"measure_layer: {name} has {shapes}, but they must have one shape")
    largest, total, squares, update, moved, kept = 0.0, 0.0, 0.0, 0.0, 0, 0
    flat = [tensor.detach().reshape(-1) for tensor in (before, delta, after)]
    for old, step, new in zip(*(tensor.split(_CHUNK) for tensor in flat), strict=True):
        old, step, new = (part.to(after.device, torch.float64) for part in (old, step, new))
        error = (new - (old + step)).abs()
        largest = _largest((largest, error.max().item() if error.numel() else 0.0))
        total += error.sum().item()
        squares += error.square().sum().item()
        update += step.square().sum().item()
        moved += int((step != 0).sum())
        kept += int(((step != 0) & (new == old)).sum())
    norm = math.sqrt(update)
    lost = _ratio(math.sqrt(squares), norm)
    count = after.numel()
    return LayerError(name, after.dtype, count, largest, total / max(count, 1), norm, lost, kept / max(moved, 1))


@torch.no_grad()
def run_probe(model: nn.Module, batch: object) -> object:
    """The model's output in evaluation mode, without gradients and without a trace in the model.

    batch: one tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
    """
    arguments, keywords = arguments_of(batch)
    with preserved(model, arguments, keywords):
        model.eval()
        return model(*arguments, **keywords)


@torch.no_grad()
def compare_outputs(unmerged: object, merged: object, logits: bool | None = None) -> OutputChange:
    """The difference of two outputs of one model.

    The outputs' `logits` (attribute or key) are compared where there are any, otherwise all floating tensors in them.
    logits: whether the last dimension holds logits; None = where the output calls them so.

    Raises ValueError where the outputs hold no floating tensor or do not have the same shapes.
    """
    named = [_field(output, "logits") for output in (unmerged, merged)]
    if logits is None:
        logits = all(isinstance(value, Tensor) for value in named)
    chosen = named if all(isinstance(value, Tensor) for value in named) else (unmerged, merged)
    old, new = ([tensor for tensor in tensors_in(value) if tensor.is_floating_point()] for value in chosen)
    if not old:
        raise ValueError("compare_outputs: the output holds no floating tensor")
    shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"compare_outputs: the outputs have shapes {shapes[0]} and {shapes[1]}")
    largest, total, squares, norm, divergence, changed, positions = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0
    for first, second in _rows(old, new):
        # Entries that are masked with -inf in both are equal.
        difference = torch.where(first == second, 0.0, second - first).abs()
        largest = _largest((largest, difference.max().item() if difference.numel() else 0.0))
        total += difference.sum().item()
        squares += difference.square().sum().item()
        norm += first[first.isfinite()].square().sum().item()
        if logits and first.numel():
            p, q = first.log_softmax(-1), second.log_softmax(-1)
            # An entry of probability 0 adds nothing.
            divergence += torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum().item()
            changed += int((first.argmax(-1) != second.argmax(-1)).sum())
            positions += len(first)
    relative = _ratio(math.sqrt(squares), math.sqrt(norm))
    mean = total / max(sum(tensor.numel() for tensor in old), 1)
    if not positions:
        return OutputChange(largest, mean, relative)
    return OutputChange(largest, mean, relative, divergence / positions, changed / positions)


def _field(output: object, name: str) -> object:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _rows(old: list[Tensor], new: list[Tensor]):
    """Pairs of float64 matrices [some rows, last dimension]."""
    for first, second in zip(old, new, strict=True):
        width = max(first.shape[-1] if first.dim() else 1, 1)
        pair = (first.reshape(-1, width), second.to(first.device).reshape(-1, width))
        for parts in zip(*(matrix.split(max(_CHUNK // width, 1)) for matrix in pair), strict=True):
            yield tuple(part.double() for part in parts)


def _largest(values) -> float:
    """The largest value; NaN where there is one, which Python's max would hide."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values, default=0.0)


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0
