"""What a tuning asks of a model before it changes it, and the names of its parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from ..nn.grouped import GroupedLike
from ..nn.lora import LoRALayer


def plain_model(model: nn.Module, action: str) -> nn.Module:
    """The module under torch.compile's wrapper, checked to carry no adapter yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{action}: model is a {type(model).__name__}, but it must be a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)
    check_not_fully_sharded(model, action)
    present = [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    if present:
        raise RuntimeError(
            f"{action}: the model carries an adapter already ({present[0]}, ...); add() puts another one beside it, "
            "detach() takes it out"
        )
    if any(isinstance(module, GroupedLike) for module in model.modules()):
        raise RuntimeError(f"{action}: the model serves the adapters of a MultiLoRA; detach() takes them out")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise RuntimeError(
            f"{action}: the model carries Hugging Face PEFT adapters; merge or unload them first, or use "
            "peftops.integrations.hf_peft.accelerate"
        )
    return model


def check_not_fully_sharded(model: nn.Module, action: str) -> None:
    """Raise RuntimeError under FSDP2, which would neither shard new factors nor sum their gradients."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise RuntimeError(
            f"{action}: not possible once fully_shard has taken the model; put all adapters in before it"
        )


def all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def check_not_tied(model: nn.Module, saved: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where a module that is to be trained whole shares a parameter with another one."""
    owners = _owners(model) if saved else {}
    for path, module in saved.items():
        for name, parameter in module.named_parameters():
            others = [other for other in owners[id(parameter)] if not other.startswith(f"{path}.")]
            if others:
                raise ValueError(
                    f"modules_to_save: {path}.{name} is tied to {', '.join(others)}, which would be trained with it"
                )


def check_own_weights(model: nn.Module, paths: Iterable[str], action: str) -> None:
    """Raise RuntimeError where a layer shares its weight with another module, which would change with it."""
    owners = _owners(model)
    for path in paths:
        weight = model.get_submodule(path).weight
        others = [other for other in owners[id(weight)] if other != (f"{path}.weight" if path else "weight")]
        if others:
            raise RuntimeError(
                f"{action}: {path}.weight is tied to {', '.join(others)}, which would change with it; give {path} a "
                "weight of its own before attaching (in transformers: tie_word_embeddings=False)"
            )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> full names under which modules hold it; a module that has several names counts once."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return found
