"""Which layers of a model a method changes: Hugging Face PEFT's rules for choosing modules by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from ..nn.linear import LinearLike
from ..nn.lora import LoRALayer, lora_class, why_not

ALL_LINEAR = "all-linear"
# The names that PEFT takes for the head of a sequence classification model, the first one found counts.
HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Choice:
    """Names of modules, by the rules of PEFT 0.21 (`check_target_module_exists`).

    target_modules: names, each exact or a suffix after a dot; or one regular expression for the full name; or
        "all-linear" (also what None means), which leaves the choice to the kind of the layer.
    exclude_modules: names or a regular expression that are left out whatever the rest says.
    layers_to_transform: numbers of the blocks to keep. The number of a block is the first part of a name that is all
        digits and comes after another part with a dot before it; with `layers_pattern`, the first number after one of
        these names, such as "layers" or "h". A name without a number is left out, one that is listed exactly is kept.

    Raises ValueError, naming the argument, for one of another form.
    """

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self):
        for argument in ("target_modules", "exclude_modules"):
            object.__setattr__(self, argument, _names_or_pattern(argument, getattr(self, argument)))
        self._check_layers()

    def _check_layers(self) -> None:
        numbers, patterns = self.layers_to_transform, self.layers_pattern
        if numbers is not None and not isinstance(numbers, int):
            if not isinstance(numbers, (list, tuple, set, frozenset)):
                raise ValueError(f"layers_to_transform is {numbers!r}, but it must be a number or a list of numbers")
            numbers = tuple(numbers)
        for number in (numbers,) if isinstance(numbers, int) else numbers or ():
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f"layers_to_transform holds {number!r}, but a block's number is 0 or more")
        patterns = names("layers_pattern", [patterns] if isinstance(patterns, str) else patterns or ())
        for pattern in patterns:
            check_pattern("layers_pattern", pattern)
        if patterns and numbers is None:
            raise ValueError(f"layers_pattern is {patterns!r}, which has no meaning without layers_to_transform")
        if numbers is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform is {numbers!r}, but target_modules is {self.target_modules!r}: with it "
                "target_modules must be a list of names, or None"
            )
        object.__setattr__(self, "layers_to_transform", numbers)
        object.__setattr__(self, "layers_pattern", patterns or None)

    @property
    def by_kind(self) -> bool:
        """Whether the layer's kind decides and not its name."""
        targets = self.target_modules
        return targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)

    def excludes(self, name: str) -> bool:
        """Whether `exclude_modules` names this module."""
        return bool(self.exclude_modules) and _matches(name, self.exclude_modules)

    def takes(self, name: str) -> bool:
        """Whether the module of this full name is chosen; by kind: whether nothing speaks against it."""
        if self.excludes(name):
            return False
        if self.by_kind:
            return self._in_block(name)
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return _matches(name, self.target_modules)
        return _matches(name, self.target_modules) and self._in_block(name)

    def _in_block(self, name: str) -> bool:
        numbers = self.layers_to_transform
        if numbers is None or numbers == ():
            return True
        patterns = [r".*?\.[^.]*"]
        if self.layers_pattern is not None:
            patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern]
        found = (re.match(rf"{pattern}\.(?P<number>\d+)\.", name) for pattern in patterns)
        match = next(filter(None, found), None)
        return match is not None and int(match["number"]) in ((numbers,) if isinstance(numbers, int) else numbers)


@dataclass(frozen=True)
class Targets:
    """layers: full name -> layer to adapt, in the model's order. skipped: full name -> the reason why it was left
    alone.
    """

    layers: dict[str, nn.Module]
    skipped: dict[str, str]


def find_targets(model: nn.Module, choice: Choice, saved: Sequence[str] = ()) -> Targets:
    """The layers that `choice` takes. A layer that carries adapters already counts as what it was before.

    By kind these are every `nn.Linear` and `Conv1D` but the output embedding and the head of a sequence classification
    model; embeddings and convolutions have to be named.

    saved: full names of modules that are trained whole; what lies inside them is neither adapted nor called skipped.

    Raises ValueError where nothing matches, listing what there is, TypeError where a layer chosen by name cannot be
    adapted.
    """
    heads = _output_modules(model) if choice.by_kind else {}
    places = _places(model)
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, module in _modules(model):
        if choice.by_kind and not _is_linear(module) or not choice.takes(name):
            continue
        if any(name == path or name.startswith(f"{path}.") for path in saved):
            continue
        reason = heads.get(name) or _why_not(model, name, module, places)
        if reason is None:
            layers[name] = module
        elif choice.by_kind:
            skipped[name] = reason
        else:
            refused[name] = reason
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise TypeError(f"target_modules {choice.target_modules!r} chooses layers that cannot be adapted: {reasons}")
    if not layers:
        raise ValueError(_nothing_found(model, choice, skipped))
    return Targets(layers, skipped)


