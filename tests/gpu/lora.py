"""LoRA's calls for a GPU: shapes that no list foresees, sizes of real models, more elements than 32 bits count."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peftops.ops import lora_dropout_mask, lora_linear
from peftops.ops.contract import CONTRACTS, Contract, Sample
from peftops.testing import derive, philox4x32

CONTRACT = CONTRACTS["peftops::lora_linear"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EDGES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 997, 1024)
_RANKS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 64, 65, 96, 128, 200, 256)


def fuzz(device: torch.device, seed: int, index: int) -> tuple[Contract, Sample]:
    """Call number `index`: ragged sizes, strides, offsets, dtypes, dropout, scale; every seventh has many tokens."""
    draw = random.Random(derive(seed, "fuzz", "lora", index))
    m, k, n = (draw.choice(_EDGES) for _ in range(3))
    r = draw.choice(_RANKS)
    if index % 7 == 0:
        m, k, n = draw.randint(1000, 5000), draw.choice((64, 257, 512)), draw.choice((64, 129, 640))
    dtype = DTYPES[index % 3]
    factors = draw.choice((dtype, torch.float32))
    generator = torch.Generator(device="cpu").manual_seed(derive(seed, "fuzz values", index))

    def tensor(rows: int, columns: int, dtype: torch.dtype, size: float) -> torch.Tensor:
        """Values of the given size, laid out in one of the ways in which users hand tensors over."""
        values = (torch.randn(rows, columns, generator=generator) * size).to(device, dtype)
        layout = draw.choice(("contiguous", "contiguous", "transposed", "gaps", "offset"))
        if layout == "transposed":
            return values.t().contiguous().t()
        if layout == "gaps":
            before = draw.randint(0, 16)
            return torch.nn.functional.pad(values, (before, 5), value=torch.nan)[:, before : before + columns]
        if layout == "offset":
            before = draw.randint(1, 16)
            flat = torch.full((before + values.numel(),), torch.nan, device=device, dtype=dtype)
            flat[before:] = values.flatten()
            return flat[before:].view(rows, columns)
        return values

    x, weight = tensor(m, k, dtype, 1.0), tensor(n, k, dtype, k**-0.5)
    a, b = tensor(r, k, factors, k**-0.5), tensor(n, r, factors, r**-0.5)
    bias = tensor(1, n, dtype, 1.0)[0] if draw.random() < 0.5 else None
    p = draw.choice((0.0, 0.0, 0.1, 0.5))
    key = torch.tensor([draw.getrandbits(63)], device=device) if p else None
    label = f"{m}x{k}->{n} r{r} p{p} {_name(dtype)}, factors {_name(factors)}"
    return CONTRACT, Sample((x, weight, bias, a, b, draw.choice((1.0, -0.5, 2.0, 0.3)), p, key), label=label)


#: Calls of a model's size, one or more per path that a plan may take: (M, K, N, r, p, dtype, factors' dtype).
LARGE = (
    (1, 4096, 4096, 16, 0.0, torch.bfloat16, torch.bfloat16),
    (16, 4096, 4096, 8, 0.1, torch.bfloat16, torch.float32),
    (2048, 4096, 4096, 16, 0.1, torch.bfloat16, torch.bfloat16),
    (2048, 4096, 4096, 64, 0.0, torch.bfloat16, torch.float32),
    (2048, 4096, 14336, 16, 0.1, torch.float16, torch.float16),
    (1000, 14336, 4096, 17, 0.1, torch.float16, torch.float32),
    (777, 1023, 2049, 200, 0.5, torch.bfloat16, torch.bfloat16),
    (512, 4096, 4096, 16, 0.1, torch.float32, torch.float32),
)


def large(device: torch.device, index: int) -> tuple[Contract, Sample]:
    """The call that `LARGE[index]` describes."""
    return _call(device, *LARGE[index])


#: Plans for 16-bit types that a device may not take by itself.
FORCED = ("gemm_sm80", "gemm_sm90")


@contextmanager
def taking(forced: str) -> Iterator[None]:
    """The plan of this name is taken where it can be run; empty: the best."""
    if forced:
        os.environ["PEFTOPS_FORCE_PLAN"] = forced
    try:
        yield
    finally:
        os.environ.pop("PEFTOPS_FORCE_PLAN", None)


def every_kernel(device: torch.device) -> Iterator[tuple[Contract, Sample]]:
    """Small calls that reach every kernel of the family: each pair of dtypes, each width of a tile, with dropout.

    The last of them under plans that are forced: each must be made before the next is asked for.
    """
    for dtype in DTYPES:
        for factors in dict.fromkeys((dtype, torch.float32)):
            for rank in (9, 40, 100):
                for p in (0.0, 0.3):
                    yield _call(device, 70, 200, 90, rank, p, dtype, factors)
    for forced in FORCED:
        for dtype, factors in ((torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)):
            for p in (0.0, 0.3):
                with taking(forced):
                    yield _call(device, 150, 200, 264, 9, p, dtype, factors)


def _call(
    device: torch.device, m: int, k: int, n: int, r: int, p: float, dtype: torch.dtype, factors: torch.dtype
) -> tuple[Contract, Sample]:
    generator = torch.Generator(device="cpu").manual_seed(m + k + n + r)

    def tensor(rows: int, columns: int, dtype: torch.dtype, size: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * size).to(device, dtype)

    x, weight = tensor(m, k, dtype, 1.0), tensor(n, k, dtype, k**-0.5)
    a, b = tensor(r, k, factors, k**-0.5), tensor(n, r, factors, r**-0.5)
    key = torch.tensor([m], device=device) if p else None
    label = f"{m}x{k}->{n} r{r} p{p} {_name(dtype)}, factors {_name(factors)}"
    return CONTRACT, Sample((x, weight, None, a, b, 1.0, p, key), label=label)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- more elements than 32 bits count ------------------------------------------------------------------------------


def huge(device: torch.device, rows: int = 600_000) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """(name, bytes that it holds at once, check)."""
    yield "input", 40 << 30, functools.partial(huge_input, device, rows)
    yield "mask", 8 << 30, functools.partial(huge_mask, device, rows)


def huge_input(device: torch.device, rows: int, features: int = 4096) -> None:
    """x has more than 2^31 elements: the last rows' results, dropout bits and gradients are those of the rows alone."""
    tail, rank, out = 64, 16, 24
    generator = torch.Generator(device="cpu").manual_seed(rows)

    def integers(*shape: int, density: float, dtype=torch.bfloat16) -> torch.Tensor:
        values = torch.randint(-1, 2, shape, generator=generator)
        return (values * (torch.rand(shape, generator=generator) < density)).to(device, dtype)

    piece = integers(4096, features, density=0.01)
    x = piece.repeat(-(-rows // 4096), 1)[:rows]
    weight = integers(out, features, density=0.1)
    a = integers(rank, features, density=0.1, dtype=torch.float32).requires_grad_()
    b = integers(out, rank, density=0.2, dtype=torch.float32).requires_grad_()
    x.requires_grad_()
    y = lora_linear(x, weight, None, a, b)
    last = x.detach()[-tail:].clone().requires_grad_()
    y_last = lora_linear(last, weight, None, a, b)
    assert torch.equal(y[-tail:], y_last), "the last rows' output differs from that of the rows alone"
    dy = torch.zeros_like(y)
    dy[-tail:] = integers(tail, out, density=0.2)
    wanted = torch.autograd.grad(y_last, (last, a, b), dy[-tail:].clone())
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy)
    assert torch.equal(dx[-tail:], wanted[0]), "the last rows' gradient differs from that of the rows alone"
    assert not bool(dx[:-tail].any()), "rows without an upstream gradient have one"
    assert torch.equal(da, wanted[1]) and torch.equal(db, wanted[2]), "gradients of the factors are wrong"


def huge_mask(device: torch.device, rows: int, columns: int = 4096) -> None:
    """A mask of more than 2^31 elements: its last rows are what Philox says."""
    tail, key = 3, 0x0123456789ABCDEF
    mask = lora_dropout_mask(torch.tensor([key], device=device), rows, columns, 0.3)[-tail:].cpu()
    row = torch.arange(rows - tail, rows)[:, None].expand(tail, columns // 8)
    column = torch.arange(columns // 8)[None, :].expand(tail, columns // 8)
    zero = torch.zeros_like(row)
    words = philox4x32((column, row & 0xFFFFFFFF, row >> 32, zero), (key & 0xFFFFFFFF, key >> 32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    assert torch.equal(mask, (halves >= round(65536 * 0.3)).reshape(tail, columns)), "the last rows' mask is wrong"
