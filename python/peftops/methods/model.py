"""What a tuning asks of a model before it changes it, and the names of its parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from torch import nn

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


def owners(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Full names under which modules hold `parameter`; a module that has several names counts once."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, value in module._parameters.items()
        if value is parameter
    ]


def check_not_tied(model: nn.Module, saved: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where a module that is to be trained whole shares a parameter with another one."""
    for path, module in saved.items():
        for name, parameter in module.named_parameters():
            others = [other for other in owners(model, parameter) if not other.startswith(f"{path}.")]
            if others:
                raise ValueError(
                    f"modules_to_save: {path}.{name} is tied to {', '.join(others)}, which would be trained with it"
                )
