"""Grouped LoRA's calls for a GPU: shapes and assignments that no list foresees, sizes of real models."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator

import torch
from peftops.ops import grouped_lora_linear
from peftops.ops.contract import CONTRACTS, Contract, Sample
from peftops.testing import derive

CONTRACT = CONTRACTS["peftops::grouped_lora_linear"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_EDGES = (1, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 127, 129, 255, 256, 257, 997)
_ROWS = (*_EDGES, 130, 260, 300, 511)
_RANKS = (1, 2, 4, 8, 9, 15, 16, 17, 32, 64, 65, 128, 200)
_ADAPTERS = (1, 2, 3, 5, 8, 31, 64, 65, 300)


def assignment(draw: random.Random, rows: int, adapters: int) -> list[int]:
    """An adapter for each token: one for all, a few, all different, in runs, none."""
    kind = draw.choice(("any", "any", "one", "few", "own", "runs", "none"))
    if kind == "one":
        return [draw.randrange(adapters)] * rows
    if kind == "few":
        chosen = [draw.randrange(-1, adapters) for _ in range(3)]
        return [draw.choice(chosen) for _ in range(rows)]
    if kind == "own":
        return [token % adapters for token in range(rows)]
    if kind == "runs":
        return sorted(draw.randrange(-1, adapters) for _ in range(rows))
    return [-1 if kind == "none" else draw.randrange(-1, adapters) for _ in range(rows)]


def fuzz(device: torch.device, seed: int, index: int) -> tuple[Contract, Sample]:
    """Call number `index`: ragged sizes, strides, dtypes, assignments, ranks; every seventh has many tokens."""
    draw = random.Random(derive(seed, "fuzz", "grouped", index))
    m, k, n = draw.choice(_ROWS), draw.choice(_EDGES), draw.choice(_EDGES)
    r, adapters = draw.choice(_RANKS), draw.choice(_ADAPTERS)
    if index % 7 == 0:
        m, k, n, adapters = (
            draw.randint(1000, 5000),
            draw.choice((64, 257)),
            draw.choice((64, 129)),
            draw.choice((2, 5)),
        )
    dtype = DTYPES[index % 3]
    factors = draw.choice((dtype, torch.float32))
    generator = torch.Generator(device="cpu").manual_seed(derive(seed, "fuzz values", index))

    def tensor(*shape: int, dtype: torch.dtype, size: float) -> torch.Tensor:
        """Values of the given size, laid out in one of the ways in which users hand tensors over."""
        values = (torch.randn(shape, generator=generator) * size).to(device, dtype)
        layout = draw.choice(("contiguous", "contiguous", "transposed", "gaps", "offset"))
        if layout == "transposed":
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "gaps":
            before = draw.randint(0, 16)
            return torch.nn.functional.pad(values, (before, 5), value=torch.nan)[..., before : before + shape[-1]]
        if layout == "offset":
            before = draw.randint(1, 16)
            flat = torch.full((before + values.numel(),), torch.nan, device=device, dtype=dtype)
            flat[before:] = values.flatten()
            return flat[before:].view(shape)
        return values

    x, weight = tensor(m, k, dtype=dtype, size=1.0), tensor(n, k, dtype=dtype, size=k**-0.5)
    a = tensor(adapters, r, k, dtype=factors, size=k**-0.5)
    b = tensor(adapters, n, r, dtype=factors, size=r**-0.5)
    bias = tensor(1, n, dtype=dtype, size=1.0)[0] if draw.random() < 0.5 else None
    scales = torch.tensor([draw.choice((1.0, 0.5, -2.0, 0.0)) for _ in range(adapters)], device=device)
    integer = draw.choice((torch.int32, torch.int64))
    ids = torch.tensor(assignment(draw, m, adapters), dtype=integer, device=device)
    ranks = None
    if draw.random() < 0.4:
        ranks = torch.tensor([draw.randint(0, r) for _ in range(adapters)], dtype=integer, device=device)
    label = f"{m}x{k}->{n} r{r} of {adapters} {_name(dtype)}, factors {_name(factors)}"
    return CONTRACT, Sample((x, weight, bias, a, b, scales, ids, ranks), label=label)


#: Calls of a model's size, one or more per path that a plan may take: (M, K, N, r, L, dtype, factors' dtype). Each
#: token of the first three has an adapter of its own.
LARGE = (
    (1, 4096, 4096, 16, 1, torch.bfloat16, torch.bfloat16),
    (64, 4096, 4096, 16, 64, torch.bfloat16, torch.bfloat16),
    (64, 4096, 4096, 8, 1024, torch.bfloat16, torch.float32),
    (2048, 4096, 4096, 16, 4, torch.bfloat16, torch.bfloat16),
    (2048, 4096, 14336, 64, 8, torch.float16, torch.float16),
    (1000, 14336, 4096, 17, 3, torch.float16, torch.float32),
    (777, 1023, 2049, 200, 5, torch.bfloat16, torch.bfloat16),
    (512, 4096, 4096, 16, 4, torch.float32, torch.float32),
)


def large(device: torch.device, index: int) -> tuple[Contract, Sample]:
    """The call that `LARGE[index]` describes."""
    return _call(device, *LARGE[index])


def every_kernel(device: torch.device) -> Iterator[tuple[Contract, Sample]]:
    """Small calls that reach every kernel of the family: each pair of dtypes, each width of a tile, few and many."""
    for dtype in DTYPES:
        for factors in dict.fromkeys((dtype, torch.float32)):
            for rank in (9, 40, 100):
                for rows, features in ((70, 200), (300, 72)):
                    yield _call(device, rows, features, 90, rank, 3, dtype, factors)


def _call(
    device: torch.device, m: int, k: int, n: int, r: int, adapters: int, dtype: torch.dtype, factors: torch.dtype
) -> tuple[Contract, Sample]:
    generator = torch.Generator(device="cpu").manual_seed(m + k + n + r)

    def tensor(*shape: int, dtype: torch.dtype, size: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(device, dtype)

    x, weight = tensor(m, k, dtype=dtype, size=1.0), tensor(n, k, dtype=dtype, size=k**-0.5)
    a = tensor(adapters, r, k, dtype=factors, size=k**-0.5)
    b = tensor(adapters, n, r, dtype=factors, size=r**-0.5)
    scales = torch.rand(adapters, generator=generator) + 0.5
    ids = torch.randperm(m, generator=generator) % (adapters + (m > 64))
    label = f"{m}x{k}->{n} r{r} of {adapters} {_name(dtype)}, factors {_name(factors)}"
    ids = torch.where(ids == adapters, -1, ids)
    return CONTRACT, Sample((x, weight, None, a, b, scales.to(device), ids.to(device)), label=label)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- more elements than 32 bits count ------------------------------------------------------------------------------


def huge(device: torch.device, adapters: int = 40_000) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """(name, bytes that it holds at once, check)."""
    yield "adapters", 20 << 30, functools.partial(huge_stack, device, adapters)


def huge_stack(device: torch.device, adapters: int, features: int = 4096) -> None:
    """lora_a has more than 2^31 elements: tokens of the last adapters get what these adapters alone give."""
    rank, out, tail = 16, 24, 5
    generator = torch.Generator(device="cpu").manual_seed(adapters)

    def integers(*shape: int, density: float) -> torch.Tensor:
        values = torch.randint(-1, 2, shape, generator=generator)
        return (values * (torch.rand(shape, generator=generator) < density)).to(device, torch.bfloat16)

    x, weight = integers(70, features, density=0.05), integers(out, features, density=0.1)
    a = torch.zeros(adapters, rank, features, dtype=torch.bfloat16, device=device)
    b = torch.zeros(adapters, out, rank, dtype=torch.bfloat16, device=device)
    a[-tail:], b[-tail:] = integers(tail, rank, features, density=0.1), integers(tail, out, rank, density=0.2)
    ids = torch.arange(70, device=device) % tail
    y = grouped_lora_linear(x, weight, None, a, b, torch.ones(adapters, device=device), ids + adapters - tail)
    wanted = grouped_lora_linear(x, weight, None, a[-tail:], b[-tail:], torch.ones(tail, device=device), ids)
    assert torch.equal(y, wanted), "the last adapters' output differs from that of the adapters alone"
