r"""LoRA on a packed frozen weight, for few rows on the CPU: y = x W^T + bias + scale * x A^T B^T, without gradients.

:func:`pack_weight` lays W [N, K] out in the order in which a product of few rows reads it, the same for every dtype and
on every machine:

    packed [ceil(N / 16), ceil(K / 2), 16, 2]     packed[i, k, j, l] = W[16 i + j, 2 k + l], zero beyond W

:func:`lora_linear_packed` takes it in the place of W: x [..., K], bias [N] or None, lora_a A [r, K], lora_b B [N, r]
-> y [..., N], dtypes as for `lora_linear`. x W^T and S B^T, S = scale * x A^T, are one sum with one rounding. Any
number of rows; a row's result does not depend on the rows beside it. A scale of 0 means no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .contract import Contract, ErrorSample, Sample, register
from .dispatch import below_autograd, library, records, register_autocast

_ops = torch.ops.peftops
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LANES = 16


# ---- public calls ----------------------------------------------------------------------------------------------------


def pack_weight(weight: Tensor) -> Tensor:
    """`weight` [N, K], of any strides, as :func:`lora_linear_packed` wants it: a copy, in the module's layout.

    Raises RuntimeError for a wrong dtype or dimension, for a weight that asks for a gradient while grad mode is on, and
    for a tensor that is not on the CPU.
    """
    return _ops.pack_weight.default(weight)


def lora_linear_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    out_features: int,
) -> Tensor:
    """y = x W^T + bias + scale * x A^T B^T with packed = pack_weight(W); shapes and dtypes in the module's docstring.

    scale: a 0-d float32 tensor. out_features: N, which `packed` does not tell. Autocast changes nothing.

    Raises RuntimeError naming the argument for a wrong dtype, dimension or size, for one that asks for a gradient while
    grad mode is on, and for tensors that are not on the CPU.
    """
    return _ops.lora_linear_packed.default(x, packed, bias, lora_a, lora_b, scale, out_features)


# ---- reference -------------------------------------------------------------------------------------------------------


def reference_pack(weight):
    """`pack_weight` in plain torch."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, columns % 2, 0, -rows % _LANES))
    return padded.reshape(padded.shape[0] // _LANES, _LANES, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()


def reference(x, packed, bias, lora_a, lora_b, scale, out_features):
    """`lora_linear_packed` as composed in plain torch. What lies beyond K in `packed` meets zeros."""
    blocks, steps, lanes, pair = packed.shape
    weight = packed.transpose(1, 2).reshape(blocks * lanes, steps * pair)[:out_features]
    padded = torch.nn.functional.pad(x, (0, weight.shape[1] - x.shape[-1]))
    y = torch.nn.functional.linear(padded, weight, bias)
    if scale == 0:
        return y
    delta = torch.nn.functional.linear(torch.nn.functional.linear(x.to(lora_a.dtype), lora_a), lora_b)
    return (y + scale * delta).to(y.dtype)


# ---- fake ------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("peftops::pack_weight")
def _(weight):
    rows, columns = weight.shape
    return weight.new_empty((rows + _LANES - 1) // _LANES, (columns + 1) // 2, _LANES, 2)


@torch.library.register_fake("peftops::lora_linear_packed")
def _(x, packed, bias, lora_a, lora_b, scale, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


# ---- without gradients, on the CPU, whatever autocast says ----------------------------------------------------------


def _without_gradients(overload):
    names = [argument.name for argument in overload._schema.arguments]
    op = overload._schema.name.split("::")[1]

    def call(*args):
        if records(args):
            asking = next(n for n, a in zip(names, args, strict=True) if isinstance(a, Tensor) and a.requires_grad)
            raise RuntimeError(
                f"{op}: {asking} asks for a gradient, which {op} does not have: call it under torch.no_grad(), or "
                "lora_linear on the weight itself"
            )
        return below_autograd(overload, args)

    return call


def _only_cpu(overload):
    op = overload._schema.name.split("::")[1]

    def call(*args):
        device = next(a.device for a in args if isinstance(a, Tensor) and a.device.type != "cpu")
        raise RuntimeError(f"{op}: has kernels for the CPU only, but is called on {device}; use lora_linear there")

    return call


for _overload in (_ops.pack_weight.default, _ops.lora_linear_packed.default):
    _name = _overload._schema.name.split("::")[1]
    library.impl(_name, _without_gradients(_overload), "Autograd")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_overload._schema.name, "CUDA"):  # a reason of the loader
        library.impl(_name, _only_cpu(_overload), "CUDA")
    register_autocast(_overload)


# ---- samples ---------------------------------------------------------------------------------------------------------

# (leading sizes, K, N, r): zero, one, ragged, every size of a strip of rows, more rows than go through at a time, a
# contraction longer than a piece.
_SHAPES = (
    ((3,), 5, 7, 2),
    ((2, 9), 33, 17, 4),
    ((), 8, 8, 1),
    ((0,), 8, 8, 2),
    ((4,), 0, 5, 2),
    ((4,), 5, 0, 2),
    ((70,), 129, 65, 17),
    ((1,), 300, 96, 16),
    ((15,), 63, 127, 5),
    ((2, 33), 16, 24, 72),
)


class _Draws:
    def __init__(self, device, dtype, seed):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device="cpu").manual_seed(seed)

    def randn(self, *shape, dtype=None) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.device, dtype or self.dtype)

    def operands(self, lead, k, n, r, factor_dtype=None, bias=True):
        x, weight = self.randn(*lead, k), self.randn(n, k) / max(k, 1) ** 0.5
        lora_a = self.randn(r, k, dtype=factor_dtype) / max(k, 1) ** 0.5
        lora_b = self.randn(n, r, dtype=factor_dtype) / max(r, 1) ** 0.5
        return x, weight, self.randn(n) if bias else None, lora_a, lora_b


