"""LoRA as a method: its hyperparameters, and what they mean for the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..nn.adapter import Adapter, Factors, factor_dtype
from ..nn.lora import lora_class
from .targets import Choice, check_pattern, find_modules, find_targets, first_match, module_names, names

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adaptation (Hu et al., "LoRA", ICLR 2022); reparametrized: the trained update folds back into the
    weight.

    y = x W^T + bias + s drop(x) A^T B^T with s = alpha / rank, W frozen, A [rank, in_features], B [out_features, rank]
    = 0 at the start (equation 3). Names are matched and defaults chosen as in Hugging Face PEFT.

    rank: r of every adapted layer.
    alpha: numerator of s.
    dropout: p of the dropout on the adapter's input, in [0, 1).
    target_modules: layer names, each exact or a suffix after a dot; or one regular expression for the full name; or
        "all-linear" (also what None means): every `nn.Linear` and transformers' `Conv1D` but the output embedding and a
        classification head. `nn.Embedding` and `nn.Conv1d/2d/3d` have to be named.
    exclude_modules: layer names, or one regular expression, that are left out whatever `target_modules` says.
    layers_to_transform: numbers of the blocks to adapt, or one number: of a layer's name the first part that is all
        digits. layers_pattern: names of the list of blocks, such as "layers", where that number is another one.
    rank_pattern, alpha_pattern: name -> rank or alpha of single layers. A name is a regular expression for the full
        name or a suffix of it after a dot; the first that fits counts.
    use_rslora: s = alpha / sqrt(rank) (Kalajdzievski, "rsLoRA", 2023).
    bias: "none"; "all": every bias of the model is trained as well; "lora_only": those of the adapted layers.
    lora_bias: B has a trained bias of its own, which is scaled by s as well.
    init: how the factors start, see :mod:`peftops.nn.inits`: "kaiming", "gaussian", "orthogonal", or, with another base
        weight under them, "pissa", "pissa_niter_<k>" and "olora", or a callable.
    adapter_dtype: None = the base weight's dtype; torch.float32 = float32 factors also over a 16-bit base.
    modules_to_save: modules (every one whose name ends in one of these) that are trained whole and saved with the
        adapter, such as a new classification head.

    Raises ValueError, naming the argument, for a value out of range.
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    init: str | Callable = "kaiming"
    adapter_dtype: torch.dtype | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        choice = self.choice
        for argument in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            object.__setattr__(self, argument, getattr(choice, argument))
        if self.modules_to_save is not None:
            object.__setattr__(self, "modules_to_save", names("modules_to_save", self.modules_to_save))
        if self.bias not in BIASES:
            raise ValueError(f"bias is {self.bias!r}, but it must be one of {', '.join(map(repr, BIASES))}")
        for argument in ("use_rslora", "lora_bias"):
            if not isinstance(getattr(self, argument), bool):
                raise ValueError(f"{argument} is {getattr(self, argument)!r}, but it must be True or False")
        if self.adapter_dtype is not None and not isinstance(self.adapter_dtype, torch.dtype):
            raise ValueError(f"adapter_dtype is {self.adapter_dtype!r}, but it must be a torch.dtype or None")
        self.adapter(self.rank, self.alpha)
        for argument, check in (
            ("rank_pattern", lambda value: self.adapter(value, self.alpha)),
            ("alpha_pattern", lambda value: self.adapter(self.rank, value)),
        ):
            object.__setattr__(self, argument, _patterns(argument, getattr(self, argument), check))

    @property
    def choice(self) -> Choice:
        """Which layers are adapted, as far as names decide it."""
        return Choice(self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern)

    def adapter(self, rank: int, alpha: float) -> Adapter:
        """The hyperparameters of one layer."""
        return Adapter(rank, alpha, self.dropout, self.use_rslora, self.init, self.adapter_dtype, self.lora_bias)

    def adapter_of(self, name: str) -> Adapter:
        """The hyperparameters of the layer of this full name."""
        rank, alpha = first_match(self.rank_pattern, name), first_match(self.alpha_pattern, name)
        return self.adapter(
            self.rank if rank is None else self.rank_pattern[rank],
            self.alpha if alpha is None else self.alpha_pattern[alpha],
        )


def _patterns(argument: str, patterns: object, check: Callable) -> dict:
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{argument} is {patterns!r}, but it must be a dictionary")
    for pattern, value in patterns.items():
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"{argument} has the key {pattern!r}, but it must be a name or a regular expression")
        check_pattern(argument, pattern)
        try:
            check(value)
        except ValueError as error:
            raise ValueError(f"{argument}, {pattern!r}: {error}") from None
    return dict(patterns)


@dataclass(frozen=True)
class Plan:
    """What LoRA will do to a model, checked and not yet done; everything by full name.

    layers: -> hyperparameters of the adapter; skipped: -> reason; saved: -> module that is trained whole; trained: ->
    bias that is trained outside of those; factors: -> values from a file; replaced: -> parameter outside of the
    factors that gets a value from the file and is not trained.
    """

    layers: dict[str, Adapter]
    skipped: dict[str, str]
    saved: dict[str, nn.Module]
    trained: dict[str, nn.Parameter]
    factors: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)


def plan(model: nn.Module, method: LoRA) -> Plan:
    """The plan of a new adapter.

    Raises what :func:`find_targets` and :func:`find_modules` raise, and ValueError for a layer that cannot have its
    adapter, and for a pattern or an excluded name that fits nothing.
    """
    saved = find_modules(model, method.modules_to_save or ())
    targets = find_targets(model, method.choice, tuple(saved))
    layers = {name: method.adapter_of(name) for name in targets.layers}
    for argument in ("rank_pattern", "alpha_pattern"):
        unused = unused_patterns(getattr(method, argument), layers)
        if unused:
            raise ValueError(f"{argument} has {', '.join(map(repr, unused))}, which fits no adapted layer")
    if method.exclude_modules and not any(method.choice.excludes(name) for name, _ in model.named_modules()):
        raise ValueError(f"exclude_modules is {method.exclude_modules!r}, which fits no module")
    for name, layer in targets.layers.items():
        check_layer(name, layer, layers[name])
    trained = find_biases(model, method.bias, targets.layers, tuple(saved))
    return Plan(layers, targets.skipped, saved, trained)


def unused_patterns(patterns: Mapping[str, object], layers: Iterable[str]) -> list[str]:
    """The patterns that fit none of the layers."""
    return [pattern for pattern in patterns if not any(first_match([pattern], name) for name in layers)]


def check_layer(name: str, layer: nn.Module, adapter: Adapter) -> None:
    """Raise ValueError, naming the layer, where it cannot have this adapter."""
    reason = lora_class(layer)._why_not(layer, adapter)
    if reason is None:
        try:
            factor_dtype(layer.weight.dtype, adapter.adapter_dtype)
        except ValueError as error:
            reason = str(error)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")


def find_biases(
    model: nn.Module, bias: str, layers: Mapping[str, nn.Module], saved: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The biases that are trained beside the factors, by full name; those inside `saved` are trained anyway.

    "all" means every parameter that is called `bias`, PEFT's rule.
    """
    if bias == "none":
        return {}
    found = {}
    everywhere = ((name, model.get_submodule(name)) for name in module_names(model))
    for name, module in everywhere if bias == "all" else layers.items():
        parameter = module._parameters.get("bias")
        inside = any(name == path or name.startswith(f"{path}.") for path in saved)
        if parameter is not None and parameter.is_floating_point() and not inside:
            found[f"{name}.bias" if name else "bias"] = parameter
    return found
