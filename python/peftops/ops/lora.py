r"""LoRA: y = x W^T + bias + scale * drop(x) A^T B^T (Hu et al., "LoRA", ICLR 2022, equation 3; scale = alpha / rank).

Shapes: x [..., K], weight W [N, K], bias [N] or None, lora_a A [r, K], lora_b B [N, r] -> y [..., N].

Dtypes: x float32, bfloat16, float16 or float64; weight and bias have x's; lora_a and lora_b share one dtype, x's or,
for a 16-bit x, float32. Sums are float32 (float64 for float64). y has x's dtype.

drop(x) keeps an element iff :func:`lora_dropout_mask` says so, times 1 / (1 - p); a dropped element contributes
nothing, not even NaN. With M tokens and S = scale / (1 - p) * keep(x) A^T [M, r], backward keeps x itself, S in float32
and one bit per element of x:

    dS = scale / (1 - p) * dY B     dB = dY^T S     dA = dS^T keep(x)     dX = dY W + keep(dS A)

scale is not differentiated. A scale of 0 means no adapter: y is the base linear's, to the bit where the vendor's GEMM
makes the base product (csrc/lora/README.md, "Plans"); lora_a and lora_b get zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import Contract, ErrorSample, Sample, register
from .dispatch import (
    Function,
    autocast_linear,
    below_autograd,
    differentiate,
    library,
    records,
    register_autocast,
    without_gradient,
)

_ops = torch.ops.peftops
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIFFERENTIABLE = ("x", "weight", "bias", "lora_a", "lora_b")


# ---- public calls ----------------------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * drop(x) A^T B^T; shapes and dtypes as in the module's docstring.

    scale: a number, or a 0-d float32 tensor on x's device where it changes between calls (no recompilation).
    dropout_p: in [0, 1). Above 0 it needs `seed`, an int64 tensor [1] on x's device.

    Raises RuntimeError naming the argument for a wrong dtype, dimension, size or device.
    """
    if isinstance(scale, Tensor):
        return _ops.lora_linear.tensor_scale(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
    return _ops.lora_linear.default(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)


def lora_dropout_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """The mask that `lora_linear` draws for a seed, bool [rows, cols], True = kept. Rows are flattened tokens.

    Philox4x32-10 (Salmon et al., SC 2011): key = seed (int64 tensor [1]), counter = (column // 8, row low, row high,
    0); element j of eight takes the 16-bit half j, low half first, and is kept iff it is at least round(65536 p).

    Raises RuntimeError naming the argument for a wrong seed, a negative size, or p outside [0, 1).
    """
    return _ops.lora_dropout_mask(seed, rows, cols, p)


# ---- reference -------------------------------------------------------------------------------------------------------


def reference_dropout_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """`lora_dropout_mask` in plain torch, on 64-bit integers."""
    low = 0xFFFFFFFF
    row = torch.arange(rows, device=seed.device).view(-1, 1)
    block = torch.arange((cols + 7) // 8, device=seed.device).view(1, -1)
    c0, c1, c2, c3 = (
        torch.broadcast_to(c, (rows, block.numel())) for c in (block, row & low, row >> 32, torch.zeros_like(block))
    )
    key = seed.view(1, 1)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        # A 32 x 32 bit product does not fit a signed 64-bit integer, so the multiplier goes in two halves.
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    halves = torch.stack([h for c in (c0, c1, c2, c3) for h in (c & 0xFFFF, c >> 16)], dim=-1)
    return (halves >= round(65536 * p)).view(rows, 8 * block.numel())[:, :cols]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers."""
    upper = (a >> 16) * b
    lower = (a & 0xFFFF) * b
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def reference(x, weight, bias, lora_a, lora_b, scale=1.0, dropout_p=0.0, seed=None):
    """`lora_linear` as composed in plain torch."""
    y = torch.nn.functional.linear(x, weight, bias)
    if scale == 0:
        return y
    if dropout_p > 0:
        kept = reference_dropout_mask(seed, rows_of(x), x.shape[-1], dropout_p).view(x.shape)
        x = torch.where(kept, x, 0) / (1 - dropout_p)
    delta = torch.nn.functional.linear(torch.nn.functional.linear(x.to(lora_a.dtype), lora_a), lora_b)
    return (y + scale * delta).to(y.dtype)


def bytes_of(kept: Tensor) -> Tensor:
    """Keep-bits as lora_linear_forward returns them: uint8 [rows, ceil(cols / 8)], bit j of a byte = column 8 i + j."""
    rows, cols = kept.shape
    padded = torch.nn.functional.pad(kept, (0, -cols % 8)).view(rows, (cols + 7) // 8, 8)
    return (padded.int() << torch.arange(8, device=kept.device)).sum(-1).to(torch.uint8)


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scale(scale: float, tensor_scale: Tensor | None) -> float:
    return scale if tensor_scale is None else scale * tensor_scale.item()


def reference_forward(x, weight, bias, lora_a, lora_b, scale, tensor_scale, dropout_p, seed):
    """`lora_linear_forward` as composed in plain torch."""
    factor = _scale(scale, tensor_scale)
    y = reference(x, weight, bias, lora_a, lora_b, factor, dropout_p, seed)
    rows, cols = rows_of(x), x.shape[-1]
    mask = torch.empty(0, dtype=torch.uint8, device=x.device)
    if factor == 0:
        s = torch.zeros(rows, lora_a.shape[0], dtype=accumulator_of(x.dtype), device=x.device)
        return y, s, mask if dropout_p == 0 else torch.zeros(rows, (cols + 7) // 8, dtype=torch.uint8, device=x.device)
    tokens = x.reshape(rows, cols)
    if dropout_p > 0:
        mask = reference_dropout_mask(seed, rows, (cols + 7) // 8 * 8, dropout_p)
        tokens = torch.where(mask[:, :cols], tokens, 0)
        mask = bytes_of(mask)
    s = factor / (1 - dropout_p) * torch.nn.functional.linear(tokens.to(lora_a.dtype), lora_a)
    return y, s.to(accumulator_of(x.dtype)), mask


def reference_backward(
    grad,
    x,
    weight,
    lora_a,
    lora_b,
    scale,
    tensor_scale,
    dropout_p,
    s,
    mask,
    need_x,
    need_weight,
    need_bias,
    need_a,
    need_b,
):
    """`lora_linear_backward` as composed in plain torch."""
    factor = _scale(scale, tensor_scale) / (1 - dropout_p)
    features = weight.shape[1]
    g = grad.reshape(rows_of(grad), weight.shape[0])
    kept = torch.ones(g.shape[0], features, dtype=torch.bool, device=grad.device)
    if dropout_p > 0 and factor != 0:
        kept = ((mask[:, :, None] >> torch.arange(8, device=grad.device)) & 1).bool().flatten(1)[:, :features]
    dtype = lora_a.dtype
    grad_s = factor * (g.to(dtype) @ lora_b)
    none = grad.new_empty(0)
    tokens = None if x is None else x.reshape(g.shape[0], features)
    low_rank = torch.where(kept, grad_s @ lora_a, 0) if factor else torch.zeros_like(kept, dtype=dtype)
    return (
        (g @ weight + low_rank).to(grad.dtype).reshape(*grad.shape[:-1], features) if need_x else none,
        g.t() @ tokens if need_weight else none,
        g.sum(0) if need_bias else none,
        (grad_s.t() @ torch.where(kept, tokens, 0).to(dtype) if factor else torch.zeros_like(lora_a))
        if need_a
        else none,
        (g.to(dtype).t() @ s.to(dtype) if factor else torch.zeros_like(lora_b)) if need_b else none,
    )


# ---- fake ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("peftops::lora_linear")
@torch.library.register_fake("peftops::lora_linear.tensor_scale")
def _(x, weight, bias, lora_a, lora_b, scale=1.0, dropout_p=0.0, seed=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("peftops::lora_linear_forward")
def _(x, weight, bias, lora_a, lora_b, scale, tensor_scale, dropout_p, seed):
    rows = rows_of(x)
    mask = (rows, (x.shape[-1] + 7) // 8) if dropout_p > 0 else (0,)
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(rows, lora_a.shape[0], dtype=accumulator_of(x.dtype)),
        x.new_empty(mask, dtype=torch.uint8),
    )


@torch.library.register_fake("peftops::lora_linear_backward")
def _(
    grad,
    x,
    weight,
    lora_a,
    lora_b,
    scale,
    tensor_scale,
    dropout_p,
    s,
    mask,
    need_x,
    need_weight,
    need_bias,
    need_a,
    need_b,
):
    none = (0,)
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if need_x else none),
        grad.new_empty(weight.shape if need_weight else none),
        grad.new_empty(weight.shape[0] if need_bias else none),
        lora_a.new_empty(lora_a.shape) if need_a else grad.new_empty(none),
        lora_b.new_empty(lora_b.shape) if need_b else grad.new_empty(none),
    )


@torch.library.register_fake("peftops::lora_dropout_mask")
def _(seed, rows, cols, p):
    return seed.new_empty(rows, cols, dtype=torch.bool)


def rows_of(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


# ---- backward --------------------------------------------------------------------------------------------------------


class _LoRALinear(Function):
    """lora_linear_forward with its gradient."""

    @staticmethod
    def forward(*args):
        return below_autograd(_ops.lora_linear_forward.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _bias, lora_a, lora_b, scale, tensor_scale, dropout_p, _seed = inputs
        _y, s, mask = output
        ctx.mark_non_differentiable(s, mask)
        ctx.set_materialize_grads(False)
        _, need_weight, _, need_a, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight or need_a else None, weight, lora_a, lora_b, tensor_scale, s, mask)
        ctx.scale, ctx.dropout_p = scale, dropout_p

    @staticmethod
    def backward(ctx, grad, _grad_s, _grad_mask):
        if grad is None:
            return (None,) * 9
        x, weight, lora_a, lora_b, tensor_scale, s, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        args = (grad, x, weight, lora_a, lora_b, ctx.scale, tensor_scale, ctx.dropout_p, s, mask, *needs)
        grads = differentiate(_ops.lora_linear_backward.default, _LoRALinearBackward, args)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


_LoRALinearBackward = without_gradient(
    "lora_linear", lambda *args: below_autograd(_ops.lora_linear_backward.default, args)
)


def _lora_linear(x, weight, bias, lora_a, lora_b, scale=1.0, dropout_p=0.0, seed=None):
    args = (x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
    if records(args):
        return _LoRALinear.apply(x, weight, bias, lora_a, lora_b, scale, None, dropout_p, seed)[0]
    return below_autograd(_ops.lora_linear.default, args)


def _lora_linear_tensor_scale(x, weight, bias, lora_a, lora_b, scale, dropout_p=0.0, seed=None):
    args = (x, weight, bias, lora_a, lora_b, scale, dropout_p, seed)
    if records(args):
        return _LoRALinear.apply(x, weight, bias, lora_a, lora_b, 1.0, scale, dropout_p, seed)[0]
    return below_autograd(_ops.lora_linear.tensor_scale, args)


library.impl("lora_linear", _lora_linear, "Autograd")
library.impl("lora_linear.tensor_scale", _lora_linear_tensor_scale, "Autograd")
library.impl(
    "lora_linear_forward", lambda *a: differentiate(_ops.lora_linear_forward.default, _LoRALinear, a), "Autograd"
)
library.impl(
    "lora_linear_backward",
    lambda *a: differentiate(_ops.lora_linear_backward.default, _LoRALinearBackward, a),
    "Autograd",
)


# ---- autocast --------------------------------------------------------------------------------------------------------


register_autocast(_ops.lora_linear.default, autocast_linear)
register_autocast(_ops.lora_linear.tensor_scale, autocast_linear)
register_autocast(_ops.lora_linear_forward.default)
register_autocast(_ops.lora_linear_backward.default)


# ---- samples ---------------------------------------------------------------------------------------------------------

# (leading sizes, K, N, r): zero, one, ragged, wider than a block, a rank above both widths, few rows.
_SHAPES = (
    ((3,), 5, 7, 2),
    ((2, 9), 33, 17, 4),
    ((), 8, 8, 1),
    ((0,), 8, 8, 2),
    ((4,), 0, 5, 2),
    ((4,), 5, 0, 2),
    ((70,), 129, 65, 17),
    ((17,), 300, 271, 8),
    ((1,), 256, 96, 16),
    ((16,), 63, 127, 5),
    ((2, 33), 16, 24, 72),
)


def _parts(device, dtype, seed) -> Iterator[tuple[str, tuple, float, float, Tensor | None]]:
    """(label, operands, scale, dropout_p, seed) over shapes, dtypes of the factors, strides and dropout."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def operands(lead, k, n, r, factor_dtype, bias):
        x, weight = randn(*lead, k), randn(n, k) / max(k, 1) ** 0.5
        a, b = randn(r, k, dtype=factor_dtype) / max(k, 1) ** 0.5, randn(n, r, dtype=factor_dtype) / r**0.5
        return x, weight, randn(n) if bias else None, a, b

    for index, (lead, k, n, r) in enumerate(_SHAPES):
        p = (0.0, 0.25, 0.5)[index % 3]
        key = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator).to(device) if p else None
        yield f"{list(lead)}x{k}->{n} r{r} p{p}", operands(lead, k, n, r, dtype, index % 2 == 0), 0.75, p, key
    key = torch.tensor([12345], device=device)
    if dtype in (torch.bfloat16, torch.float16):
        yield "float32 factors", operands((2, 19), 40, 31, 6, torch.float32, True), 2.0, 0.1, key
        yield "float32 factors, few rows", operands((5,), 70, 40, 6, torch.float32, True), 2.0, 0.0, None
    x, weight, bias, a, b = operands((20, 2), 21, 18, 3, dtype, True)
    yield (
        "transposed",
        (x.transpose(0, 1), weight.t().contiguous().t(), bias, a.t().contiguous().t(), b),
        -1.5,
        0.3,
        key,
    )
    x, weight, bias, a, b = operands((19,), 24, 18, 3, dtype, True)
    yield "expanded", (x[:1].expand(19, 24), weight, bias[:1].expand(18), a, b[:1].expand(18, 3)), 1.0, 0.0, None
    x, weight, bias, a, b = operands((18,), 48, 40, 8, dtype, True)
    strided = (x[:, 3:20], weight[1::2, 5:22], bias[::2], a[:, 1:18], b[:20])
    yield "sliced", strided, 1.0, 0.0, None
    yield "few rows, sliced", (strided[0][:6], *strided[1:]), 1.0, 0.0, None
    yield "scale 0", operands((6,), 10, 9, 2, dtype, True), 0.0, 0.5, key


def _samples(device, dtype, seed) -> Iterator[Sample]:
    for label, operands, scale, p, key in _parts(device, dtype, seed):
        yield Sample((*operands, scale, p, key), label=label)


def _tensor_scale_samples(device, dtype, seed) -> Iterator[Sample]:
    for label, operands, scale, p, key in _parts(device, dtype, seed):
        yield Sample((*operands, torch.tensor(scale, device=device), p, key), label=label)


def _inner_samples(device, dtype, seed) -> Iterator[Sample]:
    for index, (label, operands, scale, p, key) in enumerate(_parts(device, dtype, seed)):
        tensor_scale = torch.tensor(0.5, device=device) if index % 2 else None
        yield Sample((*operands, scale, tensor_scale, p, key), label=label)


def _backward_samples(device, dtype, seed) -> Iterator[Sample]:
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    for index, sample in enumerate(_inner_samples(device, dtype, seed)):
        x, weight, _bias, lora_a, lora_b, scale, tensor_scale, p, _key = sample.args
        y, s, mask = reference_forward(*sample.args)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        needs = [True] * 5 if index % 3 == 0 else [bool((index >> i) & 1) for i in range(5)]
        kept_x = x if needs[1] or needs[3] else None
        yield Sample(
            (grad, kept_x, weight, lora_a, lora_b, scale, tensor_scale, p, s, mask, *needs), label=sample.label
        )


def _mask_samples(device, dtype, seed) -> Iterator[Sample]:
    for rows, cols, p in (
        (0, 8, 0.5),
        (3, 0, 0.5),
        (1, 1, 0.5),
        (5, 7, 0.0),
        (3, 130, 0.1),
        (9, 1027, 0.9),
        (2, 300, 1 - 1e-7),
    ):
        yield Sample((torch.tensor([seed - 2**40], device=device), rows, cols, p), label=f"{rows}x{cols} p{p}")


def _error_parts(device):
    """(changed arguments, message) for lora_linear."""
    x, weight, bias = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device), torch.zeros(5, device=device)
    lora_a, lora_b = torch.zeros(2, 4, device=device), torch.zeros(5, 2, device=device)
    good = dict(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, dropout_p=0.0, seed=None)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    for changed, match in (
        ({"x": x.long()}, "x has dtype int64, but must be float32"),
        ({"x": x[0, 0]}, "x must be .*no dimension"),
        ({"x": x[:, :3]}, "weight has 4 columns, but x has 3 features"),
        ({"weight": weight.to(torch.int8)}, "weight has dtype int8, but x has float32"),
        ({"weight": weight[0]}, r"weight must be \[out_features, features\], but has shape \[4\]"),
        ({"weight": weight.double()}, "weight has dtype float64, but x has float32"),
        ({"bias": bias[:4]}, r"bias must have shape \[5\], but has \[4\]"),
        ({"bias": bias.half()}, "bias has dtype float16, but x has float32"),
        ({"lora_a": lora_a[:, :3]}, "lora_a has 3 columns, but x has 4 features"),
        ({"lora_a": lora_a[0]}, r"lora_a must be \[rank, features\], but has shape \[4\]"),
        ({"lora_b": lora_b[:, :1]}, "lora_b has 1 columns, but lora_a has 2 rows"),
        ({"lora_b": lora_b[:4]}, "lora_b has 4 rows, but weight has 5"),
        ({"lora_b": lora_b.double()}, "lora_b has dtype float64, but lora_a has float32"),
        ({"lora_a": lora_a.half(), "lora_b": lora_b.half()}, "lora_a has dtype float16, but must have x's, float32"),
        ({"dropout_p": 1.0, "seed": seed}, r"dropout_p is 1, but must be in \[0, 1\)"),
        ({"dropout_p": -0.1, "seed": seed}, r"dropout_p is -0.1, but must be in \[0, 1\)"),
        ({"dropout_p": float("nan"), "seed": seed}, r"dropout_p is nan, but must be in \[0, 1\)"),
        ({"dropout_p": 0.5}, "dropout_p is 0.5, which needs a seed"),
        ({"dropout_p": 0.5, "seed": seed.int()}, "seed has dtype int32, but it must be int64"),
        ({"dropout_p": 0.5, "seed": seed.expand(2)}, r"seed must have shape \[1\], but has \[2\]"),
    ):
        yield {**good, **changed}, match


