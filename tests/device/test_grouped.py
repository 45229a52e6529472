"""Grouped LoRA's CUDA kernels in the emulator, beyond the oracle kit: assignments of tokens that its samples lack."""

from __future__ import annotations

import pytest
import torch
from peftops.ops import grouped_lora_linear
from peftops.ops.contract import CONTRACTS, Sample
from peftops.testing.samples import same_bits
from peftops.testing.values import check_exact

from tests.device.standin import runs_in
from tests.device.test_emulated_operators import CUDA, DEVICES, DTYPES, dtype_of, use

emulated = runs_in("emulator")
CONTRACT = CONTRACTS["peftops::grouped_lora_linear"]


def operands(dtype: torch.dtype, seed: int, rows: int, adapters: int, rank: int = 5, features: int = 24) -> dict:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (rows, features), "weight": (18, features), "bias": (18,)}
    sizes |= {"lora_a": (adapters, rank, features), "lora_b": (adapters, 18, rank)}
    parts = {name: torch.randn(size, generator=generator).to(CUDA, dtype) for name, size in sizes.items()}
    return parts | {"scales": (torch.rand(adapters, generator=generator) + 0.5).to(CUDA)}


def exact(parts: dict, ids: torch.Tensor, ranks: torch.Tensor | None, seed: int) -> None:
    check_exact(CONTRACT, Sample((*parts.values(), ids, ranks), label=f"{len(ids)} tokens"), seed)


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("rows", [1, 64, 65, 255, 256, 257, 700])
@emulated
def test_any_assignment_of_the_tokens_is_exact(gpu, rows, seed):
    """Few tokens are grouped by one kernel, more by two; a group ends on a tile's end, before or after it."""
    use(gpu, seed)
    parts = operands(torch.bfloat16, seed, rows, 4)
    token = torch.arange(rows, device=CUDA)
    generator = torch.Generator().manual_seed(seed)
    for ids in (
        torch.full_like(token, 3),
        torch.full_like(token, -1),
        token % 4,
        token % 5 - 1,
        (token // 64) % 4,
        ((token + 1) // 65) % 2,
        (token < rows - 1).long() * 2,
        torch.randint(-1, 4, (rows,), generator=generator).to(CUDA),
    ):
        exact(parts, ids, None, seed)


@pytest.mark.parametrize("rows", [3, 200, 300])
@emulated
def test_thousands_of_adapters(rows, seed):
    """More adapters than tokens, and than threads that list their tiles."""
    use("A100", seed)
    adapters = 3000
    parts = operands(torch.float32, seed, rows, adapters, rank=1, features=4)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, adapters, (rows,), generator=generator).to(CUDA)
    y = grouped_lora_linear(*parts.values(), ids)
    for name in ("lora_a", "lora_b"):
        parts[name] = torch.cat((parts[name], torch.zeros_like(parts[name][:1])))[ids]
    parts["scales"] = torch.cat((parts["scales"], torch.ones(1, device=CUDA)))[ids]
    assert same_bits(y, grouped_lora_linear(*parts.values(), torch.arange(rows, device=CUDA)))


@DTYPES
@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("rows", [70, 300])
@emulated
def test_a_row_whose_id_names_no_adapter_is_nan_and_the_others_are_as_without_it(dtype, gpu, rows, seed):
    use(gpu, seed)
    for integer in (torch.int32, torch.int64):
        parts = operands(dtype_of(dtype), seed, rows, 3)
        ids = (torch.arange(rows, device=CUDA) % 4 - 1).to(integer)
        wrong = ids.clone()
        info = torch.iinfo(integer)
        for row, value in ((0, 3), (5, -2), (rows - 1, info.max), (17, info.min)):
            wrong[row] = value
        bad = wrong != ids
        names = ("x", "lora_a", "lora_b")
        upstream = torch.ones(rows, 18, dtype=dtype_of(dtype), device=CUDA)
        results = []
        for given in (wrong, torch.where(bad, -1, ids)):
            leaves = parts | {name: parts[name].clone().requires_grad_() for name in names}
            y = grouped_lora_linear(*leaves.values(), given)
            with torch.no_grad():
                assert same_bits(y, grouped_lora_linear(*parts.values(), given))
            results.append([y, *torch.autograd.grad(y, [leaves[name] for name in names], upstream)])
        for index in (0, 1):
            assert results[0][index][bad].isnan().all() and not results[1][index].isnan().any()
            assert same_bits(results[0][index][~bad], results[1][index][~bad])
        assert all(same_bits(a, b) for a, b in zip(results[0][2:], results[1][2:], strict=True))


@DTYPES
@emulated
def test_ranks_out_of_range_count_as_the_nearest_and_those_beyond_are_not_read(dtype, seed):
    use("A100", seed)
    parts = operands(dtype_of(dtype), seed, 70, 3)
    ids = torch.arange(70, device=CUDA) % 3
    clean = grouped_lora_linear(*parts.values(), ids, torch.tensor([0, 2, 5], device=CUDA))
    parts["lora_a"][0], parts["lora_b"][0] = torch.nan, torch.nan
    parts["lora_a"][1, 2:], parts["lora_b"][1, :, 2:] = torch.nan, torch.nan
    leaves = parts | {name: parts[name].clone().requires_grad_() for name in ("lora_a", "lora_b")}
    y = grouped_lora_linear(*leaves.values(), ids, torch.tensor([-7, 2, 2**40], device=CUDA))
    assert same_bits(y, clean)
    for grad, rank in zip(torch.autograd.grad(y.sum(), (leaves["lora_a"], leaves["lora_b"])), (1, 2), strict=True):
        assert grad.isfinite().all() and not grad[0].any() and not grad[1].narrow(rank - 1, 2, 3).any()


@pytest.mark.parametrize("gpu", DEVICES)
@emulated
def test_gradients_of_tokens_in_many_parts_are_exact(gpu, seed):
    """One adapter has nearly all tokens, so its gradient is a sum of parts; one has one, one has none."""
    use(gpu, seed)
    for dtype in (torch.bfloat16, torch.float32):
        parts = operands(dtype, seed, 2500, 4, features=16)
        ids = torch.ones(2500, dtype=torch.int64, device=CUDA)
        ids[700], ids[1000:1200] = 3, -1
        exact(parts, ids, None, seed)


@emulated
def test_no_adapter_at_all_is_the_base_linear(seed):
    use("A100", seed)
    parts = operands(torch.bfloat16, seed, 70, 3)
    base = torch.nn.functional.linear(parts["x"], parts["weight"], parts["bias"])
    ids = torch.arange(70, device=CUDA) % 3
    assert same_bits(grouped_lora_linear(*parts.values(), torch.full_like(ids, -1)), base)
    assert same_bits(grouped_lora_linear(*parts.values(), ids, torch.zeros(3, dtype=torch.int64, device=CUDA)), base)
    off = parts | {"scales": torch.zeros(3, device=CUDA)}
    assert same_bits(grouped_lora_linear(*off.values(), ids), base)


@pytest.mark.parametrize("gpu", DEVICES)
@emulated
def test_long_rows_and_many_ranks_of_few_tokens_are_exact(gpu, seed):
    """Several steps of a contraction and several blocks of columns and of ranks, whole and ragged."""
    use(gpu, seed)
    for rows, features, rank in ((2, 1100, 16), (40, 520, 70), (17, 2304, 130)):
        parts = operands(torch.bfloat16, seed, rows, 3, rank, features)
        generator = torch.Generator().manual_seed(seed)
        wide = torch.randn((300, features), generator=generator), torch.randn((3, 300, rank), generator=generator)
        parts["weight"], parts["lora_b"] = (t.to(CUDA, torch.bfloat16) for t in wide)
        parts["bias"] = None
        ids = torch.arange(rows, device=CUDA) % 4 - 1
        exact(parts, ids, torch.tensor([rank, rank - 3, 20], device=CUDA).clamp(max=rank), seed)