def _samples(device, dtype, seed) -> Iterator[Sample]:
    draws = _Draws(device, dtype, seed)

    def sample(label, operands, scale=0.75):
        x, weight, bias, lora_a, lora_b = operands
        args = (x, reference_pack(weight), bias, lora_a, lora_b, torch.tensor(scale, device=device), weight.shape[0])
        return Sample(args, label=label)

    for index, (lead, k, n, r) in enumerate(_SHAPES):
        yield sample(f"{list(lead)}x{k}->{n} r{r}", draws.operands(lead, k, n, r, bias=index % 2 == 0))
    if dtype in (torch.bfloat16, torch.float16):
        yield sample("float32 factors", draws.operands((2, 19), 41, 31, 6, torch.float32), 2.0)
    x, weight, bias, a, b = draws.operands((20, 2), 21, 18, 3)
    yield sample("transposed", (x.transpose(0, 1), weight, bias, a.t().contiguous().t(), b.t().contiguous().t()), -1.5)
    x, weight, bias, a, b = draws.operands((18,), 48, 40, 8)
    yield sample("sliced", (x[:6, 3:20], weight[1::2, 5:22], bias[::2], a[:, 1:18], b[:20]))
    x, weight, bias, a, b = draws.operands((19,), 24, 18, 3)
    yield sample("expanded", (x[:1].expand(19, 24), weight, bias[:1].expand(18), a, b[:1].expand(18, 3)), 1.0)
    yield sample("scale 0", draws.operands((6,), 10, 9, 2), 0.0)


def _pack_samples(device, dtype, seed) -> Iterator[Sample]:
    draws = _Draws(device, dtype, seed)
    for rows, columns in ((0, 4), (4, 0), (1, 1), (16, 32), (17, 33), (40, 131)):
        yield Sample((draws.randn(rows, columns),), label=f"{rows}x{columns}")
    yield Sample((draws.randn(29, 37).t(),), label="transposed")
    yield Sample((draws.randn(40, 50)[3:36:2, 5:50:3],), label="sliced")
    yield Sample((draws.randn(1, 37).expand(19, 37),), label="expanded")


def _pack_errors(device) -> Iterator[ErrorSample]:
    weight = torch.zeros(5, 4, device=device)
    for changed, match in (
        (weight[0], r"weight must be \[out_features, features\], but has shape \[4\]"),
        (weight.int(), "weight has dtype int32, but must be float32"),
        (weight.clone().requires_grad_(), "weight asks for a gradient, which pack_weight does not have"),
    ):
        yield ErrorSample(Sample((changed,)), f"pack_weight: {match}")


def _errors(device) -> Iterator[ErrorSample]:
    x, packed, bias = (torch.zeros(s, device=device) for s in ((3, 4), (1, 2, 16, 2), (5,)))
    a, b, scale = (torch.zeros(s, device=device) for s in ((2, 4), (5, 2), ()))
    good = dict(x=x, packed=packed, bias=bias, lora_a=a, lora_b=b, scale=scale, out_features=5)
    expected = (
        r"packed must be what pack_weight returned for \[{}, {}\], \[{}, {}, 16, 2\], but has shape \[1, 2, 16, 2\]"
    )
    for changed, match in (
        ({"x": x.long()}, "x has dtype int64, but must be float32"),
        ({"x": x[0, 0]}, "x must be .*no dimension"),
        ({"x": x[:, :2]}, expected.format(5, 2, 1, 1)),
        ({"x": x.double()}, "packed has dtype float32, but x has float64"),
        ({"packed": packed[0, 0]}, r"packed must be .*but has shape \[16, 2\]"),
        ({"out_features": 17}, expected.format(17, 4, 2, 2)),
        ({"out_features": -1}, "out_features is -1, but must not be negative"),
        ({"out_features": 6}, "lora_b has 5 rows, but out_features is 6"),
        ({"bias": bias[:4]}, r"bias must have shape \[5\], but has \[4\]"),
        ({"bias": bias.half()}, "bias has dtype float16, but x has float32"),
        ({"lora_a": a[0]}, r"lora_a must be \[rank, features\], but has shape \[4\]"),
        ({"lora_a": a[:, :3]}, "lora_a has 3 columns, but x has 4 features"),
        ({"lora_a": a.half(), "lora_b": b.half()}, "lora_a has dtype float16, but must have x's, float32"),
        ({"lora_b": b[:, 0]}, r"lora_b must be \[out_features, rank\], but has shape \[5\]"),
        ({"lora_b": b[:, :1]}, "lora_b has 1 columns, but lora_a has 2 rows"),
        ({"lora_b": b.double()}, "lora_b has dtype float64, but lora_a has float32"),
        ({"scale": scale.view(1)}, r"scale must have shape \[\], but has \[1\]"),
        ({"scale": scale.double()}, "scale has dtype float64, but it must be float32"),
        ({"lora_a": a.clone().requires_grad_()}, "lora_a asks for a gradient, which lora_linear_packed does not have"),
    ):
        yield ErrorSample(Sample(tuple({**good, **changed}.values())), f"lora_linear_packed: {match}")


register(Contract("peftops::pack_weight", reference_pack, _pack_samples, _pack_errors, _FLOATS, devices=("cpu",)))
register(Contract("peftops::lora_linear_packed", reference, _samples, _errors, _FLOATS, rows=("x",), devices=("cpu",)))