def _errors(device) -> Iterator[ErrorSample]:
    for a, match in _error_parts(device):
        args = (a["x"], a["weight"], a["bias"], a["lora_a"], a["lora_b"], 1.0, a["dropout_p"], a["seed"])
        yield ErrorSample(Sample(args), f"lora_linear: {match}")


def _tensor_scale_errors(device) -> Iterator[ErrorSample]:
    scale = torch.ones((), device=device)
    for a, match in _error_parts(device):
        args = (a["x"], a["weight"], a["bias"], a["lora_a"], a["lora_b"], scale, a["dropout_p"], a["seed"])
        yield ErrorSample(Sample(args), f"lora_linear: {match}")
    x, weight, a, b = (torch.zeros(*s, device=device) for s in ((3, 4), (5, 4), (2, 4), (5, 2)))
    yield ErrorSample(
        Sample((x, weight, None, a, b, scale.double())), "lora_linear: scale has dtype float64, but it must be float32"
    )
    yield ErrorSample(
        Sample((x, weight, None, a, b, scale.view(1))),
        r"lora_linear: scale must be a number or have shape \[\], but has \[1\]",
    )


def _forward_errors(device) -> Iterator[ErrorSample]:
    for a, match in _error_parts(device):
        args = (a["x"], a["weight"], a["bias"], a["lora_a"], a["lora_b"], 1.0, None, a["dropout_p"], a["seed"])
        yield ErrorSample(Sample(args), f"lora_linear: {match}")


