"""How an operator is entered: recording a gradient or not, and under autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Not a composite in C++: checkpointing ends its recomputation with an exception out of save_for_backward, which would
# not survive the C boundary. torch.library.register_autograd takes 50 microseconds more per call.
library = torch.library.Library("peftops", "IMPL")


class Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # Past torch.autograd.Function.apply, which inspects the signature of `forward` in every call.
        return super(torch.autograd.Function, cls).apply(*args)


def without_gradient(name: str, forward: Callable) -> type[Function]:
    """The function of a backward operator, whose own gradient is refused with an error in the name of `name`."""

    class Backward(Function):
        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *_grads):
            raise RuntimeError(f"{name}: double backward is not supported (backward was called with create_graph=True)")

    Backward.forward = staticmethod(forward)
    return Backward


def below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def records(args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def differentiate(op, function, args):
    return function.apply(*args) if records(args) else below_autograd(op, args)


def register_autocast(overload, rule: Callable[[str, Callable], Callable] | None = None) -> None:
    """What `overload` does under autocast: `rule(device type, overload)`, or, without a rule, the same as ever.

    Below it autocast is off: kernels call the vendor's GEMM through the dispatcher, and would get another dtype.
    """
    name = overload._schema.name.split("::")[1]
    name = f"{name}.{overload._overloadname}" if overload._overloadname != "default" else name
    for device in ("cpu", "cuda"):
        key = f"Autocast{device.upper()}"
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        library.impl(name, _outside_autocast(keys, rule(device, overload) if rule else overload), key)


def _outside_autocast(keys, call: Callable) -> Callable:
    def autocast(*args):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return call(*args)

    return autocast


def autocast_linear(device: str, overload) -> Callable:
    """The rule of operators that begin as lora_linear does: x, weight and bias go to the autocast dtype, as for
    nn.Linear; the factors stay as they are.
    """

    def call(x, weight, bias, lora_a, lora_b, *rest):
        x, weight, bias = (autocast_cast(t, device) for t in (x, weight, bias))
        return overload(x, weight, bias, *autocast_factors(x, lora_a, lora_b), *rest)

    return call


def autocast_cast(tensor: Tensor | None, device: str) -> Tensor | None:
    """A floating tensor in the autocast dtype; float64 and what is not floating stay as they are."""
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor


def autocast_factors(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """Factors for an x that autocast has cast: a 16-bit one of another dtype has no kernel and goes the way of x."""
    return tuple(f if f.dtype in (torch.float32, x.dtype) else f.to(x.dtype) for f in factors)
