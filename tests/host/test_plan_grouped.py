"""csrc/lora/grouped_plan.h and multi_plan.h: grids that any assignment fits, passes that projections share."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

from tests.host.test_plan import (
    DEVICES,
    SHARED_MEMORY,
    TILE,
    assert_covers,
    assert_grid,
    blocks,
    devices,
    downs,
    gradient_features,
    limit_of,
)

ELEMENT_BYTES = (2, 4)  # of what is multiplied: on tensor cores, in float32
FEW_TILE, FEW_DEPTH, FEW_COLUMNS = 16, 256, 256
rows_of = st.sampled_from([1, 15, 16, 17, 64, 65, 255, 256, 257, 4096, 2**31 - 2000]) | st.integers(1, 2**20)
bytes_of = st.sampled_from(ELEMENT_BYTES)
few_rows = st.integers(1, _C.grouped_few_tokens)
counts = st.sampled_from([0, 1, 2, 64, 1024, 2**20]) | st.integers(0, 5000)
sizes = st.sampled_from([0, 1, 63, 64, 65, 4096, 14336, 2**21]) | st.integers(0, 2**21)
ranks = st.sampled_from([0, 1, 8, 15, 16, 17, 63, 64, 65, 128, 129, 256]) | st.integers(0, 2000)


# ---- slots -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=400), st.integers(0, 10), st.sampled_from([FEW_TILE, TILE]))
def test_any_assignment_fits_the_tile_slots(ids, adapters, tile):
    """Ids from `adapters` on name no adapter; they are one group, tokens without an adapter another."""
    groups = Counter(min(id, adapters) if id >= 0 else -1 for id in ids)
    assert sum(blocks(count, tile) for count in groups.values()) <= _C.grouped_tile_slots(len(ids), adapters, tile)


@pytest.mark.parametrize("tile", [FEW_TILE, TILE])
@pytest.mark.parametrize("adapters", [0, 1, 7])
def test_some_assignment_needs_every_tile_slot(adapters, tile):
    counts = [tile + 1] * (adapters + 2)
    assert _C.grouped_tile_slots(sum(counts), adapters, tile) == 2 * len(counts)
    assert _C.grouped_tile_slots(3, 100, tile) == 3, "never more than tokens"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=400), st.sampled_from([1, 2, 64, 128]))
def test_any_assignment_fits_the_part_slots_with_one_for_each_absent_adapter(ids, length):
    found = Counter(ids)
    assert sum(max(1, blocks(found[adapter], length)) for adapter in range(10)) <= _C.grouped_part_slots(
        len(ids), 10, length
    )


# ---- plans -----------------------------------------------------------------------------------------------------------


@given(rows_of, sizes, ranks, counts, downs, bytes_of, devices)
def test_grouped_shrink(rows, depth, rank, adapters, down, element_bytes, name):
    width, tiles, splits, rank_blocks, length, memory = _C.grouped_plan_shrink(
        rows, depth, rank, adapters, down, element_bytes, DEVICES[name]
    )
    assert tiles == _C.grouped_tile_slots(rows, adapters, TILE)
    assert_covers(depth, splits, length)
    assert_covers(rank, rank_blocks, width)
    assert length % TILE == 0 and 0 < memory <= limit_of(name)
    assert_grid(tiles, splits, rank_blocks)
    assert _C.lora_refuse_shrink(width, down, element_bytes, DEVICES[name]) is None


@given(rows_of, sizes, counts, bytes_of, devices)
def test_grouped_expand(rows, columns, adapters, element_bytes, name):
    tiles, column_blocks, each, memory = _C.grouped_plan_expand(rows, columns, adapters, element_bytes, DEVICES[name])
    assert tiles == _C.grouped_tile_slots(rows, adapters, TILE)
    assert_covers(columns, column_blocks, each)
    assert each % TILE == 0 and each >= 256 and 0 < memory <= limit_of(name)
    assert_grid(tiles, column_blocks)


@given(rows_of, sizes, ranks, counts, bytes_of, devices)
def test_grouped_gradient(rows, features, rank, adapters, element_bytes, name):
    width, parts, feature_blocks, rank_blocks, length, memory = _C.grouped_plan_gradient(
        rows, features, rank, adapters, element_bytes, DEVICES[name]
    )
    assert parts == _C.grouped_part_slots(rows, adapters, length)
    assert_covers(features, feature_blocks, gradient_features((element_bytes, 1)))
    assert_covers(rank, rank_blocks, width)
    assert length % TILE == 0 and 0 < memory <= limit_of(name)
    assert element_bytes == 2 or length <= 2048 or rows > 64 * 2048, "float32 sums stay short"
    assert_grid(parts, feature_blocks, rank_blocks)


@given(few_rows, sizes, ranks, counts, devices)
def test_few_tokens(rows, size, rank, adapters, name):
    device = DEVICES[name]
    assert _C.grouped_refuse_few(rows, size, 2, device) is None
    width, tiles, splits, rank_blocks, length, memory = _C.grouped_plan_few_shrink(rows, size, rank, adapters, device)
    assert tiles == _C.grouped_tile_slots(rows, adapters, FEW_TILE)
    assert_covers(size, splits, length)
    assert_covers(rank, rank_blocks, width)
    assert length % FEW_DEPTH == 0 and splits <= 16 and 0 < memory <= limit_of(name)
    assert_grid(tiles, splits, rank_blocks)
    _, tiles, column_blocks, memory = _C.grouped_plan_few_expand(rows, size, rank, adapters)
    assert_covers(size, column_blocks, FEW_COLUMNS)
    assert 0 < memory <= limit_of(name)
    assert_grid(tiles, column_blocks)


def test_what_the_kernels_for_few_tokens_do_not_take():
    device = DEVICES["sm90-132"]
    few = _C.grouped_few_tokens
    assert "many tokens" in _C.grouped_refuse_few(few + 1, 64, 2, device)
    assert "float32" in _C.grouped_refuse_few(few, 64, 4, device)
    assert "blocks of columns" in _C.grouped_refuse_few(few, 65535 * FEW_COLUMNS + 1, 2, device)
    assert "8.0" in _C.grouped_refuse_few(few, 64, 2, _C.Device(sm=75, sm_count=68, shared_memory=2**16))


# Worked by hand. rows, depth, rank, adapters, device -> ranks of a tile, tiles, splits, rank blocks, length of a split
FEW_TABLE = [
    ((1, 4096, 16, 1, "sm90-132"), (16, 1, 16, 1, 256)),
    ((64, 4096, 16, 64, "sm90-132"), (16, 68, 16, 1, 256)),
    ((256, 4096, 16, 1000, "sm90-132"), (16, 272, 16, 1, 256)),
    ((256, 14336, 130, 2, "sm80-108"), (64, 20, 8, 3, 1792)),
    ((64, 200, 8, 2, "sm90-132"), (16, 8, 1, 1, 256)),
]


@pytest.mark.parametrize(("problem", "wanted"), FEW_TABLE)
def test_few_shrink_table(problem, wanted):
    *numbers, name = problem
    assert _C.grouped_plan_few_shrink(*numbers, DEVICES[name])[:5] == wanted


# ---- several projections ---------------------------------------------------------------------------------------------


@given(st.integers(2, 40))
def test_projections_share_passes_in_threes_and_twos_and_none_is_alone(count):
    passes = []
    while count:
        passes.append(_C.multi_sharing(count))
        count -= passes[-1]
    assert count == 0 and set(passes) <= {2, 3} and passes.count(2) <= 2


@given(rows_of, sizes, ranks, devices)
def test_multi_shrink(rows, depth, rank, name):
    width, row_blocks, splits, rank_blocks, length, memory = _C.multi_plan_shrink(rows, depth, rank, DEVICES[name])
    assert width == (16 if rank <= 16 else 64)
    assert_covers(rows, row_blocks, TILE)
    assert_covers(depth, splits, length)
    assert_covers(rank, rank_blocks, width)
    assert length % TILE == 0 and 0 < memory <= limit_of(name)
    assert_grid(row_blocks, splits, rank_blocks)


@pytest.mark.parametrize("sm", SHARED_MEMORY)
def test_legality_of_shared_passes_is_a_fact_of_the_device(sm):
    device = DEVICES[f"sm{sm}-132"]
    for count in (2, 3):
        assert _C.multi_refuse(count, 2, device) is None and _C.multi_refuse_expand(count, 64, 2, device) is None
        assert _C.multi_expand_memory(count) <= limit_of(f"sm{sm}-132")
        less = _C.Device(sm=sm, sm_count=132, shared_memory=_C.multi_expand_memory(count) - 1)
        assert "shared memory" in _C.multi_refuse_expand(count, 64, 2, less)
    assert "nothing to share" in _C.multi_refuse(1, 2, device)
    assert "do not fit a tile" in _C.multi_refuse_expand(2, 65, 2, device)
    assert "registers" in _C.multi_refuse(2, max(ELEMENT_BYTES), device)
    assert "8.0" in _C.multi_refuse(2, 2, _C.Device(sm=75, sm_count=68, shared_memory=2**16))
