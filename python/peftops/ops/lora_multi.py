r"""Several LoRA projections of one x: y_j = x W_j^T + bias_j + scale_j * drop_j(x) A_j^T B_j^T, j < P, as
:mod:`peftops.ops.lora` makes each (Hu et al., "LoRA", ICLR 2022, equation 3); q, k and v, or gate and up.

Shapes: x [..., K], weights W_j [N_j, K], biases [N_j] or None, lora_a A_j [r_j, K], lora_b B_j [N_j, r_j], scales [P],
seeds [P] -> y_j [..., N_j]. N_j and r_j may differ from projection to projection.

Dtypes: as in :mod:`peftops.ops.lora`; all factors share one dtype. scales are float32, seeds int64.

Each projection has a mask of its own, the one that `lora_linear` draws for seeds[j]. On the CPU every y_j has the bits
of `lora_linear`. With M tokens and R = sum of r_j, backward keeps x once, the S_j side by side [M, R] in float32 and P
bits per element of x:

    dS_j = scale_j / (1 - p) * dY_j B_j     dB_j = dY_j^T S_j     dA_j = dS_j^T keep_j(x)
    dX = sum_j dY_j W_j + keep_j(dS_j A_j)

A result that nothing was made from (no gradient arrives) takes no part in it. scales are not differentiated;
scales[j] = 0 means no adapter: y_j has the base linear's bits, A_j and B_j get zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import lora
from .contract import Contract, ErrorSample, Sample, register
from .dispatch import (
    Function,
    autocast_cast,
    autocast_factors,
    below_autograd,
    library,
    records,
    register_autocast,
    without_gradient,
)

_ops = torch.ops.peftops
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIFFERENTIABLE = ("x", "weights", "biases", "lora_a", "lora_b")


# ---- public call -----------------------------------------------------------------------------------------------------


def lora_linear_multi(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Tensor,
    dropout_p: float = 0.0,
    seeds: Tensor | None = None,
) -> list[Tensor]:
    """y_j = x W_j^T + bias_j + scale_j * drop_j(x) A_j^T B_j^T for each projection; shapes and dtypes as in the
    module's docstring.

    scales: float32 [P] on x's device; they may change between calls (no recompilation).
    dropout_p: in [0, 1). Above 0 it needs `seeds`, an int64 tensor [P] on x's device.

    Raises RuntimeError naming the argument for no projection, lists of unequal length, and a wrong dtype, dimension,
    size or device.
    """
    return _ops.lora_linear_multi.default(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds)


# ---- reference -------------------------------------------------------------------------------------------------------


def _projections(weights, biases, lora_a, lora_b, scales, seeds) -> Iterator[tuple]:
    """(weight, bias, lora_a, lora_b, scale, seed) of each projection."""
    keys = [None] * len(weights) if seeds is None else seeds.split(1)
    return zip(weights, biases, lora_a, lora_b, scales.tolist(), keys, strict=True)


def reference(x, weights, biases, lora_a, lora_b, scales, dropout_p=0.0, seeds=None):
    """`lora_linear_multi` as composed in plain torch."""
    return [
        lora.reference(x, weight, bias, a, b, scale, dropout_p, seed)
        for weight, bias, a, b, scale, seed in _projections(weights, biases, lora_a, lora_b, scales, seeds)
    ]


def reference_forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds):
    """`lora_linear_multi_forward` as composed in plain torch."""
    ys, s, masks = zip(
        *(
            lora.reference_forward(x, weight, bias, a, b, scale, None, dropout_p, seed)
            for weight, bias, a, b, scale, seed in _projections(weights, biases, lora_a, lora_b, scales, seeds)
        ),
        strict=True,
    )
    return list(ys), torch.cat(s, dim=1), torch.stack(masks) if dropout_p > 0 else masks[0]


def reference_backward(
    grads,
    x,
    weights,
    lora_a,
    lora_b,
    scales,
    dropout_p,
    s,
    masks,
    need_x,
    need_weight,
    need_bias,
    need_a,
    need_b,
):
    """`lora_linear_multi_backward` as composed in plain torch."""
    ranks = [a.shape[0] for a in lora_a]
    sums = s.split(ranks, dim=1)
    masks = masks if dropout_p > 0 else [masks] * len(ranks)
    none = next(grad for grad in grads if grad is not None).new_empty(0)
    grad_x, found = None, []
    for j, scale in enumerate(scales.tolist()):
        if grads[j] is None:
            found.append((none, none, none, none))
            continue
        operands = (grads[j], x, weights[j], lora_a[j], lora_b[j], scale, None, dropout_p, sums[j], masks[j])
        needs = (need_x, need_weight[j], need_bias[j], need_a[j], need_b[j])
        part, *others = lora.reference_backward(*operands, *needs)
        grad_x = part if grad_x is None else grad_x + part
        found.append(others)
    return grad_x, *(list(lists) for lists in zip(*found, strict=True))


# ---- fake ------------------------------------------------------------------------------------------------------------


def _empty_results(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.register_fake("peftops::lora_linear_multi")
def _(x, weights, biases, lora_a, lora_b, scales, dropout_p=0.0, seeds=None):
    return _empty_results(x, weights)


@torch.library.register_fake("peftops::lora_linear_multi_forward")
def _(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds):
    rows = lora.rows_of(x)
    masks = (len(weights), rows, (x.shape[-1] + 7) // 8) if dropout_p > 0 else (0,)
    return (
        _empty_results(x, weights),
        x.new_empty(rows, sum(a.shape[0] for a in lora_a), dtype=lora.accumulator_of(x.dtype)),
        x.new_empty(masks, dtype=torch.uint8),
    )


@torch.library.register_fake("peftops::lora_linear_multi_backward")
def _(
    grads,
    x,
    weights,
    lora_a,
    lora_b,
    scales,
    dropout_p,
    s,
    masks,
    need_x,
    need_weight,
    need_bias,
    need_a,
    need_b,
):
    grad = next(grad for grad in grads if grad is not None)

    def like(tensors, needs):
        asked = (need and g is not None for need, g in zip(needs, grads, strict=True))
        return [t.new_empty(t.shape) if ask else grad.new_empty(0) for t, ask in zip(tensors, asked, strict=True)]

    return (
        grad.new_empty((*grad.shape[:-1], weights[0].shape[1]) if need_x else (0,)),
        like(weights, need_weight),
        like([weight.new_empty(weight.shape[0]) for weight in weights], need_bias),
        like(lora_a, need_a),
        like(lora_b, need_b),
    )


# ---- backward --------------------------------------------------------------------------------------------------------
# Autograd sees tensors that are arguments, not those in a list: the functions below take and return the lists in a row.


def _in_lists(flat: Sequence, lists: int) -> list[list]:
    """`flat` as so many lists of equal length."""
    count = len(flat) // lists
    return [list(flat[i * count : (i + 1) * count]) for i in range(lists)]


class _LoRALinearMulti(Function):
    """lora_linear_multi_forward with its gradient: x, scales, dropout_p, seeds, *weights, *biases, *lora_a, *lora_b."""

    @staticmethod
    def forward(x, scales, dropout_p, seeds, *flat):
        args = (x, *_in_lists(flat, 4), scales, dropout_p, seeds)
        ys, s, masks = below_autograd(_ops.lora_linear_multi_forward.default, args)
        return (*ys, s, masks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scales, dropout_p, _seeds, *flat = inputs
        *_ys, s, masks = output
        ctx.mark_non_differentiable(s, masks)
        ctx.set_materialize_grads(False)
        weights, _biases, lora_a, lora_b = _in_lists(flat, 4)
        need_weight, _, need_a, _ = _in_lists(ctx.needs_input_grad[4:], 4)
        kept_x = x if any(need_weight) or any(need_a) else None
        ctx.save_for_backward(kept_x, scales, s, masks, *weights, *lora_a, *lora_b)
        ctx.dropout_p = dropout_p

    @staticmethod
    def backward(ctx, *grads):
        *grads, _grad_s, _grad_masks = grads
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        x, scales, s, masks, *flat = ctx.saved_tensors
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        args = (grads, x, *_in_lists(flat, 3), scales, ctx.dropout_p, s, masks, need_x, *_in_lists(needs, 4))
        grad_x, *found = _backward(*args)
        asked = [need and grad is not None for need, grad in zip(needs, grads * 4, strict=True)]
        found = [g if ask else None for g, ask in zip((g for part in found for g in part), asked, strict=True)]
        return (grad_x if need_x else None, None, None, None, *found)


def _flat_backward(rest, x, scales, s, masks, *flat):
    """lora_linear_multi_backward: `rest`, then *grads, *weights, *lora_a, *lora_b."""
    dropout_p, needs = rest
    grads, *operands = _in_lists(flat, 4)
    args = (grads, x, *operands, scales, dropout_p, s, masks, *needs)
    grad_x, *found = below_autograd(_ops.lora_linear_multi_backward.default, args)
    return (grad_x, *(g for part in found for g in part))


_LoRALinearMultiBackward = without_gradient("lora_linear_multi", _flat_backward)


def _lora_linear_multi(x, weights, biases, lora_a, lora_b, scales, dropout_p=0.0, seeds=None):
    flat = (*weights, *biases, *lora_a, *lora_b)
    # Lists of unequal length are left to the operator's own check.
    if records((x, *flat)) and len(flat) == 4 * len(weights):
        return list(_LoRALinearMulti.apply(x, scales, dropout_p, seeds, *flat)[: len(weights)])
    args = (x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds)
    return below_autograd(_ops.lora_linear_multi.default, args)


def _forward(x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds):
    flat = (*weights, *biases, *lora_a, *lora_b)
    if records((x, *flat)) and len(flat) == 4 * len(weights):
        *ys, s, masks = _LoRALinearMulti.apply(x, scales, dropout_p, seeds, *flat)
        return list(ys), s, masks
    args = (x, weights, biases, lora_a, lora_b, scales, dropout_p, seeds)
    return below_autograd(_ops.lora_linear_multi_forward.default, args)


def _backward(grads, x, weights, lora_a, lora_b, scales, dropout_p, s, masks, *needs):
    flat = (*grads, *weights, *lora_a, *lora_b)
    if records((x, s, *flat)) and len(flat) == 4 * len(weights):
        grad_x, *found = _LoRALinearMultiBackward.apply((dropout_p, needs), x, scales, s, masks, *flat)
        return grad_x, *_in_lists(found, 4)
    args = (grads, x, weights, lora_a, lora_b, scales, dropout_p, s, masks, *needs)
    return below_autograd(_ops.lora_linear_multi_backward.default, args)


library.impl("lora_linear_multi", _lora_linear_multi, "Autograd")
library.impl("lora_linear_multi_forward", _forward, "Autograd")
library.impl("lora_linear_multi_backward", _backward, "Autograd")


# ---- autocast --------------------------------------------------------------------------------------------------------


def _autocast(device: str, overload):
    """x, weights and biases go to the autocast dtype, as for nn.Linear; the factors stay as they are."""

    def call(x, weights, biases, lora_a, lora_b, *rest):
        x = autocast_cast(x, device)
        weights, biases = ([autocast_cast(t, device) for t in tensors] for tensors in (weights, biases))
        lora_a, lora_b = (list(autocast_factors(x, *factors)) for factors in (lora_a, lora_b))
        return overload(x, weights, biases, lora_a, lora_b, *rest)

    return call


register_autocast(_ops.lora_linear_multi.default, _autocast)
register_autocast(_ops.lora_linear_multi_forward.default)
register_autocast(_ops.lora_linear_multi_backward.default)


# ---- samples ---------------------------------------------------------------------------------------------------------

# (leading sizes, K, (N, r) of each projection): zero, one, ragged, one projection and four, a rank above a block.
_SHAPES = (
    ((3,), 5, ((7, 2), (4, 3))),
    ((2, 9), 33, ((17, 4), (17, 1), (20, 9))),
    ((0,), 8, ((8, 2), (3, 1))),
    ((4,), 0, ((5, 2), (2, 2))),
    ((4,), 5, ((0, 2), (6, 2))),
    ((70,), 129, ((65, 17), (33, 5), (65, 17))),
    ((17,), 300, ((71, 8), (64, 8))),
    ((1,), 256, ((48, 16), (16, 16), (16, 16))),
    ((16,), 63, ((127, 5),)),
    ((2, 33), 16, ((24, 72), (10, 3), (8, 40), (9, 1))),
)


def _parts(device, dtype, seed) -> Iterator[tuple[str, tuple]]:
    """(label, arguments) over shapes, dtypes of the factors, strides and dropout."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def call(lead, k, projections, factor_dtype, p, scales=(0.75, -0.5, 2.0, 1.0)):
        x, weights = randn(*lead, k), [randn(n, k) / max(k, 1) ** 0.5 for n, _ in projections]
        biases = [randn(n) if j % 2 == len(lead) % 2 else None for j, (n, _) in enumerate(projections)]
        a = [randn(r, k, dtype=factor_dtype) / max(k, 1) ** 0.5 for _, r in projections]
        b = [randn(n, r, dtype=factor_dtype) / r**0.5 for n, r in projections]
        keys = torch.randint(-(2**63), 2**63 - 1, (len(projections),), generator=generator)
        scales = torch.tensor(scales[: len(projections)], device=device)
        return x, weights, biases, a, b, scales, p, keys.to(device) if p else None

    for index, (lead, k, projections) in enumerate(_SHAPES):
        p = (0.0, 0.25, 0.5)[index % 3]
        wide = ", ".join(f"{n} r{r}" for n, r in projections)
        yield f"{list(lead)}x{k}->({wide}) p{p}", call(lead, k, projections, dtype, p)
    pair = ((18, 3), (11, 2))
    if dtype in (torch.bfloat16, torch.float16):
        yield "float32 factors", call((2, 19), 40, pair, torch.float32, 0.1)
        yield "float32 factors, few rows", call((5,), 70, pair, torch.float32, 0.0)

    x, weights, biases, a, b, *rest = call((20, 2), 21, pair, dtype, 0.3)
    transposed = [[t.t().contiguous().t() for t in factors] for factors in (weights, a)]
    yield "transposed", (x.transpose(0, 1), transposed[0], biases, transposed[1], b, *rest)
    x, weights, biases, a, b, scales, *rest = call((18,), 24, pair, dtype, 0.0)
    sliced = [[t[:, 1:18] for t in factors] for factors in (weights, a)]
    strided = (scales.repeat_interleave(2)[::2], *rest)
    yield (
        "sliced",
        (x[:, 3:20], sliced[0], biases, sliced[1], b, *strided),
    )
    yield "few rows, sliced", (x[2:8, 3:20], sliced[0], biases, sliced[1], b, *strided)
    yield "expanded", (x[:1].expand(18, 24), weights, biases, a, [t[:1].expand_as(t) for t in b], scales, *rest)
    yield "one scale 0", call((19,), 10, (*pair, (5, 2)), dtype, 0.5, (0.5, 0.0, 1.0))
    yield "all scales 0", call((6,), 10, pair, dtype, 0.5, (0.0, 0.0))


