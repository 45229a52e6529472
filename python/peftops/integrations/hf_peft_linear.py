"""Hugging Face PEFT's LoRA linear on the fused operator; imported only where peft is there.

`FusedLinear` adds nothing to what PEFT keeps but 0-d tensors: each adapter's scale, and whether it is active. An
adapter in PEFT's own hands (parameters, optimizers, files, merging) stays there.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .._load import cuda_error
from ..nn.adapter import name_of, scalar
from ..nn.dtensor import is_dtensor
from ..nn.sharing import Member, Operands, intercepted
from ..ops import lora_linear

_PLAIN = (nn.Parameter, Tensor, FakeTensor)
_AUTOCAST = ("cpu", "cuda")
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, torch.float64, *_SIXTEEN_BITS)


# ---- what stands against the fused operator --------------------------------------------------------------------------


def base_obstacle(base: nn.Module, at_rest: bool = False) -> str | None:
    """Why the base layer has to be called as it is; None where its weight and bias say all.

    at_rest: nobody calls it now, so that FSDP2 may hold shards, for which it puts plain tensors before a call.
    """
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D:
        return f"its base layer is a {kind.__name__}, neither exactly nn.Linear nor transformers' Conv1D"
    if intercepted(base):
        return "its base layer carries hooks or a forward of its own"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if weight is None:
        return "its weight is computed from other parameters"
    if type(weight) not in _PLAIN and not (at_rest and is_dtensor(weight)):
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in _FLOATS:
        return f"its weight is {name_of(weight.dtype)}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"its bias is {name_of(bias.dtype)} beside a {name_of(weight.dtype)} weight"
    return None


def device_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the operator cannot run on `device` in `dtype`; None where it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if cuda_error() is not None:
        return cuda_error()
    if dtype == torch.float64:
        return "there are no float64 kernels for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"{device} has compute capability {major}.{minor}, below 8.0"


def adapter_obstacle(
    layer: Linear, name: str, dtype: torch.dtype, autocast: bool = False, at_rest: bool = False
) -> str | None:
    """Why PEFT itself has to compute adapter `name` over a base product of `dtype`; None where the operator can."""
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} replaces plain LoRA"
    if not _has_number(layer.scaling, name):
        return "its scaling is not a number"
    down, up, dropout = parts(layer, name)
    if type(down) is not nn.Linear or type(up) is not nn.Linear or down._parameters.get("bias") is not None:
        return "its lora_A or lora_B is no plain linear layer"
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"its dropout is a {type(dropout).__name__}"
    if type(dropout) is nn.Dropout and (dropout.inplace or not 0 <= dropout.p < 1):
        return f"its dropout has p={dropout.p:g}, inplace={dropout.inplace}"
    if intercepted(down) or intercepted(up) or intercepted(dropout):
        return "its lora_A, lora_B or lora_dropout carries hooks or a forward of its own"
    a, b = down._parameters.get("weight"), up._parameters.get("weight")
    if (type(a) not in _PLAIN or type(b) not in _PLAIN) and not (at_rest and is_dtensor(a) and is_dtensor(b)):
        return f"its factors are {type(a).__name__} and {type(b).__name__}"
    factors = a.dtype
    if b.dtype != factors:
        return f"its factors are {name_of(factors)} and {name_of(b.dtype)}"
    wide = factors == torch.float32 and dtype in _SIXTEEN_BITS
    # Under autocast the operator takes a 16-bit factor the way of x.
    if factors != dtype and not wide and not (autocast and factors in _SIXTEEN_BITS):
        return f"its factors are {name_of(factors)} over a {name_of(dtype)} product"
    return None


def parts(layer: Linear, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(lora_A, lora_B, lora_dropout) of an adapter; past nn.Module's attribute search, which takes 0.3 us each time."""
    modules = layer._modules
    return modules["lora_A"]._modules[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]


def call_obstacle(x: Tensor, weight: Tensor, autocast: bool) -> str | None:
    """Why this call's input needs PEFT's own forward; None where the operator takes it."""
    if x.device != weight.device:
        return f"the input is on {x.device}, the weight on {weight.device}"
    if autocast:
        if x.dtype not in _FLOATS or torch.float64 in (x.dtype, weight.dtype):
            return f"autocast leaves a {name_of(x.dtype)} input alone"
    elif x.dtype != weight.dtype:
        return f"the input is {name_of(x.dtype)}, the weight {name_of(weight.dtype)}"
    return None


# ---- numbers as tensors ----------------------------------------------------------------------------------------------


