"""Hugging Face PEFT models on the fused operator, in one line:

    from peftops.integrations import hf_peft

    model = peft.get_peft_model(base, peft.LoraConfig(...))
    hf_peft.accelerate(model)       # how many layers now run on peftops.ops.lora_linear
    hf_peft.accelerate(model, share_inputs=True)  # and q, k and v, gate and up in one call of it
    print(hf_peft.coverage(model))  # every LoRA layer, and why it was left alone
    hf_peft.undo(model)             # PEFT's own classes again

`accelerate` changes the class of PEFT's loaded LoRA layers and nothing else: parameters, names, optimizers, files,
merging, adding, activating and deleting adapters stay PEFT's. Works with `PeftModel`, with transformers models that
`add_adapter` or `load_adapter` gave adapters, and with what `inject_adapter_in_model` made.

What differs from PEFT: rounding (the operator does not copy x to float32, and rounds for itself), the random numbers
of dropout (one seed per layer and call from torch's generator, and a mask of Philox bits), and double backward, which
the operator refuses with an error. The package `peft` is imported when a function is called.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from ..nn import sharing


def accelerate(model: nn.Module, share_inputs: bool = False) -> int:
    """Put the LoRA layers of a PEFT model on the fused operator, in place; returns how many were.

    Call it again after adapters with new target modules were added; layers that are fused already stay so. Layers that
    cannot be fused stay as they are (:func:`coverage` names the reasons), and a fused layer hands every call that the
    operator cannot take to PEFT's own forward.

    share_inputs: whether projections that read the same input (q, k and v; gate and up) are computed in one operator
        call, see :mod:`peftops.nn.sharing`; the last call counts.

    Raises TypeError where `model` is no module, ValueError where it holds no LoRA layer of PEFT's, ImportError without
    the package `peft`.
    """
    fused = _linear().FusedLinear
    layers = _lora_layers(model, "accelerate")
    swapped = [layer for name, layer in layers.items() if _left_alone(name, layer, layers) is None]
    swapped = [layer for layer in swapped if type(layer) is not fused]
    for layer in swapped:
        fused.take_over(layer)
    if share_inputs:
        sharing.share_inputs(model, fused)
    else:
        sharing.unshare_inputs(model)
    return len(swapped)


def undo(model: nn.Module) -> int:
    """Give every layer that :func:`accelerate` changed its own class back, in place; returns how many there were.

    Raises TypeError where `model` is no module, ImportError without the package `peft`.
    """
    fused = _linear().FusedLinear
    _check_module(model, "undo")
    layers = [module for module in model.modules() if type(module) is fused]
    for layer in layers:
        layer.give_back()
    return len(layers)


def register(config) -> None:
    """Let every layer that PEFT makes for this `LoraConfig` be a fused one from the start, where it can be.

    config: the `peft.LoraConfig` that `get_peft_model`, `add_adapter` or `inject_adapter_in_model` is called with
        next. PEFT stores no such mapping in its files: after `PeftModel.from_pretrained`, call :func:`accelerate`.

    Subclasses of `nn.Linear`, such as bitsandbytes' quantised layers, go PEFT's own way.

    Raises TypeError for another kind of config, ImportError without the package `peft`.
    """
    _linear()
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise TypeError(f"register: config is a {type(config).__name__}, but it must be a peft.LoraConfig")
    make = functools.partial(_new_layer, config)
    config._register_custom_module({nn.Linear: make, Conv1D: make})


# ---- coverage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What happens in one layer of PEFT's.

    name: its name in the model. kind: its class and its base layer's. fused: whether a plain call now goes to the
    operator. reason: why not, or None. adapters: each adapter of the layer with the reason why PEFT computes it itself,
    or None. active: the names of those that are active.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    adapters: dict[str, str | None]
    active: tuple[str, ...]

    def __str__(self) -> str:
        parts = [self.reason] if self.reason else []
        parts += [f"{name}: {why}" for name, why in self.adapters.items() if why and not self._is_layers(why)]
        return f"{'fused' if self.fused else 'PEFT':6}{self.name} ({self.kind})" + (
            f": {'; '.join(parts)}" if parts else ""
        )

    def _is_layers(self, why: str) -> bool:
        return self.reason is not None and self.reason.endswith(why)


@dataclass(frozen=True)
class Coverage:
    """Every layer of PEFT's in a model; printed, one line each."""

    layers: tuple[Layer, ...]

    @property
    def fused(self) -> int:
        """How many layers run on the operator."""
        return sum(layer.fused for layer in self.layers)

    @property
    def left(self) -> int:
        """How many are PEFT's own."""
        return len(self.layers) - self.fused

    def __str__(self) -> str:
        head = f"{self.fused} of {len(self.layers)} PEFT layers run on peftops"
        return "\n".join([head, *map(str, self.layers)])


def coverage(model: nn.Module) -> Coverage:
    """Every layer of PEFT's in `model`, whether it is fused, and the reason where it is left alone.

    It describes a plain call as the model is now: input of the weight's dtype, no autocast.

    Raises TypeError where `model` is no module, ValueError where it holds no layer of PEFT's, ImportError without the
    package `peft`.
    """
    layers = _tuner_layers(model, "coverage")
    if not layers:
        raise ValueError(f"coverage: {_nothing(model)}")
    return Coverage(tuple(_described(name, layer, layers) for name, layer in layers.items()))