def _backward_errors(device) -> Iterator[ErrorSample]:
    grad, x, weight = (torch.zeros(*s, device=device) for s in ((3, 5), (3, 4), (5, 4)))
    a, b, s = (torch.zeros(*s, device=device) for s in ((2, 4), (5, 2), (3, 2)))
    mask = torch.zeros(0, dtype=torch.uint8, device=device)
    needs = (True,) * 5
    for args, match in (
        ((grad[:, :4], x, weight, a, b, 1.0, None, 0.0, s, mask), r"grad must be \[..., 5\], but has shape \[3, 4\]"),
        ((grad.double(), x, weight, a, b, 1.0, None, 0.0, s, mask), "grad has dtype float64, but weight has float32"),
        ((grad, None, weight, a, b, 1.0, None, 0.0, s, mask), "x is needed for the gradients of weight and lora_a"),
        ((grad, x[:2], weight, a, b, 1.0, None, 0.0, s, mask), "x has 2 rows, but grad has 3"),
        ((grad, x, weight, a, b, 1.0, None, 0.0, s[:, :1], mask), r"s must be .*\[3, 2\], but has shape \[3, 1\]"),
        ((grad, x, weight, a, b, 1.0, None, 0.5, s, mask), r"mask must be .*\[3, 1\], but has shape \[0\]"),
        ((grad, x, weight, a, b, 1.0, None, 1.5, s, mask), r"dropout_p is 1.5, but must be in \[0, 1\)"),
    ):
        yield ErrorSample(Sample((*args, *needs)), f"lora_linear_backward: {match}")


