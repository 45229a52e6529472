"""Which layers of a model a method changes: Hugging Face PEFT's rules for `target_modules` and `modules_to_save`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..nn.lora import lora_class, why_not

ALL_LINEAR = "all-linear"
# The names that PEFT takes for the head of a sequence classification model, the first one found counts.
_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Targets:
    """layers: full name -> layer to adapt, in the model's order. skipped: full name -> the reason why it was left
    alone.
    """

    layers: dict[str, nn.Module]
    skipped: dict[str, str]


def find_targets(model: nn.Module, target_modules: Sequence[str] | str | None, saved: Sequence[str] = ()) -> Targets:
    """The layers that `target_modules` chooses.

    target_modules: names, each exact or a suffix after a dot; a regular expression for the full name; "all-linear" or
        None for every `nn.Linear` and `Conv1D` but the output embedding and the head of a sequence classification
        model.
    saved: full names of modules that are trained whole; what lies inside them is neither adapted nor called skipped.

    Raises ValueError where nothing matches, listing what there is, TypeError where a chosen layer cannot be adapted.
    """
    choose_all = target_modules is None or (isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR)
    heads = _output_modules(model) if choose_all else {}
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if not (_is_linear_like(module) if choose_all else _matches(name, target_modules)):
            continue
        reason = why_not(module) or _read_by_parent(model, name)
        if any(name == path or name.startswith(f"{path}.") for path in saved):
            continue
        if name in heads:
            skipped[name] = heads[name]
        elif reason is None:
            layers[name] = module
        elif choose_all:
            skipped[name] = reason
        else:
            refused[name] = reason
    if refused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise TypeError(f"target_modules {target_modules!r} chooses layers that cannot be adapted: {reasons}")
    if not layers:
        raise ValueError(_nothing_found(model, target_modules, skipped))
    return Targets(layers, skipped)


def find_modules(model: nn.Module, names: Sequence[str], strict: bool = True) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names, each name exact or a suffix after a dot, full name -> module.

    Raises ValueError for a name that matches nothing (unless strict is False) or a module without parameters.
    """
    found: dict[str, nn.Module] = {}
    for wanted in names:
        matches = {name: module for name, module in model.named_modules() if name and _matches(name, [wanted])}
        if not matches and strict:
            top = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"modules_to_save names {wanted!r}, which matches no module; at the top there are: {top}")
        for name, module in matches.items():
            if next(module.parameters(), None) is None:
                raise ValueError(f"modules_to_save names {wanted!r}, but {name} has no parameters to train")
        found.update(matches)
    inner = [name for name in found if any(name.startswith(f"{outer}.") for outer in found)]
    return {name: module for name, module in found.items() if name not in inner}


def _matches(name: str, target_modules: Sequence[str] | str) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _is_linear_like(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or lora_class(module) is not None:
        return True
    return "linear" in type(module).__name__.lower() and next(module.children(), None) is None


def _output_modules(model: nn.Module) -> dict[str, str]:
    """Full name -> reason, for the output embedding or else the classification head, which "all-linear" leaves
    alone.
    """
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_output_embeddings() if callable(get_output_embeddings) else None
    reason = "output embedding"
    if output is None and type(model).__name__.endswith("ForSequenceClassification"):
        output = next((head for head in (getattr(model, name, None) for name in _HEADS) if head is not None), None)
        reason = "classification head (name it in modules_to_save to train it)"
    if output is None:
        return {}
    prefix = next(name for name, module in model.named_modules() if module is output)
    return {f"{prefix}.{name}" if name else prefix: reason for name, _ in output.named_modules()}


def _read_by_parent(model: nn.Module, name: str) -> str | None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer's fast path reads its weight and would ignore an adapter"
    return None


def _nothing_found(model: nn.Module, target_modules: Sequence[str] | str | None, skipped: dict[str, str]) -> str:
    message = f"target_modules {target_modules!r} chooses no layer of {type(model).__name__}"
    if skipped:
        message += "; left alone: " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    kinds: dict[str, int] = {}
    for name, module in model.named_modules():
        if _is_linear_like(module):
            last = name.rpartition(".")[2] or type(module).__name__
            kinds[last] = kinds.get(last, 0) + 1
    there = ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items()))
    return f"{message}. Linear layers there are, by the last part of their names: {there or 'none'}"