def _is_scale(value: object, device: torch.device) -> bool:
    """Whether the operator takes `value` as a scale; it gives none a gradient."""
    if type(value) is not Tensor or value.dim() or value.requires_grad:
        return False
    return value.dtype == torch.float32 and value.device == device


class Scaling(dict):
    """PEFT's `scaling`, adapter name -> number, that keeps each number in `tensors` as well.

    A compiled graph reads the tensor, so that a new number recompiles nothing. A changed number gets a new tensor: a
    graph that autograd recorded before may still need the old one.
    """

    def __init__(self, values: dict[str, float], device: torch.device):
        super().__init__(values)
        self.device = device
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[str, float] = {}
        self._update_tensors()

    def _update_tensors(self) -> None:
        for name in self.tensors.keys() - self.keys():
            del self.tensors[name]
        for name, value in self.items():
            if isinstance(value, (int, float)):
                if name not in self.tensors or self._numbers.get(name) != value:
                    self.tensors[name], self._numbers[name] = scalar(value, self.device), value
                continue
            self._numbers.pop(name, None)
            if _is_scale(value, self.device):  # PEFT's hot-swapping makes such tensors, and writes into them
                self.tensors[name] = value
            else:
                self.tensors.pop(name, None)

    def __reduce__(self):
        return _restored_scaling, (dict(self), self.tensors)


def _restored_scaling(values: dict[str, float], tensors: dict[str, Tensor]) -> Scaling:
    """A copied or unpickled `Scaling`, on the device that its tensors were given."""
    return Scaling(values, next((t.device for t in tensors.values()), torch.device("cpu")))


def _then_update(name: str):
    plain = getattr(dict, name)

    def method(self, *args, **kwargs):
        result = plain(self, *args, **kwargs)
        self._update_tensors()
        return result

    method.__name__ = name
    return method


for _method in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(Scaling, _method, _then_update(_method))


def _has_number(scaling: dict[str, float], name: str) -> bool:
    # Of a fused layer's the name alone is looked at: a value would be compiled into the graph.
    if isinstance(scaling, Scaling):
        return name in scaling.tensors
    return isinstance(scaling[name], (int, float)) or _is_scale(scaling[name], scaling[name].device)


# ---- the layer -------------------------------------------------------------------------------------------------------