def _mask_errors(device) -> Iterator[ErrorSample]:
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    for args, match in (
        ((seed.int(), 1, 1, 0.5), "seed has dtype int32, but it must be int64"),
        ((seed.expand(3), 1, 1, 0.5), r"seed must have shape \[1\], but has \[3\]"),
        ((seed, -1, 1, 0.5), "rows is -1, but must not be negative"),
        ((seed, 1, -2, 0.5), "cols is -2, but must not be negative"),
        ((seed, 1, 1, 1.0), r"p is 1, but must be in \[0, 1\)"),
    ):
        yield ErrorSample(Sample(args), f"lora_dropout_mask: {match}")


_AUTOCAST = ("x", "weight", "bias")
_ROWS = ("x",)

register(
    Contract(
        "peftops::lora_linear", reference, _samples, _errors, _FLOATS, _DIFFERENTIABLE, autocast=_AUTOCAST, rows=_ROWS
    )
)
register(
    Contract(
        "peftops::lora_linear.tensor_scale",
        reference,
        _tensor_scale_samples,
        _tensor_scale_errors,
        _FLOATS,
        _DIFFERENTIABLE,
        autocast=_AUTOCAST,
        rows=_ROWS,
    )
)
register(
    Contract(
        "peftops::lora_linear_forward",
        reference_forward,
        _inner_samples,
        _forward_errors,
        _FLOATS,
        _DIFFERENTIABLE,
        rows=_ROWS,
    )
)
register(Contract("peftops::lora_linear_backward", reference_backward, _backward_samples, _backward_errors, _FLOATS))
register(Contract("peftops::lora_dropout_mask", reference_dropout_mask, _mask_samples, _mask_errors, (torch.float32,)))