def _samples(device, dtype, seed) -> Iterator[Sample]:
    for label, args in _parts(device, dtype, seed):
        yield Sample(args, label=label)


def _backward_samples(device, dtype, seed) -> Iterator[Sample]:
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    for index, (label, args) in enumerate(_parts(device, dtype, seed)):
        x, weights, _biases, lora_a, lora_b, scales, p, _seeds = args
        ys, s, masks = reference_forward(*args)
        grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device, dtype) for y in ys]
        if index % 3 == 1 and len(grads) > 1:
            grads[index % len(grads)] = None
        count = len(weights)
        needs = [[index % 3 == 0 or bool((index + i + j) % 3) for j in range(count)] for i in range(4)]
        kept_x = x if any(needs[0]) or any(needs[2]) else None
        need_x = index % 4 != 1
        yield Sample((grads, kept_x, weights, lora_a, lora_b, scales, p, s, masks, need_x, *needs), label=label)


def _error_parts(device) -> Iterator[tuple[dict, str]]:
    """(changed arguments, message) for lora_linear_multi."""

    def zeros(*shape):
        return torch.zeros(*shape, device=device)

    good = dict(
        x=zeros(3, 4),
        weights=[zeros(5, 4), zeros(6, 4)],
        biases=[zeros(5), None],
        lora_a=[zeros(2, 4), zeros(3, 4)],
        lora_b=[zeros(5, 2), zeros(6, 3)],
        scales=zeros(2) + 1,
        dropout_p=0.0,
        seeds=None,
    )
    seeds = torch.zeros(2, dtype=torch.int64, device=device)
    empty = dict(weights=[], biases=[], lora_a=[], lora_b=[], scales=zeros(0))
    halves = {name: [t.half() for t in good[name]] for name in ("lora_a", "lora_b")}

    def second(name, tensor):
        return {name: [good[name][0], tensor]}

    for changed, match in (
        (empty, "weights is empty, but must hold one weight for each projection"),
        ({"biases": good["biases"][:1]}, "biases has 1 elements, but weights has 2"),
        ({"lora_a": good["lora_a"][:1]}, "lora_a has 1 elements, but weights has 2"),
        ({"lora_b": good["lora_b"] * 2}, "lora_b has 4 elements, but weights has 2"),
        ({"x": good["x"].long()}, "x has dtype int64, but must be float32"),
        ({"x": good["x"][0, 0]}, "x must be .*no dimension"),
        ({"x": good["x"][:, :3]}, r"weights\[0\] has 4 columns, but x has 3 features"),
        (second("weights", zeros(6)), r"weights\[1\] must be \[out_features, features\], but has shape \[6\]"),
        (second("weights", zeros(6, 4).double()), r"weights\[1\] has dtype float64, but x has float32"),
        ({"biases": [None, zeros(5)]}, r"biases\[1\] must have shape \[6\], but has \[5\]"),
        ({"biases": [None, zeros(6).half()]}, r"biases\[1\] has dtype float16, but x has float32"),
        (second("lora_a", zeros(3, 3)), r"lora_a\[1\] has 3 columns, but x has 4 features"),
        (second("lora_a", zeros(3)), r"lora_a\[1\] must be \[rank, features\], but has shape \[3\]"),
        (second("lora_b", zeros(6, 2)), r"lora_b\[1\] has 2 columns, but lora_a\[1\] has 3 rows"),
        (second("lora_b", zeros(5, 3)), r"lora_b\[1\] has 5 rows, but weights\[1\] has 6"),
        (second("lora_b", zeros(6, 3).double()), r"lora_b\[1\] has dtype float64, but lora_a\[1\] has float32"),
        (halves, r"lora_a\[0\] has dtype float16, but must have x's, float32"),
        ({"scales": zeros(3)}, r"scales must have shape \[2\], but has \[3\]"),
        ({"scales": zeros(2).double()}, "scales has dtype float64, but it must be float32"),
        ({"dropout_p": 1.0, "seeds": seeds}, r"dropout_p is 1, but must be in \[0, 1\)"),
        ({"dropout_p": 0.5}, "dropout_p is 0.5, which needs seeds"),
        ({"dropout_p": 0.5, "seeds": seeds[:1]}, r"seeds must have shape \[2\], but has \[1\]"),
        ({"dropout_p": 0.5, "seeds": seeds.int()}, "seeds has dtype int32, but it must be int64"),
    ):
        yield {**good, **changed}, match
    narrow = {name: [t if t is None else t.bfloat16() for t in good[name]] for name in ("weights", "biases")}
    mixed = {name: [good[name][0].bfloat16(), good[name][1]] for name in ("lora_a", "lora_b")}
    yield (
        {**good, "x": good["x"].bfloat16(), **narrow, **mixed},
        r"lora_a\[1\] has dtype float32, but lora_a\[0\] has bfloat16",
    )


