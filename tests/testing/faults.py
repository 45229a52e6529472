"""Stand-in operators: a correct LoRA linear in plain torch, and copies of it with one planted fault each.

They live in the namespace `peftops_faults`, with contracts of their own that no generated test sees.
"""

from __future__ import annotations

import ctypes

import torch
from peftops.ops.contract import Contract, ErrorSample, Sample
from peftops.testing import dropout_mask, generator
from torch.nn.functional import linear

LIBRARY = torch.library.Library("peftops_faults", "DEF")
ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale=1.0, "
    "float dropout_p=0.0, Tensor? seed=None"
)
DIFFERENTIABLE = ("x", "weight", "bias", "lora_a", "lora_b")
AUTOCAST = ("x", "weight", "bias")


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [m, k] times b [n, k] transposed, summed in the same order whatever the number of threads."""
    return (a[:, None, :] * b[None, :, :]).sum(-1)


class Twin:
    """The correct operator: float64 inside, one rounding. Each fault overrides one method."""

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """x as rows."""
        return x.reshape(-1, x.shape[-1])

    def read_grad(self, grad: torch.Tensor) -> torch.Tensor:
        return grad.reshape(-1, grad.shape[-1])

    def forward_mask(self, seed: torch.Tensor, rows: int, cols: int, p: float) -> torch.Tensor:
        return dropout_mask(seed, rows, cols, p)

    def backward_mask(self, seed: torch.Tensor, rows: int, cols: int, p: float) -> torch.Tensor:
        return dropout_mask(seed, rows, cols, p)

    def down(self, rows: torch.Tensor, lora_a: torch.Tensor) -> torch.Tensor:
        return product(rows, lora_a)

    def grad_a_scale(self, scale: float) -> float:
        return scale

    def write(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def before(self, lora_b: torch.Tensor, scale: float) -> None:
        """What the kernel does to its arguments."""

    def forward(
        self, x, weight, bias, lora_a, lora_b, scale=1.0, dropout_p=0.0, seed=None
    ):  # the dispatcher omits defaults
        for name, tensor, columns in (("weight", weight, x.shape[-1]), ("lora_a", lora_a, x.shape[-1])):
            if tensor.shape[1] != columns:
                raise RuntimeError(f"{name} has {tensor.shape[1]} columns, but x has {columns} features")
        self.before(lora_b, scale)
        rows, a, b = self.read(x).double(), lora_a.double(), lora_b.double()
        y = product(rows, weight.double()) + (0 if bias is None else bias.double())
        if scale:
            if dropout_p:
                rows = torch.where(self.forward_mask(seed, *rows.shape, dropout_p), rows, 0) / (1 - dropout_p)
            y = y + scale * product(self.down(rows, a), b)
        return self.write(y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]))

    def backward(self, grad, x, weight, lora_a, lora_b, scale, dropout_p, seed):
        g, rows, a, b = self.read_grad(grad).double(), self.read(x).double(), lora_a.double(), lora_b.double()
        factor = torch.ones_like(rows)
        if dropout_p:
            factor = self.backward_mask(seed, *rows.shape, dropout_p).double() / (1 - dropout_p)
        grad_s = product(g, b.t())
        dropped = torch.where(factor != 0, rows, 0) * factor
        grad_x = product(g, weight.double().t()) + scale * product(grad_s, a.t()) * factor
        return (
            grad_x.to(x.dtype).reshape(x.shape),
            product(g.t(), rows.t()).to(weight.dtype),
            g.sum(0).to(grad.dtype),
            (self.grad_a_scale(scale) * product(grad_s.t(), dropped.t())).to(lora_a.dtype),
            (scale * product(g.t(), product(dropped, a).t())).to(lora_b.dtype),
        )


class IgnoredStride(Twin):
    def read(self, x):
        return as_if_contiguous(x)


class IgnoredUpstreamStride(Twin):
    def read_grad(self, grad):
        return as_if_contiguous(grad)


class MissingScale(Twin):
    def grad_a_scale(self, scale):
        return 1.0


class DroppedTail(Twin):
    def down(self, rows, lora_a):
        whole = rows.shape[1] // 8 * 8
        return product(rows[:, :whole], lora_a[:, :whole])


class NarrowOffset(Twin):
    """Offsets in a signed integer that is too narrow; 8 bits stand for 32, so that a small tensor is past the limit."""

    def read(self, x):
        offsets = torch.arange(x.numel()).to(torch.int8).long() % max(x.numel(), 1)
        return x.reshape(-1)[offsets].reshape(-1, x.shape[-1])


class WrongMaskInBackward(Twin):
    def backward_mask(self, seed, rows, cols, p):
        return dropout_mask(seed + 1, rows, cols, p)


class UninitialisedColumn(Twin):
    def write(self, y):
        out = torch.empty_like(y)
        out[..., :-1] = y[..., :-1]
        return out


class UndeclaredMutation(Twin):
    def before(self, lora_b, scale):
        # folds the scale into the factor, and back: the value returns, but not every bit, and not for another thread
        # meanwhile
        lora_b.mul_(scale * 3).div_(scale * 3) if scale else None


class SwallowedNaN(Twin):
    def write(self, y):
        return y.clamp(torch.finfo(y.dtype).min, torch.finfo(y.dtype).max).nan_to_num(0.0)


def as_if_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Rows read from the view's first element on, one after the other, whatever the strides (within the storage)."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    places = torch.arange(tensor.numel()) + tensor.storage_offset()
    return memory[places % max(memory.numel(), 1)].reshape(-1, tensor.shape[-1])


def int32_offset(row: int, stride: int, column: int) -> int:
    """What `int offset = row * stride + column` gives in C on common hardware."""
    return ctypes.c_int32(row * stride + column).value


def reference(x, weight, bias, lora_a, lora_b, scale=1.0, dropout_p=0.0, seed=None):
    y = linear(x, weight, bias)
    if scale == 0:
        return y
    if dropout_p:
        rows = x.reshape(-1, x.shape[-1])
        x = (torch.where(dropout_mask(seed, *rows.shape, dropout_p), rows, 0) / (1 - dropout_p)).reshape(x.shape)
    return (y + scale * linear(linear(x.to(lora_a.dtype), lora_a), lora_b)).to(y.dtype)


def samples(device, dtype, seed):
    source = generator(seed, "faults")

    def randn(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    key = torch.tensor([77])
    for label, lead, k, n, r, p in (
        ("ragged", (5,), 13, 18, 3, 0.0),
        ("dropout", (2, 9), 24, 17, 4, 0.25),
        ("empty", (0,), 8, 5, 2, 0.0),
        ("one feature", (4,), 1, 1, 1, 0.5),
        ("larger", (37,), 45, 33, 5, 0.5),
    ):
        yield Sample(
            (randn(*lead, k), randn(n, k), randn(n), randn(r, k), randn(n, r), 0.75, p, key if p else None), label=label
        )
    x, weight, a, b = randn(10, 20), randn(18, 30), randn(3, 20), randn(36, 3)
    yield Sample((x[1:8, 3:14], weight[:, 5:16], None, a[:, 2:13], b[::2], 2.0, 0.0, None), label="strided")


def errors(device):
    x, weight, a, b = (torch.zeros(shape, device=device) for shape in ((3, 4), (5, 4), (2, 4), (5, 2)))
    yield ErrorSample(Sample((x, weight[:, :3], None, a, b)), "weight has 3 columns, but x has 4 features")
    yield ErrorSample(Sample((x, weight, None, a[:, :2], b)), "lora_a has 2 columns, but x has 4 features")


def define(name: str, kernel: Twin) -> Contract:
    """Register `kernel` as peftops_faults::name with fake kernel, autograd and autocast rule; its contract."""
    backward_arguments = (
        "Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, float scale, float dropout_p, Tensor? seed"
    )
    LIBRARY.define(f"{name}({ARGUMENTS}) -> Tensor")
    LIBRARY.define(f"{name}_backward({backward_arguments}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    LIBRARY.impl(name, kernel.forward, "CPU")
    LIBRARY.impl(f"{name}_backward", kernel.backward, "CPU")
    packet = getattr(torch.ops.peftops_faults, name)
    backward_op = getattr(torch.ops.peftops_faults, f"{name}_backward").default

    def fake(x, weight, *rest):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def fake_backward(grad, x, weight, lora_a, lora_b, *rest):
        shapes = (x, weight, weight.new_empty(weight.shape[0]), lora_a, lora_b)
        return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in shapes)

    def setup_context(ctx, inputs, output):
        x, weight, _bias, lora_a, lora_b, ctx.scale, ctx.dropout_p, seed = inputs
        ctx.save_for_backward(x, weight, lora_a, lora_b, seed)

    def backward(ctx, grad):
        x, weight, lora_a, lora_b, seed = ctx.saved_tensors
        grads = backward_op(grad, x, weight, lora_a, lora_b, ctx.scale, ctx.dropout_p, seed)
        asked = ctx.needs_input_grad
        return tuple(g if need else None for g, need in zip(grads, asked, strict=False)) + (None, None, None)

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: double backward is not supported")

    def autocast(x, weight, bias, *rest):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
        with torch.autocast("cpu", enabled=False):
            return packet.default(x, weight, bias, *rest)

    torch.library.register_fake(f"peftops_faults::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"peftops_faults::{name}_backward", fake_backward, lib=LIBRARY)
    torch.library.register_autograd(f"peftops_faults::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"peftops_faults::{name}_backward", refuse, lib=LIBRARY)
    LIBRARY.impl(name, autocast, "AutocastCPU")
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    return Contract(
        f"peftops_faults::{name}",
        reference,
        samples,
        errors,
        dtypes,
        DIFFERENTIABLE,
        autocast=AUTOCAST,
        rows=("x",),
    )


CLEAN = define("clean", Twin())
IGNORED_STRIDE = define("ignored_stride", IgnoredStride())
IGNORED_UPSTREAM_STRIDE = define("ignored_upstream_stride", IgnoredUpstreamStride())
MISSING_SCALE = define("missing_scale", MissingScale())
DROPPED_TAIL = define("dropped_tail", DroppedTail())
NARROW_OFFSET = define("narrow_offset", NarrowOffset())
WRONG_MASK_IN_BACKWARD = define("wrong_mask_in_backward", WrongMaskInBackward())
UNINITIALISED_COLUMN = define("uninitialised_column", UninitialisedColumn())
UNDECLARED_MUTATION = define("undeclared_mutation", UndeclaredMutation())
SWALLOWED_NAN = define("swallowed_nan", SwallowedNaN())