class FusedLinear(Member, Linear):
    """PEFT's `lora.Linear`, x [..., in_features] -> [..., out_features], on :func:`peftops.ops.lora_linear`.

    Made from a loaded layer by a change of its class (:func:`peftops.integrations.hf_peft.accelerate`). A call that the
    operator cannot take, for whatever reason, is PEFT's own.
    """

    @classmethod
    def take_over(cls, layer: Linear) -> FusedLinear:
        """Change the class of `layer` in place."""
        layer.__class__ = cls
        layer._settle()
        return layer

    def give_back(self) -> Linear:
        """Make the layer PEFT's own again, in place."""
        scaling = dict(self.scaling)
        del self._gates, self._unmerges, self._device_obstacle
        self.__dict__.pop("sharing", None)
        self.__class__ = Linear
        self.scaling = scaling
        return self

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As PEFT's: adapters that are disabled or merged leave the base layer's own result, to the bit."""
        # Compiled and without gradients, every adapter is computed and what is not active has a gate of 0, so that
        # activating, disabling and merging recompile nothing. With gradients PEFT changes requires_grad anyway.
        compiling = torch.compiler.is_compiling()
        if compiling and not torch.is_grad_enabled() and not (args or kwargs or self._unmerges):
            names = list(self._modules["lora_A"]._modules)
            if names and self._obstacle(x, names, compiling) is None:
                return self._fused(x, names, gated=True)
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        names = self._active()
        if not names or self._obstacle(x, names, compiling) is not None:
            return super().forward(x)
        y = self.shared_output(x) if len(names) == 1 else None
        return self._fused(x, names, gated=False) if y is None else y

    def operands(self, x: Tensor) -> Operands | None:
        names = () if self._disable_adapters or self.merged_adapters else self._active()
        base = self._modules["base_layer"]
        if len(names) != 1 or type(base) is not nn.Linear or self._obstacle(x, names, False) is not None:
            return None
        (name,) = names
        down, up = (part._parameters for part in parts(self, name)[:2])
        if up["bias"] is not None:
            return None
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        return Operands(weight, bias, down["weight"], up["weight"], self.scaling.tensors[name], self._dropout(name))

    def _active(self) -> list[str]:
        present, active = self._modules["lora_A"]._modules, self._active_adapter
        return [name for name in ((active,) if isinstance(active, str) else active) if name in present]

    def _obstacle(self, x: Tensor, names: list[str], compiling: bool) -> str | None:
        if type(x) not in _PLAIN:
            return f"the input is a {type(x).__name__}"
        base, device = self._modules["base_layer"], x.device
        autocast = device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)
        found = base_obstacle(base) or call_obstacle(x, base._parameters["weight"], autocast)
        if found is not None:
            return found
        if self.scaling.device != device:
            self._settle()
        if self._device_obstacle is not None:
            return self._device_obstacle
        if not getattr(self, "cast_input_dtype_enabled", True):
            return "PEFT's cast of the input is switched off"
        if _has_any_global_hook():
            return "hooks on every module are registered"
        if not compiling and torch._C._are_functorch_transforms_active():
            return "a torch.func transform is active"
        dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
        for name in names:
            found = adapter_obstacle(self, name, dtype, autocast)
            if found is not None:
                return found
            if len(names) > 1 and self._dropout(name) > 0:
                return "several active adapters draw a dropout mask each"
        return None

    def _dropout(self, name: str) -> float:
        dropout = self._modules["lora_dropout"]._modules[name]
        return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0

    def _fused(self, x: Tensor, names: list[str], gated: bool) -> Tensor:
        base = self._modules["base_layer"]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        scales = self.scaling.tensors
        if gated:
            scales = {name: scales[name] * self._gates[name] for name in names}
        bias = self._bias(bias, names, scales, gated)
        if type(base) is Conv1D:
            weight = weight.t()
        if len(names) > 1:
            a, b, scale = self._stacked(names, scales, gated, weight.dtype)
            return lora_linear(x, weight, bias, a, b, scale)
        (name,) = names
        p, seed = self._dropout(name), None
        if p > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        down, up, _ = parts(self, name)
        return lora_linear(x, weight, bias, down._parameters["weight"], up._parameters["weight"], scales[name], p, seed)

    def _bias(self, bias: Tensor | None, names: list[str], scales: dict, gated: bool) -> Tensor | None:
        """The base layer's bias and what adapters with `lora_bias` add to it."""
        for name in names:
            added = self._modules["lora_B"]._modules[name]._parameters["bias"]
            if added is not None:
                added = self._opened(name, scales[name] * added, gated)
                bias = (added if bias is None else bias + added).to(self.weight.dtype)
        return bias

    def _opened(self, name: str, value: Tensor, gated: bool) -> Tensor:
        """`value`, but zeros where the adapter's gate is shut: not even NaN comes out of it then."""
        return torch.where(self._gates[name] != 0, value, 0) if gated else value

    def _stacked(
        self, names: list[str], scales: dict, gated: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Several adapters as one of the sum of their ranks: A over A, s B beside s B, and the scale of it all."""
        # In float32, for s B has more digits than B.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        downs = [self._opened(name, self.lora_A[name].weight.to(wide), gated) for name in names]
        ups = [self._opened(name, self.lora_B[name].weight.to(wide) * scales[name], gated) for name in names]
        scale = 1.0
        if gated:
            scale = (torch.stack([self._gates[name] for name in names]).amax() > 0).float()
        return torch.cat(downs), torch.cat(ups, 1), scale

    # ---- what follows PEFT's own state ----

    def __setattr__(self, name: str, value: object) -> None:
        if name == "scaling" and not isinstance(value, Scaling):
            value = Scaling(value, self.scaling.device)
        super().__setattr__(name, value)
        if name in ("_active_adapter", "_disable_adapters"):
            self._set_gates()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._set_gates()

    def unmerge(self) -> None:
        try:
            super().unmerge()
        finally:
            self._set_gates()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _settle(self) -> None:
        """Bring the tensors to the base weight's device."""
        weight = self.get_base_layer().weight
        super().__setattr__("scaling", Scaling(dict(self.scaling), weight.device))
        self._device_obstacle = device_obstacle(weight.device, weight.dtype)
        self._set_gates()

    def _set_gates(self) -> None:
        """How often each adapter takes part in the sum: once where active, 0 else, and 0 while disabled or merged."""
        off = self._disable_adapters or bool(self.merged_adapters)
        active = self.active_adapters
        self._gates = {name: scalar(0 if off else active.count(name), self.scaling.device) for name in self.lora_A}
        # PEFT's forward unmerges a layer that is disabled while merged.
        self._unmerges = self._disable_adapters and bool(self.merged_adapters)
