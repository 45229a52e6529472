r"""LoRA with an adapter for each token: y_i = x_i W^T + bias + scales[l] * x_i A_l^T B_l^T, l = adapter_ids[i].

Shapes: x [..., K] with M tokens, weight W [N, K], bias [N] or None, lora_a A [L, r, K], lora_b B [L, N, r], scales [L],
adapter_ids x.shape[:-1], ranks [L] or None -> y [..., N].

Dtypes: x float32, bfloat16, float16 or float64; weight and bias have x's; lora_a and lora_b share one dtype, x's or,
for a 16-bit x, float32. scales are float32; adapter_ids and ranks int32 or int64. Sums are float32 (float64 for
float64). y has x's dtype.

adapter_ids name an adapter, 0 <= l < L, or -1 for none, in any order. Of adapter l only the first ranks[l] ranks exist
(all r without `ranks`): the others are not read and get zero gradients. An adapter with a scale or a rank of 0 is none.
A token without an adapter has the base product's value; a batch without any has the base linear's bits.

With S_i = scales[l] * x_i A_l^T [M, r] (zero where there is no adapter or rank), backward keeps x itself and
S in float32:

    dS_i = scales[l] * dY_i B_l     dB_l = sum dY_i^T S_i     dA_l = sum dS_i^T x_i     dX_i = dY_i W + dS_i A_l

summed over the tokens i of adapter l. scales are not differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

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
from .lora import accumulator_of, rows_of

_ops = torch.ops.peftops
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIFFERENTIABLE = ("x", "weight", "bias", "lora_a", "lora_b")


# ---- public call -----------------------------------------------------------------------------------------------------


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scales: Tensor,
    adapter_ids: Tensor,
    ranks: Tensor | None = None,
) -> Tensor:
    """y_i = x_i W^T + bias + scales[l] x_i A_l^T B_l^T with l = adapter_ids[i]; shapes and dtypes as in the module.

    All tensors lie on x's device, and none of their values is part of a compiled graph.

    Raises RuntimeError naming the argument for a wrong dtype, dimension, size or device, and on the CPU for an id
    outside [-1, L) or a rank outside [0, r]. On CUDA, where the host does not see them, a row whose id is out of range
    becomes NaN, and a rank out of range counts as the nearest in it.
    """
    return _ops.grouped_lora_linear.default(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks)


# ---- reference -------------------------------------------------------------------------------------------------------


def _groups(scales, adapter_ids, ranks, rank: int) -> Iterator[tuple[int, Tensor, int, float]]:
    """(adapter, its rows, its rank, its scale) of every adapter that does something."""
    ids = adapter_ids.reshape(-1)
    for adapter, scale in enumerate(scales.tolist()):
        rows = (ids == adapter).nonzero().view(-1)
        own = rank if ranks is None else int(ranks[adapter])
        if len(rows) and own and scale != 0:
            yield adapter, rows, own, scale


def reference(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks=None):
    """`grouped_lora_linear` as composed in plain torch."""
    return reference_forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks)[0]


def reference_forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks=None):
    """`grouped_lora_linear_forward` as composed in plain torch."""
    tokens = x.reshape(rows_of(x), x.shape[-1])
    y = linear(tokens, weight, bias)
    s = torch.zeros(tokens.shape[0], lora_a.shape[1], dtype=accumulator_of(x.dtype), device=x.device)
    for adapter, rows, rank, scale in _groups(scales, adapter_ids, ranks, lora_a.shape[1]):
        own = scale * linear(tokens[rows].to(lora_a.dtype), lora_a[adapter, :rank])
        delta = linear(own, lora_b[adapter, :, :rank])
        y = y.index_copy(0, rows, (y[rows] + delta).to(y.dtype))
        s[rows, :rank] = own.detach().to(s.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0]), s


def reference_backward(
    grad, x, weight, lora_a, lora_b, scales, adapter_ids, ranks, s, need_x, need_weight, need_bias, need_a, need_b
):
    """`grouped_lora_linear_backward` as composed in plain torch."""
    features, dtype = weight.shape[1], lora_a.dtype
    g = grad.reshape(rows_of(grad), weight.shape[0])
    tokens = None if x is None else x.reshape(g.shape[0], features)
    grad_x, grad_a, grad_b = g @ weight, torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    for adapter, rows, rank, scale in _groups(scales, adapter_ids, ranks, lora_a.shape[1]):
        a, b = lora_a[adapter, :rank], lora_b[adapter, :, :rank]
        grad_s = scale * (g[rows].to(dtype) @ b)
        grad_x[rows] = (grad_x[rows] + grad_s @ a).to(grad.dtype)
        if need_a:
            grad_a[adapter, :rank] = grad_s.t() @ tokens[rows].to(dtype)
        grad_b[adapter, :, :rank] = g[rows].to(dtype).t() @ s[rows, :rank].to(dtype)
    none = grad.new_empty(0)
    return (
        grad_x.reshape(*grad.shape[:-1], features) if need_x else none,
        g.t() @ tokens if need_weight else none,
        g.sum(0) if need_bias else none,
        grad_a if need_a else none,
        grad_b if need_b else none,
    )


# ---- fake ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("peftops::grouped_lora_linear")
def _(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("peftops::grouped_lora_linear_forward")
def _(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks=None):
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        x.new_empty(rows_of(x), lora_a.shape[1], dtype=accumulator_of(x.dtype)),
    )


@torch.library.register_fake("peftops::grouped_lora_linear_backward")
def _(grad, x, weight, lora_a, lora_b, scales, adapter_ids, ranks, s, need_x, need_weight, need_bias, need_a, need_b):
    none = (0,)
    return (
        grad.new_empty((*grad.shape[:-1], weight.shape[1]) if need_x else none),
        grad.new_empty(weight.shape if need_weight else none),
        grad.new_empty(weight.shape[0] if need_bias else none),
        lora_a.new_empty(lora_a.shape) if need_a else grad.new_empty(none),
        lora_b.new_empty(lora_b.shape) if need_b else grad.new_empty(none),
    )


# ---- backward --------------------------------------------------------------------------------------------------------


class _GroupedLoRALinear(Function):
    """grouped_lora_linear_forward with its gradient."""

    @staticmethod
    def forward(*args):
        return below_autograd(_ops.grouped_lora_linear_forward.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _bias, lora_a, lora_b, scales, adapter_ids, ranks = inputs
        _y, s = output
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        _, need_weight, _, need_a, *_ = ctx.needs_input_grad
        kept_x = x if need_weight or need_a else None
        ctx.save_for_backward(kept_x, weight, lora_a, lora_b, scales, adapter_ids, ranks, s)

    @staticmethod
    def backward(ctx, grad, _grad_s):
        if grad is None:
            return (None,) * 8
        needs = ctx.needs_input_grad[:5]
        args = (grad, *ctx.saved_tensors, *needs)
        grads = differentiate(_ops.grouped_lora_linear_backward.default, _GroupedLoRALinearBackward, args)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


_GroupedLoRALinearBackward = without_gradient(
    "grouped_lora_linear", lambda *args: below_autograd(_ops.grouped_lora_linear_backward.default, args)
)


def _grouped_lora_linear(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks=None):
    args = (x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks)
    if records(args):
        return _GroupedLoRALinear.apply(*args)[0]
    return below_autograd(_ops.grouped_lora_linear.default, args)


def _grouped_lora_linear_forward(x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks=None):
    args = (x, weight, bias, lora_a, lora_b, scales, adapter_ids, ranks)
    return differentiate(_ops.grouped_lora_linear_forward.default, _GroupedLoRALinear, args)


library.impl("grouped_lora_linear", _grouped_lora_linear, "Autograd")
library.impl("grouped_lora_linear_forward", _grouped_lora_linear_forward, "Autograd")
library.impl(
    "grouped_lora_linear_backward",
    lambda *a: differentiate(_ops.grouped_lora_linear_backward.default, _GroupedLoRALinearBackward, a),
    "Autograd",
)


# ---- autocast --------------------------------------------------------------------------------------------------------


register_autocast(_ops.grouped_lora_linear.default, autocast_linear)
register_autocast(_ops.grouped_lora_linear_forward.default)
register_autocast(_ops.grouped_lora_linear_backward.default)


# ---- samples ---------------------------------------------------------------------------------------------------------

# (leading sizes, K, N, r, L, how ids and ranks are drawn): zero, one, ragged, wider than a block, few rows.
_SHAPES = (
    ((3,), 5, 7, 2, 2, "any"),
    ((2, 19), 33, 17, 4, 3, "any"),
    ((), 8, 8, 1, 2, "any"),
    ((0,), 8, 8, 2, 2, "any"),
    ((4,), 0, 5, 2, 2, "any"),
    ((4,), 5, 0, 2, 2, "any"),
    ((170,), 129, 65, 17, 2, "sorted"),
    ((17,), 300, 271, 8, 40, "any"),
    ((1,), 256, 96, 16, 1, "named"),
    ((16,), 31, 127, 8, 3, "sorted"),
    ((14,), 30, 40, 6, 3, "ranks"),
    ((2, 33), 16, 24, 72, 4, "ranks"),
    ((9, 2), 12, 10, 4, 3, "none"),
    ((6,), 12, 10, 4, 0, "none"),
    ((21,), 12, 10, 0, 2, "any"),
    ((50,), 24, 30, 8, 1, "any"),
)


def _parts(device, dtype, seed) -> Iterator[tuple[str, tuple]]:
    """(label, arguments) over shapes, dtypes, strides and ids."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def integers(low, high, shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=generator).to(device, dtype)

    def operands(lead, k, n, r, adapters, factor_dtype, bias):
        x, weight = randn(*lead, k), randn(n, k) / max(k, 1) ** 0.5
        a = randn(adapters, r, k, dtype=factor_dtype) / max(k, 1) ** 0.5
        b = randn(adapters, n, r, dtype=factor_dtype) / max(r, 1) ** 0.5
        scales = torch.rand(adapters, generator=generator).to(device) + 0.5
        return x, weight, randn(n) if bias else None, a, b, scales

    for index, (lead, k, n, r, adapters, kind) in enumerate(_SHAPES):
        least = 0 if kind == "named" else -1
        ids = integers(least, adapters if kind != "none" else 0, lead)
        ids = ids.reshape(-1).sort().values.reshape(lead) if kind == "sorted" else ids
        ranks = integers(r // 2, r + 1, (adapters,)) if kind == "ranks" else None
        label = f"{list(lead)}x{k}->{n} r{r} of {adapters}, {kind} ids"
        yield label, (*operands(lead, k, n, r, adapters, dtype, index % 2 == 0), ids, ranks)
    if dtype in (torch.bfloat16, torch.float16):
        wide = operands((2, 19), 40, 31, 6, 3, torch.float32, True)
        yield "float32 factors", (*wide, integers(-1, 3, (2, 19)), None)
        few = operands((5,), 30, 40, 6, 3, torch.float32, True)
        yield "float32 factors, few rows", (*few, integers(-1, 3, (5,)), None)
    narrow = operands((40,), 24, 18, 5, 3, dtype, True)
    ids, ranks = integers(-1, 3, (40,), torch.int32), torch.tensor([2, 0, 5], dtype=torch.int32, device=device)
    yield "int32", (*narrow, ids, ranks)
    x, weight, bias, a, b, scales = operands((20, 2), 21, 18, 3, 4, dtype, True)
    yield (
        "transposed",
        (
            x.transpose(0, 1),
            weight.t().contiguous().t(),
            bias,
            a.transpose(1, 2).contiguous().transpose(1, 2),
            b.transpose(0, 2).contiguous().transpose(0, 2),
            scales,
            integers(-1, 4, (20, 2)).t(),
            None,
        ),
    )
    x, weight, bias, a, b, scales = operands((19,), 16, 18, 3, 4, dtype, True)
    spread = (x[:1].expand(19, 16), weight, bias[:1].expand(18), a[:1].expand(4, 3, 16), b[:, :1].expand(4, 18, 3))
    ranks = torch.tensor([2], device=device).expand(4)
    yield "expanded", (*spread, scales[:1].expand(4), integers(0, 4, (1,)).expand(19), ranks)
    x, weight, bias, a, b, scales = operands((18,), 48, 40, 8, 6, dtype, True)
    strided = (x[:, 3:20], weight[1::2, 5:22], bias[::2], a[::2, :, 1:18], b[1::2, :20], scales[::2])
    ids, ranks = integers(-1, 3, (36,))[::2], torch.tensor([8, 0, 3, 0, 7], device=device)[::2]
    yield "sliced", (*strided, ids, ranks)
    yield "few rows, sliced", (strided[0][:6], *strided[1:], ids[:6], ranks)
    x, weight, bias, a, b, _ = operands((22,), 10, 9, 2, 3, dtype, True)
    yield (
        "a scale of 0",
        (x, weight, bias, a, b, torch.tensor([0.5, 0.0, -2.0], device=device), integers(-1, 3, (22,)), None),
    )


def _samples(device, dtype, seed) -> Iterator[Sample]:
    for label, args in _parts(device, dtype, seed):
        yield Sample(args, label=label)


def _backward_samples(device, dtype, seed) -> Iterator[Sample]:
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    for index, sample in enumerate(_samples(device, dtype, seed)):
        x, weight, _bias, lora_a, lora_b, scales, adapter_ids, ranks = sample.args
        y, s = reference_forward(*sample.args)
        grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        needs = [True] * 5 if index % 3 == 0 else [bool((index >> i) & 1) for i in range(5)]
        kept_x = x if needs[1] or needs[3] else None
        args = (grad, kept_x, weight, lora_a, lora_b, scales, adapter_ids, ranks, s, *needs)
        yield Sample(args, label=sample.label)


def _error_parts(device):
    """(changed arguments, message) for grouped_lora_linear."""
    x, weight, bias = torch.zeros(3, 4, device=device), torch.zeros(5, 4, device=device), torch.zeros(5, device=device)
    lora_a, lora_b = torch.zeros(6, 2, 4, device=device), torch.zeros(6, 5, 2, device=device)
    scales, ids = torch.ones(6, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    good = dict(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, scales=scales, adapter_ids=ids, ranks=None)
    ranks = torch.full((6,), 2, device=device)
    for changed, match in (
        ({"x": x.long()}, "x has dtype int64, but must be float32"),
        ({"x": x[0, 0]}, "x must be .*no dimension"),
        ({"x": x[:, :3]}, "weight has 4 columns, but x has 3 features"),
        ({"weight": weight[0]}, r"weight must be \[out_features, features\], but has shape \[4\]"),
        ({"weight": weight.double()}, "weight has dtype float64, but x has float32"),
        ({"bias": bias[:4]}, r"bias must have shape \[5\], but has \[4\]"),
        ({"bias": bias.half()}, "bias has dtype float16, but x has float32"),
        ({"lora_a": lora_a[..., :3]}, "lora_a has 3 columns, but x has 4 features"),
        ({"lora_a": lora_a[0]}, r"lora_a must be \[adapters, rank, features\], but has shape \[2, 4\]"),
        ({"lora_b": lora_b[0]}, r"lora_b must be \[adapters, out_features, rank\], but has shape \[5, 2\]"),
        ({"lora_b": lora_b[:4]}, "lora_b has 4 adapters, but lora_a has 6"),
        ({"lora_b": lora_b[:, :4]}, "lora_b has 4 rows, but weight has 5"),
        ({"lora_b": lora_b[..., :1]}, "lora_b has 1 columns, but lora_a has 2 rows"),
        ({"lora_b": lora_b.double()}, "lora_b has dtype float64, but lora_a has float32"),
        ({"lora_a": lora_a.half(), "lora_b": lora_b.half()}, "lora_a has dtype float16, but must have x's, float32"),
        ({"scales": scales[:4]}, r"scales must have shape \[6\], one for each adapter, but has \[4\]"),
        ({"scales": scales.double()}, "scales has dtype float64, but it must be float32"),
        ({"adapter_ids": ids[:2]}, r"adapter_ids must have the leading sizes of x, .*\[3, 4\], but has shape \[2\]"),
        ({"adapter_ids": ids.view(3, 1)}, r"adapter_ids must have the leading sizes of x, .* but has shape \[3, 1\]"),
        ({"adapter_ids": ids.float()}, "adapter_ids has dtype float32, but must be int32 or int64"),
        ({"ranks": ranks[:4]}, r"ranks must have shape \[6\], one for each adapter, but has \[4\]"),
        ({"ranks": ranks.short()}, "ranks has dtype int16, but must be int32 or int64"),
    ):
        yield {**good, **changed}, match
    if device.type != "cpu":
        return
    for changed, match in (
        ({"adapter_ids": torch.tensor([0, 6, 1])}, r"adapter_ids\[1\] is 6, but lora_a has 6 adapters"),
        ({"adapter_ids": torch.tensor([0, -1, -2])}, r"adapter_ids\[2\] is -2, but must be -1 \(none\) or more"),
        (
            {"x": x.view(3, 1, 4), "adapter_ids": torch.tensor([[0], [0], [9]], dtype=torch.int32)},
            r"adapter_ids\[2, 0\] is 9, but lora_a has 6 adapters",
        ),
        ({"ranks": torch.tensor([2, 2, 3, 2, 2, 2])}, r"ranks\[2\] is 3, but must be in \[0, 2\]"),
        ({"ranks": torch.tensor([2, -1, 2, 2, 2, 2])}, r"ranks\[1\] is -1, but must be in \[0, 2\]"),
    ):
        yield {**good, **changed}, match


def _errors(device) -> Iterator[ErrorSample]:
    for arguments, match in _error_parts(device):
        yield ErrorSample(Sample(tuple(arguments.values())), f"grouped_lora_linear: {match}")


def _backward_errors(device) -> Iterator[ErrorSample]:
    grad, x, weight = (torch.zeros(*s, device=device) for s in ((3, 5), (3, 4), (5, 4)))
    a, b, s = (torch.zeros(*s, device=device) for s in ((6, 2, 4), (6, 5, 2), (3, 2)))
    scales, ids = torch.ones(6, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    good = dict(grad=grad, x=x, weight=weight, lora_a=a, lora_b=b, scales=scales, adapter_ids=ids, ranks=None, s=s)
    for changed, match in (
        ({"grad": grad[:, :4]}, r"grad must be \[..., 5\], but has shape \[3, 4\]"),
        ({"grad": grad.double()}, "grad has dtype float64, but weight has float32"),
        ({"x": None}, "x is needed for the gradients of weight and lora_a"),
        ({"x": x[:2]}, "x has 2 rows, but grad has 3"),
        ({"adapter_ids": ids[:2]}, r"adapter_ids must have the leading sizes of grad, .* but has shape \[2\]"),
        ({"scales": scales.half()}, "scales has dtype float16, but it must be float32"),
        ({"s": s[:, :1]}, r"s must be .*\[3, 2\], but has shape \[3, 1\]"),
    ):
        yield ErrorSample(
            Sample((*{**good, **changed}.values(), *(True,) * 5)), f"grouped_lora_linear_backward: {match}"
        )


_ROWS = ("x", "adapter_ids")

register(
    Contract(
        "peftops::grouped_lora_linear",
        reference,
        _samples,
        _errors,
        _FLOATS,
        _DIFFERENTIABLE,
        autocast=("x", "weight", "bias"),
        rows=_ROWS,
    )
)
register(
    Contract(
        "peftops::grouped_lora_linear_forward",
        reference_forward,
        _samples,
        _errors,
        _FLOATS,
        _DIFFERENTIABLE,
        rows=_ROWS,
    )
)
register(
    Contract("peftops::grouped_lora_linear_backward", reference_backward, _backward_samples, _backward_errors, _FLOATS)
)