def _errors(device) -> Iterator[ErrorSample]:
    for arguments, match in _error_parts(device):
        yield ErrorSample(Sample((), arguments), f"lora_linear_multi: {match}")


def _backward_errors(device) -> Iterator[ErrorSample]:
    def zeros(*shape):
        return torch.zeros(*shape, device=device)

    yes = [True, True]
    good = dict(
        grads=[zeros(3, 5), zeros(3, 6)],
        x=zeros(3, 4),
        weights=[zeros(5, 4), zeros(6, 4)],
        lora_a=[zeros(2, 4), zeros(3, 4)],
        lora_b=[zeros(5, 2), zeros(6, 3)],
        scales=zeros(2) + 1,
        dropout_p=0.0,
        s=zeros(3, 5),
        masks=torch.zeros(0, dtype=torch.uint8, device=device),
        need_x=True,
        need_weight=yes,
        need_bias=yes,
        need_a=yes,
        need_b=yes,
    )
    for changed, match in (
        ({"grads": [None, None]}, "grads holds no tensor, but at least one result must have a gradient"),
        ({"grads": good["grads"][:1]}, "grads has 1 elements, but weights has 2"),
        ({"grads": [None, zeros(3, 5)]}, r"grads\[1\] must be \[..., 6\], but has shape \[3, 5\]"),
        ({"grads": [None, zeros(3, 6).double()], "x": good["x"]}, r"grads\[1\] has dtype float64, but weights have"),
        ({"grads": [None, zeros(2, 6)]}, r"grads\[1\] has 2 rows, but s has 3"),
        ({"x": None}, "x is needed for the gradients of weights and lora_a"),
        ({"x": zeros(2, 4)}, "x has 2 rows, but s has 3"),
        ({"s": zeros(3, 4)}, r"s must be .*\[rows, 5\], but has shape \[3, 4\]"),
        ({"dropout_p": 0.5}, r"masks must be .*\[2, 3, 1\], but has shape \[0\]"),
        ({"dropout_p": 1.5}, r"dropout_p is 1.5, but must be in \[0, 1\)"),
        ({"need_b": [True]}, "need_b has 1 elements, but weights has 2"),
    ):
        yield ErrorSample(Sample((), {**good, **changed}), f"lora_linear_multi_backward: {match}")


_ROWS = ("x",)

register(
    Contract(
        "peftops::lora_linear_multi",
        reference,
        _samples,
        _errors,
        _FLOATS,
        _DIFFERENTIABLE,
        autocast=("x", "weights", "biases"),
        rows=_ROWS,
    )
)
register(
    Contract(
        "peftops::lora_linear_multi_forward",
        reference_forward,
        _samples,
        _errors,
        _FLOATS,
        _DIFFERENTIABLE,
        rows=_ROWS,
    )
)
register(
    Contract("peftops::lora_linear_multi_backward", reference_backward, _backward_samples, _backward_errors, _FLOATS)
)
