"""Operators with one fault each that only shows on CUDA tensors, and a correct one: y = x weight^T.

They live in the namespace `peftops_cuda_faults`, with contracts of their own that no generated test sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peftops.ops.contract import Contract, Sample
from torch.nn.functional import linear

LIBRARY = torch.library.Library("peftops_cuda_faults", "DEF")


def samples(device, dtype, seed):
    for rows in (0, 3):
        yield Sample((torch.ones(rows, 4, dtype=dtype, device=device), torch.ones(5, 4, dtype=dtype, device=device)))


def fake(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


def gradients(grad, x, weight):
    return grad @ weight, grad.t() @ x


def autocast(op, x, weight):
    device = x.device.type
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return op(*(t.to(torch.get_autocast_dtype(device)) for t in (x, weight)))


def define(
    name: str,
    fake: Callable = fake,
    gradients: Callable = gradients,
    autocast_keys: tuple[str, ...] = ("AutocastCPU", "AutocastCUDA"),
    autocast_names: tuple[str, ...] = ("x", "weight"),
) -> Contract:
    LIBRARY.define(f"{name}(Tensor x, Tensor weight) -> Tensor")
    qualified, op = f"peftops_cuda_faults::{name}", getattr(torch.ops.peftops_cuda_faults, name).default
    LIBRARY.impl(name, lambda x, weight: linear(x, weight), "CPU")
    for key in autocast_keys:
        LIBRARY.impl(name, lambda x, weight: autocast(op, x, weight), key)
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(
        qualified,
        lambda ctx, grad: gradients(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=LIBRARY,
    )
    dtypes = (torch.float32,)
    return Contract(qualified, linear, samples, lambda device: (), dtypes, ("x", "weight"), autocast=autocast_names)


def fake_on_the_cpu(x, weight):
    return torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)


def fake_with_other_strides(x, weight):
    return x.new_empty(weight.shape[0], x.shape[0]).t() if x.is_cuda else fake(x, weight)


def gradient_on_the_cpu(grad, x, weight):
    return grad @ weight, torch.zeros(weight.shape, dtype=weight.dtype)


def gradient_after_a_look_at_the_data(grad, x, weight):
    return gradients(grad, x, weight) if grad.sum().item() else (torch.zeros_like(x), torch.zeros_like(weight))


CLEAN = define("clean")

# (contract, check that catches it, what the check says)
CAUGHT = (
    (define("fake_on_the_cpu", fake=fake_on_the_cpu), "fake", "without gradients: result 0 is on cpu"),
    (define("fake_on_the_cpu_exported", fake=fake_on_the_cpu), "export", "exported: result 0 is on cpu"),
    (define("fake_with_other_strides", fake=fake_with_other_strides), "fake", "result 0 is .* but .* on the CPU"),
    (define("gradient_on_the_cpu", gradients=gradient_on_the_cpu), "fake", "with gradients: result 2 is on cpu"),
    (define("gradient_on_the_cpu_compiled", gradients=gradient_on_the_cpu), "compile", "is on cpu"),
    (define("look_at_the_data", gradients=gradient_after_a_look_at_the_data), "fake", "local_scalar_dense"),
    (
        define("autocast_on_the_cpu_only", autocast_keys=("AutocastCPU",)),
        "autocast",
        r"result 0 is \(torch.float32.* but \(torch.bfloat16",
    ),
    (define("autocast_of_too_much", autocast_names=("x",)), "autocast", "the kernel gets weight in torch.bfloat16"),
)
