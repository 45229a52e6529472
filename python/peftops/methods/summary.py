"""What the adapters of a model are, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .entry import Entry


@dataclass(frozen=True)
class TrainedModule:
    """What one adapter has in one module. kind: the module's class; shape: (in_features, out_features), with a
    convolution's kernel among the first, rank: r, None for a module that is trained whole; parameters and bytes: of
    what the adapter adds or trains; adapter: its name.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    rank: int | None
    parameters: int
    bytes: int
    adapter: str


@dataclass(frozen=True)
class Summary:
    """All adapters. modules: in the model's order; skipped: full name -> the reason why a linear layer was left alone;
    model_parameters: of the whole model, the adapters' among them. `print` shows a table.
    """

    modules: tuple[TrainedModule, ...]
    skipped: dict[str, str]
    model_parameters: int

    @property
    def parameters(self) -> int:
        """Number of the adapters' parameters."""
        return sum(module.parameters for module in self.modules)

    @property
    def bytes(self) -> int:
        """Their size in bytes."""
        return sum(module.bytes for module in self.modules)

    @property
    def share(self) -> float:
        """The adapters' parameters / all parameters of the model."""
        return self.parameters / self.model_parameters if self.model_parameters else 0.0

    def __str__(self) -> str:
        groups: dict[tuple, list[TrainedModule]] = {}
        for module in self.modules:
            pattern = ".".join("*" if part.isdigit() else part for part in module.name.split("."))
            key = (pattern, module.adapter, module.kind, module.shape, module.rank)
            groups.setdefault(key, []).append(module)
        rows = [("layers", "adapter", "count", "kind", "in -> out", "rank", "parameters", "bytes")]
        for (name, adapter, kind, shape, rank), members in groups.items():
            rows.append(
                (
                    name,
                    adapter,
                    str(len(members)),
                    kind,
                    f"{shape[0]} -> {shape[1]}" if shape else "whole",
                    str(rank) if rank else "",
                    f"{sum(member.parameters for member in members):,}",
                    f"{sum(member.bytes for member in members):,}",
                )
            )
        rows.append(("all", "", str(len(self.modules)), "", "", "", f"{self.parameters:,}", f"{self.bytes:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"{100 * self.share:.3f}% of the model's {self.model_parameters:,} parameters")
        lines.extend(f"left alone: {name}: {reason}" for name, reason in self.skipped.items())
        return "\n".join(lines)


def summarize(model: nn.Module, entries: Mapping[str, Entry]) -> Summary:
    """The summary of the adapters `entries`, by name, in `model`."""
    rows = []
    for name, entry in entries.items():
        for path in entry.layers:
            layer = model.get_submodule(path)
            factors = [factor for factor in layer.factors(name) if factor is not None]
            shape = (math.prod(factors[0].shape[1:]), factors[1].shape[0])
            rows.append(_row(path, layer, name, factors, shape, layer.adapters[name].rank))
        for path in entry.saved.modules:
            module = model.get_submodule(path)
            rows.append(_row(path, module, name, list(module.parameters()), None, None))
        for path in entry.saved.names:
            owner = model.get_submodule(path.rpartition(".")[0])
            rows.append(_row(path, owner, name, [model.get_parameter(path)], None, None))
    position = {path: index for index, (path, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: position.get(row.name, position.get(row.name.rpartition(".")[0])))
    total = sum(parameter.numel() for parameter in model.parameters())
    skipped = {path: reason for entry in entries.values() for path, reason in entry.skipped.items()}
    return Summary(tuple(rows), skipped, total)


def _row(
    name: str,
    module: nn.Module,
    adapter: str,
    parameters: list[Tensor],
    shape: tuple[int, int] | None,
    rank: int | None,
) -> TrainedModule:
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return TrainedModule(name, type(module).__name__, shape, rank, count, size, adapter)
