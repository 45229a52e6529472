"""csrc/lora/plan.h: how a problem is cut up, for any size and device."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

features = st.sampled_from([0, 1, 63, 64, 65, 1023, 1024, 1025, 4096, 11008, 2**31, 2**40]) | st.integers(0, 2**40)
NARROWEST, WIDEST = 128, 256

# ---- CPU -------------------------------------------------------------------------------------------------------------


@given(features)
def test_gradient_panel(features):
    """Whole cache lines, and the narrowest width that makes at most 16 panels, within the bounds."""
    width = _C.lora_gradient_panel(features)
    assert width % 64 == 0 and NARROWEST <= width <= WIDEST
    assert blocks(features, width) <= 16 or width == WIDEST
    assert blocks(features, width - 64) > 16 or width == NARROWEST


@given(features, features)
def test_gradient_panel_grows_with_the_features(a, b):
    assert _C.lora_gradient_panel(min(a, b)) <= _C.lora_gradient_panel(max(a, b))


# ---- CUDA ------------------------------------------------------------------------------------------------------------

# Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications), and numbers of multiprocessors of real and partitioned GPUs.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SM_COUNTS = (1, 10, 68, 78, 108, 114, 132, 148)
DEVICES = {
    f"sm{sm}-{count}": _C.Device(sm=sm, sm_count=count, shared_memory=kib * 1024)
    for (sm, kib), count in product(SHARED_MEMORY.items(), SM_COUNTS)
}
# Bytes of what is multiplied and the numbers that a factor's number is the sum of: on tensor cores, there as three
# bfloat16, in float32.
KINDS = ((2, 1), (2, 3), (4, 1))
TILE, WAVES, FILLING_SPLITS = _C.lora_tile, 4, 16
MAX_SPLITS, RUN = 64, 2048  # for the accuracy of float32 sums

CORNERS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 4095, 4096, 11008, 2**31 - 1, 2**31, 2**31 + 1, 3 * 10**9]
devices = st.sampled_from(sorted(DEVICES))
sizes = st.sampled_from(CORNERS) | st.integers(0, 300) | st.integers(0, 2**34)
ranks = st.sampled_from([1, 4, 8, 15, 16, 17, 63, 64, 65, 127, 128, 129, 256, 1000]) | st.integers(0, 4_000_000)
kinds = st.sampled_from(KINDS)
downs = st.booleans()  # whether the factor lies as [depth, rank]
small = st.integers(1, 200)


def blocks(total: int, size: int) -> int:
    return -(-total // size)


def limit_of(name: str) -> int:
    return SHARED_MEMORY[int(name.partition("-")[0].removeprefix("sm"))] * 1024


def assert_covers(total: int, count: int, length: int) -> None:
    """`count` parts of `length` hold each of `total` things exactly once, and none of them is empty."""
    assert length > 0
    assert (count - 1) * length < total <= count * length or total == 0 and count <= 1


def assert_split(split, total: int, others: int, kind: tuple[int, int], sm_count: int) -> None:
    """Whole tiles, nothing empty, and no more blocks than fill the device, unless float32 sums would run too long."""
    assert_covers(total, split.count, split.length)
    assert split.length % TILE == 0
    short = kind != (2, 1)
    accurate = min(MAX_SPLITS, max(1, blocks(total, RUN))) if short else 1
    assert 1 <= split.count <= max(FILLING_SPLITS, accurate)
    assert split.count <= accurate or split.count * others <= WAVES * sm_count
    if accurate < MAX_SPLITS and short:
        assert split.length <= RUN


def assert_grid(x: int, y: int, z: int = 1) -> None:
    """What CUDA launches; a plan may only be empty where the problem is."""
    assert 0 <= x <= 2**31 - 1 and 0 <= y <= 65535 and 0 <= z <= 65535


def facts(plan) -> tuple:
    """What a plan says, for comparison."""
    names = [name for name in dir(plan) if not name.startswith("_")]
    values = (getattr(plan, name) for name in names)
    return tuple((v.count, v.length) if isinstance(v, _C.LoraSplit) else v for v in values)


@given(sizes, sizes, ranks, downs, kinds, devices)
def test_shrink(rows, depth, rank, down, kind, name):
    plan = _C.lora_plan_shrink(rows, depth, rank, down, kind[0], DEVICES[name], kind[1])
    width = _C.lora_shrink_ranks[plan.candidate]
    assert_covers(rows, plan.row_blocks, TILE)
    assert_covers(rank, plan.rank_blocks, width)
    assert plan.rank_blocks >= 1, "a mask is drawn for rank 0, too"
    assert_split(plan.split, depth, plan.row_blocks * plan.rank_blocks, kind, int(name.partition("-")[2]))
    assert 0 < plan.shared_memory <= limit_of(name)
    assert_grid(plan.row_blocks, plan.split.count, plan.rank_blocks)


@given(sizes, ranks, downs, kinds, devices)
def test_shrink_takes_the_best_candidate_that_the_device_runs(rows, rank, down, kind, name):
    device = DEVICES[name]
    plan = _C.lora_plan_shrink(rows, 4096, rank, down, kind[0], device, kind[1])
    legal = [r for r in _C.lora_shrink_ranks if _C.lora_refuse_shrink(r, down, kind[0], device, kind[1]) is None]
    assert legal
    assert _C.lora_shrink_ranks[plan.candidate] == min(legal, key=lambda r: (max(blocks(rank, r), 1), r))


@pytest.mark.parametrize(("down", "kind", "sm"), product((False, True), KINDS, SHARED_MEMORY))
def test_legality_of_shrink_is_a_fact_of_the_device(down, kind, sm):
    """128 ranks of float32 factors are for no device, the rest for all from 8.0; less memory refuses the widest."""

    def refusals(device) -> dict[int, str]:
        reasons = {r: _C.lora_refuse_shrink(r, down, kind[0], device, kind[1]) for r in _C.lora_shrink_ranks}
        return {r: reason for r, reason in reasons.items() if reason}

    limit = SHARED_MEMORY[sm] * 1024
    refused = refusals(_C.Device(sm=sm, sm_count=68, shared_memory=limit))
    assert list(refused) == ([128] if kind != (2, 1) else [])
    assert all("8.0" in reason for reason in refusals(_C.Device(sm=75, sm_count=68, shared_memory=limit)).values())
    assert len(refusals(_C.Device(sm=75, sm_count=68, shared_memory=limit))) == 3

    widest = max(set(_C.lora_shrink_ranks) - set(refused))
    needs = _C.lora_plan_shrink(1, 1, widest, down, kind[0], DEVICES[f"sm{sm}-68"], kind[1]).shared_memory
    less = _C.Device(sm=sm, sm_count=68, shared_memory=needs - 1)
    assert "shared memory" in refusals(less)[widest]
    assert _C.lora_shrink_ranks[_C.lora_plan_shrink(1, 1, widest, down, kind[0], less, kind[1]).candidate] < widest


@given(sizes, sizes, kinds, devices)
def test_expand(rows, columns, kind, name):
    plan = _C.lora_plan_expand(rows, columns, kind[0], DEVICES[name], kind[1])
    assert_covers(rows, plan.row_blocks, TILE)
    assert_covers(columns, plan.column_blocks, plan.columns_per_block)
    assert plan.columns_per_block % TILE == 0
    assert 0 < plan.shared_memory <= limit_of(name)
    assert_grid(plan.row_blocks, plan.column_blocks)


@given(sizes, sizes, ranks, kinds, devices)
def test_gradient(rows, features, rank, kind, name):
    plan = _C.lora_plan_gradient(rows, features, rank, kind[0], DEVICES[name], kind[1])
    width = _C.lora_gradient_ranks[plan.candidate]
    assert_covers(features, plan.feature_blocks, gradient_features(kind))
    assert_covers(rank, plan.rank_blocks, width)
    assert_split(plan.split, rows, plan.feature_blocks * plan.rank_blocks, kind, int(name.partition("-")[2]))
    assert 0 < plan.shared_memory <= limit_of(name)
    assert_grid(plan.feature_blocks, plan.split.count, plan.rank_blocks)


def gradient_features(kind: tuple[int, int]) -> int:
    """Features of a block of the gradient kernel: two halves of 16 for each of four warps on tensor cores, else one."""
    return 2 * TILE if kind[0] == 2 else TILE


@given(sizes, sizes, ranks, kinds, devices, devices)
def test_plans_depend_on_their_arguments_alone(rows, columns, rank, kind, name, other):
    """Nothing is remembered from a call for another device or problem."""

    def plans(rows: int, name: str) -> list[tuple]:
        device = DEVICES[name]
        return [
            facts(_C.lora_plan_shrink(rows, columns, rank, False, kind[0], device, kind[1])),
            facts(_C.lora_plan_expand(rows, columns, kind[0], device, kind[1])),
            facts(_C.lora_plan_gradient(rows, columns, rank, kind[0], device, kind[1])),
        ]

    first = plans(rows, name)
    plans(rows + 1, other)
    assert plans(rows, name) == first


def parts(count: int, length: int, total: int) -> list[slice]:
    return [slice(i * length, min((i + 1) * length, total)) for i in range(count)]


@given(small, small, st.integers(1, 150), downs, kinds, devices)
def test_shrink_adds_every_product_once(rows, depth, rank, down, kind, name):
    """A walk over the grid as the kernel goes: blocks of rows, splits of the depth in tiles, blocks of ranks."""
    plan = _C.lora_plan_shrink(rows, depth, rank, down, kind[0], DEVICES[name], kind[1])
    times = np.zeros((rows, depth, rank), dtype=np.int8)
    for row, split, ranks in product(
        parts(plan.row_blocks, TILE, rows),
        parts(plan.split.count, plan.split.length, depth),
        parts(plan.rank_blocks, _C.lora_shrink_ranks[plan.candidate], rank),
    ):
        for start in range(split.start, split.stop, TILE):
            times[row, start : min(start + TILE, split.stop), ranks] += 1
    assert (times == 1).all()


@given(small, st.integers(1, 5000), kinds, devices)
def test_expand_writes_every_element_once(rows, columns, kind, name):
    plan = _C.lora_plan_expand(rows, columns, kind[0], DEVICES[name], kind[1])
    times = np.zeros((rows, columns), dtype=np.int8)
    for row, run in product(
        parts(plan.row_blocks, TILE, rows), parts(plan.column_blocks, plan.columns_per_block, columns)
    ):
        for start in range(run.start, run.stop, TILE):
            times[row, start : min(start + TILE, run.stop)] += 1
    assert (times == 1).all()


@given(small, small, st.integers(1, 150), kinds, devices)
def test_gradient_adds_every_product_once(rows, features, rank, kind, name):
    plan = _C.lora_plan_gradient(rows, features, rank, kind[0], DEVICES[name], kind[1])
    times = np.zeros((rows, features, rank), dtype=np.int8)
    for block, split, ranks in product(
        parts(plan.feature_blocks, gradient_features(kind), features),
        parts(plan.split.count, plan.split.length, rows),
        parts(plan.rank_blocks, _C.lora_gradient_ranks[plan.candidate], rank),
    ):
        for start in range(split.start, split.stop, TILE):
            times[start : min(start + TILE, split.stop), block, ranks] += 1
    assert (times == 1).all()


# Worked by hand from plan.h's rules: a full device (4 blocks per multiprocessor) is not split, an empty one is, up to
# 16 parts of whole tiles; a float32 sum of more than 2048 products is split on any device.
TABLE = [
    # rows, depth, rank, down, bytes, device -> ranks of a tile, row blocks, rank blocks, splits, length of a split
    ((4096, 4096, 16, False, 2, "sm90-132"), (16, 64, 1, 8, 512)),
    ((1, 4096, 16, False, 2, "sm90-132"), (16, 1, 1, 16, 256)),
    ((65536, 4096, 16, False, 2, "sm90-132"), (16, 1024, 1, 1, 4096)),
    ((65536, 4096, 16, False, 4, "sm90-132"), (16, 1024, 1, 2, 2048)),
    ((1, 3 * 10**9, 16, False, 4, "sm90-132"), (16, 1, 1, 64, 46_875_008)),
    ((4096, 4096, 64, False, 2, "sm80-108"), (64, 64, 1, 6, 704)),
    ((4096, 4096, 128, False, 2, "sm86-68"), (128, 64, 1, 4, 1024)),
    ((4096, 4096, 128, False, 4, "sm86-68"), (64, 64, 2, 2, 2048)),
    ((4096, 4096, 256, False, 2, "sm120-148"), (128, 64, 2, 4, 1024)),
    ((4096, 4096, 16, False, 2, "sm80-1"), (16, 64, 1, 1, 4096)),
    ((3 * 10**9, 64, 8, False, 2, "sm90-132"), (16, 46_875_000, 1, 1, 64)),
    ((4096, 4096, 16, True, 2, "sm90-132"), (16, 64, 1, 8, 512)),
]


@pytest.mark.parametrize(("problem", "wanted"), TABLE)
def test_shrink_table(problem, wanted):
    *sizes, name = problem
    plan = _C.lora_plan_shrink(*sizes, DEVICES[name])
    got = (
        _C.lora_shrink_ranks[plan.candidate],
        plan.row_blocks,
        plan.rank_blocks,
        plan.split.count,
        plan.split.length,
    )
    assert got == wanted


# ---- the segmented GEMM ----------------------------------------------------------------------------------------------

GEMM_TILE, GEMM_DEPTH = _C.lora_gemm_tile, _C.lora_gemm_depth


@given(sizes, sizes, devices)
def test_a_gemm_covers_its_result(rows, columns, name):
    if _C.lora_refuse_gemm_sm80(rows, columns, DEVICES[name]):
        assert blocks(rows, GEMM_TILE) * blocks(columns, GEMM_TILE) > 2**31 - 1
        return
    row_blocks, column_blocks = _C.lora_plan_gemm_sm80(rows, columns)
    assert_covers(rows, row_blocks, GEMM_TILE)
    assert_covers(columns, column_blocks, GEMM_TILE)
    assert_grid(row_blocks * column_blocks, 1)


@pytest.mark.parametrize("sm", SHARED_MEMORY)
def test_legality_of_a_gemm_is_a_fact_of_the_device(sm):
    """Every device from 8.0 on runs it; one that is older or has less shared memory does not."""
    limit = SHARED_MEMORY[sm] * 1024
    assert _C.lora_refuse_gemm_sm80(4096, 4096, _C.Device(sm=sm, sm_count=68, shared_memory=limit)) is None
    assert "8.0" in _C.lora_refuse_gemm_sm80(1, 1, _C.Device(sm=75, sm_count=68, shared_memory=limit))
    less = _C.Device(sm=sm, sm_count=68, shared_memory=_C.lora_gemm_memory - 1)
    assert "shared memory" in _C.lora_refuse_gemm_sm80(1, 1, less)


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_tile_of_a_gemm_has_one_block(row_blocks, column_blocks):
    found = [_C.lora_gemm_block(i, row_blocks, column_blocks) for i in range(row_blocks * column_blocks)]
    assert sorted(found) == list(product(range(row_blocks), range(column_blocks)))


def test_blocks_of_a_gemm_that_run_together_share_what_they_read():
    """Eight rows of tiles go down the columns together."""
    wanted = [(row, column) for column in range(5) for row in range(8)]
    assert [_C.lora_gemm_block(i, 20, 5) for i in range(40)] == wanted
    assert _C.lora_gemm_block(40, 20, 5) == (8, 0)
    assert [_C.lora_gemm_block(80 + i, 20, 5) for i in range(5)] == [(16, 0), (17, 0), (18, 0), (19, 0), (16, 1)]
    assert _C.lora_gemm_block(2**31 - 2, 1, 2**31 - 1) == (0, 2**31 - 2)
    assert _C.lora_gemm_block(2**31 - 2, 2**31 - 1, 1) == (2**31 - 2, 0)


segment_lists = st.lists(
    st.tuples(st.sampled_from([0, 1, 31, 32, 33, 64, 1000]), st.booleans()), min_size=1, max_size=4
)


@given(segment_lists, st.booleans())
def test_the_tiles_of_a_contraction_are_those_of_its_segments(segments, off):
    """In order; a segment without depth, or an adapter's that is off, has none."""
    wanted = [
        (index, depth)
        for index, (total, adapter) in enumerate(segments)
        if not (adapter and off)
        for depth in range(0, total, GEMM_DEPTH)
    ]
    assert _C.lora_segment_tiles(segments, GEMM_DEPTH, off) == wanted


def test_which_plan_is_the_best():
    """The GEMM for 9.0 where it can be run and nothing must be copied; the one for 8.0 was measured nowhere."""
    assert _C.lora_linears == ["vendor", "gemm_sm80", "gemm_sm90"]
    for sm80, sm90, whole in product((None, "a reason"), (None, "a reason"), (False, True)):
        wanted = "gemm_sm90" if whole and sm90 is None else "vendor"
        assert _C.lora_plan_linear([None, sm80, sm90], whole) == wanted