def _described(name: str, layer: nn.Module, layers: dict[str, nn.Module]) -> Layer:
    linear = _linear()
    base = layer.get_base_layer()
    kind = f"{type(layer).__name__} over {type(base).__name__}"
    active = tuple(layer.active_adapters)
    why = _left_alone(name, layer, layers)
    if why is not None:
        return Layer(name, kind, False, why, {a: why for a in sorted(layer._get_available_adapters())}, active)
    dtype = base.weight.dtype
    adapters = {a: linear.adapter_obstacle(layer, a, dtype, at_rest=True) for a in layer.lora_A}
    why = _not_now(layer, adapters)
    return Layer(name, kind, why is None, why, adapters, active)


def _not_now(layer: nn.Module, adapters: dict[str, str | None]) -> str | None:
    """Why a layer that can be fused computes nothing with the operator as it is now."""
    linear = _linear()
    if type(layer) is not linear.FusedLinear:
        return "not swapped yet: call accelerate(model)"
    if layer.merged_adapters:
        return f"the weight holds the merged {', '.join(layer.merged_adapters)}: only the base layer runs"
    if layer.disable_adapters:
        return "its adapters are disabled: only the base layer runs"
    if layer._device_obstacle is not None:
        return layer._device_obstacle
    active = layer._active()
    if not active:
        return "none of its adapters is active: only the base layer runs"
    for name in active:
        if adapters[name] is not None:
            return f"{name}: {adapters[name]}"
        if len(active) > 1 and layer._dropout(name) > 0:
            return "several active adapters draw a dropout mask each"
    return None


# ---- layers of PEFT's ------------------------------------------------------------------------------------------------

# Why PEFT's other LoRA layers stay as they are, by their class.
_KINDS = {
    "Embedding": "embeddings have no fused kernel",
    "Conv1d": "convolutions have no fused kernel",
    "Conv2d": "convolutions have no fused kernel",
    "Conv3d": "convolutions have no fused kernel",
    "MultiheadAttention": "nn.MultiheadAttention reads the merged weight and calls no linear layer",
    "ParamWrapper": "target_parameters: the adapter is on a bare parameter",
}
# Modules of peft.tuners.lora that hold layers over quantised ones.
_QUANTISED = ("aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "torchao")


def _left_alone(name: str, layer: nn.Module, layers: dict[str, nn.Module]) -> str | None:
    """Why a layer cannot change its class; None where it can, or has."""
    linear = _linear()
    if type(layer) not in (linear.Linear, linear.FusedLinear):
        return _other_kind(layer)
    if any(name.startswith(f"{outer}.") for outer, module in layers.items() if _never_calls_inner(module)):
        return "the nn.MultiheadAttention around it never calls it"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by offloading hooks, for example)"
    return linear.base_obstacle(layer.base_layer, at_rest=True)


def _never_calls_inner(module: nn.Module) -> bool:
    return type(module).__name__ == "MultiheadAttention"


def _other_kind(layer: nn.Module) -> str:
    module, kind = type(layer).__module__.split("."), type(layer).__name__
    if module[:2] == ["peft", "tuners"] and module[2] != "lora":
        return f"{module[2]} is another method than LoRA"
    if module[-1] in _QUANTISED:
        return f"its base layer is quantised ({module[-1]})"
    return _KINDS.get(kind, f"{kind} is not exactly PEFT's lora.Linear")


def _check_module(model: object, call: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{call}: model is a {type(model).__name__}, but it must be a module with PEFT's layers "
            "(a PeftModel, or a model after add_adapter, load_adapter or inject_adapter_in_model)"
        )


def _tuner_layers(model: nn.Module, call: str) -> dict[str, nn.Module]:
    """Every layer of PEFT's by its name in the model."""
    _linear()
    _check_module(model, call)
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _lora_layers(model: nn.Module, call: str) -> dict[str, nn.Module]:
    from_peft = _tuner_layers(model, call)
    from peft.tuners.lora.layer import LoraLayer

    found = {name: layer for name, layer in from_peft.items() if isinstance(layer, LoraLayer)}
    if not found:
        others = sorted({_other_kind(layer) for layer in from_peft.values()})
        raise ValueError(f"{call}: {_nothing(model)}" + (f" ({'; '.join(others)})" if others else ""))
    return found


def _nothing(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no LoRA layer of Hugging Face PEFT, but it must have gone through get_peft_model, "
        "add_adapter, load_adapter or inject_adapter_in_model with a LoraConfig before"
    )


def _new_layer(registered, target: nn.Module, adapter_name: str, **kwargs) -> nn.Module | None:
    """What PEFT's dispatcher calls for a registered class: a fused layer, or None for "ask the next dispatcher"."""
    linear = _linear()
    from peft.tuners.lora.layer import dispatch_default

    if kwargs.get("parameter_name") is not None or linear.base_obstacle(target) is not None:
        return None
    config = kwargs.pop("config", registered)  # older releases pass none
    return linear.FusedLinear.take_over(dispatch_default(target, adapter_name, config, **kwargs))


@functools.cache
def _linear():
    """The module with the layer, which needs peft."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError("peftops.integrations.hf_peft needs peft: pip install 'peftops[peft]'") from error
    from . import hf_peft_linear

    return hf_peft_linear
