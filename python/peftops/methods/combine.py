"""Weighted combinations of saved LoRA adapters as one new adapter, computed from the files alone."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.adapter import name_of
from . import peft_config
from .deltas import DENSITY, KINDS, Layer, combined
from .files import FINGERPRINT, PREFIX, load_adapter, save_adapter
from .lora import LoRA
from .progress import progress

_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SHOWN = 20


@dataclass(frozen=True)
class CombinedLayer:
    """One layer of a combination. error: norm of (stored delta - wanted delta) / norm of the wanted delta, by what was
    cut off to its rank and by the rounding to its dtype.
    """

    name: str
    rank: int
    dtype: torch.dtype
    error: float


@dataclass(frozen=True)
class Combination:
    """What :func:`combine` wrote; `print` shows a table, the layers with the largest errors first."""

    kind: str
    weights: dict[str, float]
    directory: str
    layers: tuple[CombinedLayer, ...]

    @property
    def worst(self) -> CombinedLayer:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def __str__(self) -> str:
        weights = ", ".join(f"{name}: {weight:g}" for name, weight in self.weights.items())
        rows = [("layer", "rank", "dtype", "relative error")]
        worst = sorted(self.layers, key=lambda layer: -layer.error)
        for layer in worst[:_SHOWN]:
            rows.append((layer.name, str(layer.rank), name_of(layer.dtype), f"{layer.error:.3g}"))
        if len(worst) > _SHOWN:
            rows.append((f"and {len(worst) - _SHOWN} more", "", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.kind} of {weights} -> {self.directory}", *lines])


def combine(
    adapters: Mapping[str, str | os.PathLike],
    weights: Mapping[str, float] | Sequence[float],
    kind: str = "linear",
    *,
    output: str | os.PathLike,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combination:
    """Write the weighted combination of `adapters` (name -> directory in Hugging Face PEFT's format) into the directory
    `output`, in the same format; the kinds are told in :mod:`peftops.methods.deltas`.

    weights: by name, or in the order of `adapters`; negative ones subtract, an adapter of weight 0 takes no part.
    rank: largest rank to store, for every kind but "cat". density: share of the entries to keep, in (0, 1], for "ties"
        (default 0.2), "dare" and "dare_ties" (0.1). seed: of DARE's drops.

    A layer that an adapter lacks counts as zero there. Factors have the widest dtype of the inputs, dropout is that of
    the first adapter. After TIES and DARE a delta has full rank: look at the errors in the report; a higher density or
    rank lowers them. What a file holds whole, trained biases and `modules_to_save`, is averaged with the weights,
    whatever the kind; that is the combination of the changes where the weights of the adapters that hold it sum to 1,
    and refused where they do not, for the base's values are in no file.

    Raises ValueError, naming argument, adapter or tensor, for a value out of range, adapters that do not fit each other
    (shapes, kinds of layers, bias modes, recorded bases), unsupported features, values that are not finite, and grouped
    convolutions; what reading and writing raise. Nothing is written then.
    """
    kind = "dare" if kind == "dare_linear" else kind
    if kind not in KINDS:
        raise ValueError(f"combine: kind is {kind!r}, but it must be one of {', '.join(map(repr, KINDS))}")
    density = _check_options(kind, rank, density)
    named = _check_weights(adapters, weights)
    sources = [_read(name, directory, named[name]) for name, directory in adapters.items()]
    sources = [source for source in sources if source.weight] or [source.without_whole() for source in sources]
    _check_together(sources)
    generator = torch.Generator().manual_seed(seed)
    tensors, layers, report = {}, {}, []
    paths = sorted({path for source in sources for path in source.layers})
    for path in progress(paths, "combine"):
        terms = [source.term(path) for source in sources if path in source.layers]
        stored, error = combined(terms, kind, rank, density, generator)
        layers[path] = stored.a.shape[0], stored.scale * stored.a.shape[0]
        tensors.update(_tensors_of(path, stored, any(source.method.lora_bias for source in sources)))
        report.append(CombinedLayer(path, stored.a.shape[0], stored.a.dtype, error))
    tensors.update(_whole(sources))
    infinite = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if infinite:
        raise ValueError(f"combine: {infinite[0]} would not be finite in {tensors[infinite[0]].dtype}")
    save_adapter(output, _config(sources, layers), tensors)
    return Combination(kind, named, os.fspath(output), tuple(report))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_options(kind: str, rank: int | None, density: float | None) -> float | None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"combine: rank is {rank!r}, but it must be an integer of at least 1")
    if rank is not None and kind == "cat":
        raise ValueError('combine: rank is given, but the rank of "cat" is the sum of the ranks; use "linear" or "svd"')
    if density is None:
        return DENSITY.get(kind)
    if kind not in DENSITY:
        raise ValueError(f"combine: density is given, but {kind!r} drops nothing")
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"combine: density is {density!r}, but it must be in (0, 1]")
    return float(density)


def _check_weights(adapters: Mapping[str, object], weights: Mapping[str, float] | Sequence[float]) -> dict[str, float]:
    if not isinstance(adapters, Mapping) or not adapters:
        raise ValueError(f"combine: adapters is {adapters!r}, but it must map names to directories")
    if isinstance(weights, Mapping):
        if weights.keys() != adapters.keys():
            raise ValueError(f"combine: weights names {sorted(weights)}, but adapters has {sorted(adapters)}")
    elif not isinstance(weights, Sequence) or len(weights) != len(adapters):
        raise ValueError(f"combine: weights is {weights!r}, but it must hold {len(adapters)} numbers")
    else:
        weights = dict(zip(adapters, weights, strict=True))
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ValueError(f"combine: the weight of {name!r} is {weight!r}, but it must be a finite number")
    return {name: float(weights[name]) for name in adapters}


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One adapter. whole: tensors of the file that replace the model's own; copied: those of them that are copies of
    the base's embeddings.
    """

    name: str
    weight: float
    method: LoRA
    config: dict
    layers: dict[str, Layer]
    whole: dict[str, Tensor]
    copied: dict[str, Tensor]

    def term(self, path: str) -> Layer:
        layer = self.layers[path]
        return layer._replace(scale=self.weight * layer.scale)

    def without_whole(self) -> _Source:
        """The adapter where nothing takes part: only its zero deltas."""
        config = {**self.config, "bias": "none", "modules_to_save": None}
        return _Source(self.name, self.weight, self.method, config, self.layers, {}, self.copied)

    @property
    def choice(self) -> tuple:
        """What decides which layers are adapted, without the order of names."""
        values = [getattr(self.method.choice, key) for key in _CHOICE]
        return tuple(frozenset(value) if isinstance(value, tuple) else value for value in values)

    @property
    def known(self) -> set[str]:
        """The layers over which the fingerprint of the base was taken."""
        return {path for path in self.layers if f"{PREFIX}{path}.base_layer.weight" not in self.copied}


def _read(name: str, directory: str | os.PathLike, weight: float) -> _Source:
    where = f"combine: {name!r} ({os.fspath(directory)})"
    config, tensors = load_adapter(directory)
    peft_config.refuse_unsupported(config, where)
    try:
        method = peft_config.read_method(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if config.get("init_lora_weights") in ("pissa", "olora"):
        raise ValueError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, so it fits another base weight; load it "
            "with peftops.load and save it again, which writes the adapter for the original one"
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}: {key} holds values that are not finite")
    factors: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(?:(.*)\.)?lora_(embedding_)?([AB])(\.weight|\.bias)?", key)
        if match is None:
            rest[key] = tensor
        else:
            path, embedding, factor, ending = match.groups()
            part = "bias" if ending == ".bias" else factor
            factors.setdefault(path or "", {"embedding": embedding is not None})[part] = tensor
    unknown = next((key for key in rest if ".lora_" in key), None)
    if unknown is not None:
        raise ValueError(f"{where}: {unknown} is not supported")
    layers = {path: _layer(where, path, parts, method) for path, parts in factors.items()}
    if not layers:
        raise ValueError(f"{where} holds no LoRA factors")
    # Before PEFT 0.6 an adapted layer held its weight and bias itself.
    old = {f"{PREFIX}{path}.{key}": f"{PREFIX}{path}.base_layer.{key}" for path in layers for key in ("weight", "bias")}
    rest = {old.get(key, key): tensor for key, tensor in rest.items()}
    saved = tuple(f".{name}." for name in method.modules_to_save or ())
    copied = {
        key: tensor
        for key, tensor in rest.items()
        if not any(name in f".{key}." for name in saved) and not key.endswith(".bias")
    }
    whole = {key: tensor for key, tensor in rest.items() if key not in copied}
    return _Source(name, weight, method, config, layers, whole, copied)


def _layer(where: str, path: str, parts: dict, method: LoRA) -> Layer:
    if "A" not in parts or "B" not in parts:
        raise ValueError(f"{where}: {path} has only one of its factors A and B")
    a, b = parts["A"], parts["B"]
    adapter = method.adapter_of(path)
    if a.dim() < 2 or b.dim() < 2 or a.shape[0] != adapter.rank:
        raise ValueError(f"{where}: {path} has A {list(a.shape)}, but its rank is {adapter.rank}")
    if b.shape[1] != adapter.rank:
        grouped = " (a convolution with groups, which cannot be combined)" if b.dim() > 2 else ""
        raise ValueError(f"{where}: {path} has B {list(b.shape)}, but its rank is {adapter.rank}{grouped}")
    return Layer(a, b, parts.get("bias"), adapter.scaling, parts["embedding"])


def _check_together(sources: list[_Source]) -> None:
    """Raise ValueError where the adapters do not fit each other."""
    modes = {source.name: source.config.get("bias") or "none" for source in sources}
    if len(set(modes.values())) > 1:
        raise ValueError(
            "combine: bias must be the same, but is " + ", ".join(f"{m!r} in {n!r}" for n, m in modes.items())
        )
    embedding = next((path for source in sources for path, layer in source.layers.items() if layer.embedding), None)
    with_bias = next((source.name for source in sources if source.method.lora_bias), None)
    if embedding is not None and with_bias is not None:
        raise ValueError(f"combine: {with_bias!r} has lora_bias, which cannot stand beside an embedding, {embedding}")
    seen: dict[str, _Source] = {}
    problems = []
    for source in sources:
        for path, layer in source.layers.items():
            known = seen.setdefault(path, source)
            kinds = _kind(known.layers[path]), _kind(layer)
            if kinds[0] != kinds[1]:
                problems.append(f"{path} is {kinds[0]} in {known.name!r}, {kinds[1]} in {source.name!r}")
    if problems:
        raise ValueError(f"combine: the layers do not fit ({len(problems)}): " + "; ".join(problems[:8]))
    for index, other in enumerate(sources):
        for one in sources[:index]:
            _check_bases(one, other)


def _check_bases(one: _Source, other: _Source) -> None:
    marks = one.config.get(FINGERPRINT), other.config.get(FINGERPRINT)
    if None not in marks and one.known == other.known and marks[0] != marks[1]:
        raise ValueError(f"combine: {one.name!r} and {other.name!r} were trained on different base models")
    for key in one.copied.keys() & other.copied.keys():
        if not torch.equal(one.copied[key], other.copied[key]):
            raise ValueError(
                f"combine: {key}, a weight of the base that the files hold, differs in {one.name!r} and {other.name!r}"
            )


def _kind(layer: Layer) -> str:
    kind = "an embedding" if layer.embedding else "a convolution" if layer.a.dim() > 2 else "a linear layer"
    return f"{kind} {list(layer.a.shape[1:])} -> {layer.b.shape[0]}"


# ---- writing ---------------------------------------------------------------------------------------------------------


def _tensors_of(path: str, layer: Layer, with_bias: bool) -> dict[str, Tensor]:
    a, b = ("lora_embedding_A", "lora_embedding_B") if layer.embedding else ("lora_A.weight", "lora_B.weight")
    start = f"{PREFIX}{path}." if path else PREFIX
    found = {start + a: layer.a, start + b: layer.b}
    if with_bias:
        bias = torch.zeros(layer.b.shape[0], dtype=layer.b.dtype) if layer.bias is None else layer.bias
        found[f"{start}lora_B.bias"] = bias
    return found


def _whole(sources: list[_Source]) -> dict[str, Tensor]:
    found = {key: tensor for source in sources for key, tensor in source.copied.items()}
    for key in sorted({key for source in sources for key in source.whole}):
        holders = [source for source in sources if key in source.whole]
        values = [source.whole[key] for source in holders]
        if any(value.shape != values[0].shape for value in values):
            shapes = ", ".join(f"{list(value.shape)} in {s.name!r}" for value, s in zip(values, holders, strict=True))
            raise ValueError(f"combine: {key} has different shapes: {shapes}")
        if all(torch.equal(value, values[0]) for value in values) and not values[0].is_floating_point():
            found[key] = values[0]
            continue
        total = sum(source.weight for source in holders)
        if not values[0].is_floating_point() or abs(total - 1) > 1e-6:
            raise ValueError(
                f"combine: {key} is stored whole in {', '.join(repr(s.name) for s in holders)}, whose weights sum to "
                f"{total:g}; they must sum to 1, for the base's own values are in no file"
            )
        dtype = values[0].dtype
        for value in values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
        average = sum(source.weight * value.double() for source, value in zip(holders, values, strict=True))
        found[key] = average.to(dtype)
    return found


def _config(sources: list[_Source], layers: dict[str, tuple[int, float]]) -> dict:
    """layers: full name -> rank and alpha."""
    ranks, alphas = ({name: pair[i] for name, pair in layers.items()} for i in (0, 1))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **peft_config.DEFAULTS,
        **{key: _common(sources, key) for key in ("base_model_name_or_path", "revision", "task_type")},
        "alpha_pattern": peft_config.written_pattern({}, alpha, alphas),
        "bias": sources[0].config.get("bias") or "none",
        "fan_in_fan_out": any(source.config.get("fan_in_fan_out") for source in sources),
        "lora_alpha": alpha,
        "lora_bias": any(source.method.lora_bias for source in sources),
        "lora_dropout": sources[0].method.dropout,
        "modules_to_save": sorted({n for s in sources for n in s.config.get("modules_to_save") or ()}) or None,
        "r": rank,
        "rank_pattern": peft_config.written_pattern({}, rank, ranks),
        "target_modules": list(layers),
        "use_rslora": False,
    }
    first = sources[0]
    if all(source.layers.keys() == first.layers.keys() and source.choice == first.choice for source in sources):
        config.update({key: first.config.get(key) for key in _CHOICE})
    if all(source.known == first.known and source.config.get(FINGERPRINT) for source in sources):
        config[FINGERPRINT] = first.config[FINGERPRINT]
    return config


def _common(sources: list[_Source], key: str) -> object:
    """The value that the adapters share; None where they do not."""
    values = {source.name: source.config.get(key) for source in sources if source.config.get(key) is not None}
    if len(set(values.values())) > 1 and key == "base_model_name_or_path":
        named = ", ".join(f"{name!r}: {value!r}" for name, value in values.items())
        warnings.warn(f"combine: the adapters name different base models ({named})", stacklevel=4)
    return next(iter(values.values())) if len(set(values.values())) == 1 else None
