"""Calls of several projections of one x for a GPU: numbers of projections, ranks and shapes that no list foresees."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from peftops.ops.contract import CONTRACTS, Contract, Sample
from peftops.testing import derive

CONTRACT = CONTRACTS["peftops::lora_linear_multi"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EDGES = (1, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 127, 129, 255, 257, 1024)
_RANKS = (1, 4, 8, 9, 16, 17, 32, 64, 65, 100)


def fuzz(device: torch.device, seed: int, index: int) -> tuple[Contract, Sample]:
    """Call number `index`: one to five projections, ranks alike or not, ragged sizes, strides, dropout, scales."""
    draw = random.Random(derive(seed, "fuzz", "multi", index))
    m, k = draw.choice(_EDGES), draw.choice(_EDGES)
    if index % 7 == 0:
        m, k = draw.randint(1000, 3000), draw.choice((64, 257, 512))
    count = draw.choice((1, 2, 2, 3, 3, 3, 4, 5))
    dtype = DTYPES[index % 3]
    factors = draw.choice((dtype, dtype, torch.float32))
    generator = torch.Generator(device="cpu").manual_seed(derive(seed, "fuzz values", index))
    ranks = [draw.choice(_RANKS)] * count if draw.random() < 0.5 else [draw.choice(_RANKS) for _ in range(count)]
    widths = [draw.choice(_EDGES) for _ in range(count)]

    def tensor(rows: int, columns: int, dtype: torch.dtype, size: float) -> torch.Tensor:
        values = (torch.randn(rows, columns, generator=generator) * size).to(device, dtype)
        layout = draw.choice(("contiguous", "contiguous", "transposed", "gaps"))
        if layout == "transposed":
            return values.t().contiguous().t()
        if layout == "gaps":
            before = draw.randint(0, 16)
            return torch.nn.functional.pad(values, (before, 5), value=torch.nan)[:, before : before + columns]
        return values

    x = tensor(m, k, dtype, 1.0)
    weights = [tensor(n, k, dtype, k**-0.5) for n in widths]
    biases = [tensor(1, n, dtype, 1.0)[0] if draw.random() < 0.5 else None for n in widths]
    a = [tensor(r, k, factors, k**-0.5) for r in ranks]
    b = [tensor(n, r, factors, r**-0.5) for n, r in zip(widths, ranks, strict=True)]
    scales = torch.tensor([draw.choice((1.0, -0.5, 2.0, 0.0)) for _ in range(count)], device=device)
    p = draw.choice((0.0, 0.0, 0.1, 0.5))
    seeds = torch.tensor([draw.getrandbits(63) for _ in range(count)], device=device) if p else None
    label = f"{m}x{k}->{widths} r{ranks} p{p} {_name(dtype)}, factors {_name(factors)}"
    return CONTRACT, Sample((x, weights, biases, a, b, scales, p, seeds), label=label)


#: Calls of a model's size, one or more per path: (M, K, widths, rank, p, dtype, factors' dtype).
LARGE = (
    (1, 4096, (4096, 1024, 1024), 16, 0.0, torch.bfloat16, torch.bfloat16),
    (2048, 4096, (4096, 1024, 1024), 16, 0.1, torch.bfloat16, torch.bfloat16),
    (2048, 4096, (14336, 14336), 64, 0.1, torch.bfloat16, torch.bfloat16),
    (1000, 4096, (4096, 4096, 4096), 17, 0.0, torch.float16, torch.float16),
    (777, 1023, (1023, 65, 129), 100, 0.5, torch.bfloat16, torch.bfloat16),
    (1000, 4096, (4096, 1024, 1024), 16, 0.1, torch.bfloat16, torch.float32),
    (512, 4096, (4096, 1024, 1024), 16, 0.1, torch.float32, torch.float32),
)


def large(device: torch.device, index: int) -> tuple[Contract, Sample]:
    """The call that `LARGE[index]` describes."""
    return _call(device, *LARGE[index])


def every_kernel(device: torch.device) -> Iterator[tuple[Contract, Sample]]:
    """Small calls that reach every kernel of the family: dtypes, two and three projections, widths of a tile."""
    for dtype in DTYPES:
        for widths in ((90, 40), (90, 40, 24)):
            for rank in (9, 40):
                for p in (0.0, 0.3):
                    yield _call(device, 70, 200, widths, rank, p, dtype, dtype)


def _call(
    device: torch.device,
    m: int,
    k: int,
    widths: tuple[int, ...],
    r: int,
    p: float,
    dtype: torch.dtype,
    factors: torch.dtype,
) -> tuple[Contract, Sample]:
    generator = torch.Generator(device="cpu").manual_seed(m + k + r)

    def tensor(rows: int, columns: int, dtype: torch.dtype, size: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * size).to(device, dtype)

    x, weights = tensor(m, k, dtype, 1.0), [tensor(n, k, dtype, k**-0.5) for n in widths]
    a, b = [tensor(r, k, factors, k**-0.5) for _ in widths], [tensor(n, r, factors, r**-0.5) for n in widths]
    scales = torch.rand(len(widths), generator=generator).to(device) + 0.5
    seeds = torch.arange(len(widths), device=device) + m if p else None
    label = f"{m}x{k}->{list(widths)} r{r} p{p} {_name(dtype)}, factors {_name(factors)}"
    return CONTRACT, Sample((x, weights, [None] * len(widths), a, b, scales, p, seeds), label=label)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def huge(device: torch.device) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Offsets are those of lora_linear's kernels, whose calls with more than 2^31 elements cover them."""
    return iter(())