def find_modules(model: nn.Module, wanted: Sequence[str], strict: bool = True) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, full name -> module: every one whose full name ends in one of the
    names (PEFT's rule, without a dot before it: "classifier" also means "pre_classifier"), the outermost ones.

    Raises ValueError for a name that matches nothing or a module without parameters (unless strict is False), and for a
    module that sits in several places.
    """
    places = _places(model)
    found: dict[str, nn.Module] = {}
    for ending in wanted:
        matches = {name: module for name, module in _modules(model) if name and name.endswith(ending)}
        if not matches and strict:
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save names {ending!r}, which matches no module; at the top there are: {top}")
        found.update(matches)
    outer = {name: m for name, m in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    for name, module in list(outer.items()):
        if next(module.parameters(), None) is None:
            if strict:
                raise ValueError(f"modules_to_save chooses {name}, which has no parameters to train")
            del outer[name]
        elif len(places[module]) > 1:
            raise ValueError(f"modules_to_save chooses {name}, but {_several(places[module])}")
    return outer


def module_names(model: nn.Module) -> list[str]:
    """Full names of the modules, without those that adapters brought in."""
    return [name for name, _ in _modules(model)]


def names(argument: str, values: object) -> tuple[str, ...]:
    """`values` as a tuple; ValueError, naming the argument, unless it is a list of names."""
    listed = isinstance(values, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(name, str) and name for name in values):
        raise ValueError(f"{argument} is {values!r}, but it must be a list of names")
    return tuple(values)


def check_pattern(argument: str, pattern: str) -> None:
    """Raise ValueError, naming the argument, for something that is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{argument} is {pattern!r}, which is no regular expression ({error})") from None


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of the regular expressions that fits the name or a suffix of it after a dot: PEFT's rule for
    `rank_pattern` and `alpha_pattern`.
    """
    return next((pattern for pattern in patterns if _compiled(pattern).match(name)), None)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern:
    """More of them than `re` keeps: PEFT writes a rank for every layer where an initialisation chose them."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _names_or_pattern(argument: str, value: object) -> tuple[str, ...] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        check_pattern(argument, value)
        return value
    return names(argument, value)


def _matches(name: str, choice: Sequence[str] | str) -> bool:
    if isinstance(choice, str):
        return re.fullmatch(choice, name) is not None
    return f".{name}".endswith(_endings(choice))


@lru_cache(maxsize=64)
def _endings(targets: tuple[str, ...]) -> tuple[str, ...]:
    """A file may name each of a large model's layers, to be compared with each of its modules."""
    return tuple(f".{target}" for target in targets)


def _modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules of the model without those that adapters brought into its layers."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = (f"{name}." if name else "") if isinstance(module, LoRALayer) else None
        yield name, module


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Module -> its places in other modules, one for the same module under the same parent."""
    places: dict[nn.Module, list[str]] = {model: [""]}
    for name, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append(f"{name}.{key}" if name else key)
    return places


def _several(places: Sequence[str]) -> str:
    return f"it is one module in several places ({', '.join(places)}), of which Hugging Face PEFT would change only one"


def _is_linear(module: nn.Module) -> bool:
    kind = lora_class(module)
    if isinstance(module, nn.Linear) or (kind is not None and issubclass(kind, LinearLike)):
        return True
    return "linear" in type(module).__name__.lower() and next(module.children(), None) is None


def _why_not(model: nn.Module, name: str, module: nn.Module, places: dict[nn.Module, list[str]]) -> str | None:
    reason = None if isinstance(module, LoRALayer) else why_not(module)
    if not name:
        reason = "it is the model itself, which has no name in a file; put it into an nn.Sequential"
    if reason is None and len(places[module]) > 1:
        reason = _several(places[module])
    return reason or _read_by_parent(model, name)


def _read_by_parent(model: nn.Module, name: str) -> str | None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer's fast path reads its weight and would ignore an adapter"
    return None


def _output_modules(model: nn.Module) -> dict[str, str]:
    """Full name -> reason, for the output embedding or else the classification head, which "all-linear" leaves
    alone.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_output_embeddings() if callable(get_output_embeddings) else None
    reason = "output embedding"
    if output is None and type(model).__name__.endswith("ForSequenceClassification"):
        output = next((head for head in (getattr(model, name, None) for name in HEADS) if head is not None), None)
        reason = "classification head (name it in modules_to_save to train it)"
    if output is None:
        return {}
    prefix = next(name for name, module in model.named_modules() if module is output)
    return {f"{prefix}.{name}" if name else prefix: reason for name, _ in output.named_modules()}


def _nothing_found(model: nn.Module, choice: Choice, skipped: dict[str, str]) -> str:
    message = f"target_modules {choice.target_modules!r} chooses no layer of {type(model).__name__}"
    for argument in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(choice, argument) is not None:
            message += f", with {argument} {getattr(choice, argument)!r}"
    if skipped:
        message += "; left alone: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    linear, others = _count(model, _is_linear), _count(model, lambda m: lora_class(m) is not None and not _is_linear(m))
    message += f". Linear layers there are, by the last part of their names: {linear or 'none'}"
    return message + (f"; embeddings and convolutions: {others}" if others else "")


def _count(model: nn.Module, kind: Callable[[nn.Module], bool]) -> str:
    counts: dict[str, int] = {}
    for name, module in _modules(model):
        if kind(module):
            last = name.rpartition(".")[2] or type(module).__name__
            counts[last] = counts.get(last, 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
