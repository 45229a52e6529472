"""csrc/lora/gemm_sm90.h: how the GEMM for sm_90a is cut up, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

TILE, BLOCK, CLUSTER = _C.lora_depth_tile, _C.lora_depth_block, 2
LARGE, SMALL = 0, 1
H100 = _C.Device(sm=90, sm_count=132, shared_memory=227 * 1024)
MOST = 2**31 - 1025

depths = st.sampled_from([1, 8, 15, 16, 17, 24, 63, 64, 65, 100, 128, 4096, 11008]) | st.integers(1, 300_000)
sizes = st.sampled_from([1, 64, 127, 128, 129, 256, 257, 4096, 14336, 2**24]) | st.integers(1, 100_000)
sm_counts = st.sampled_from([2, 10, 66, 78, 114, 132])


def segment(depth=64, stride=None, **more):
    """A segment whose rows lie close, on 16 bytes."""
    stride = stride or -(-depth // 8) * 8
    return _C.LoraSegment(**({"x_stride": stride, "w_stride": stride, "depth": depth} | more))


def task(*segments, rows=300, columns=520, **more):
    return _C.LoraGemmTask(segments=list(segments), rows=rows, columns=columns, **({"d_stride": columns} | more))


def blocks(total: int, size: int) -> int:
    return -(-total // size)


# ---- the contraction -------------------------------------------------------------------------------------------------


@given(st.lists(depths, min_size=1, max_size=4))
def test_depth_tiles_cover_each_segment_once_and_no_more_blocks_than_needed(lengths):
    """A walk as the kernel goes: the segments one after the other, whole tiles, then the last one's blocks."""
    found = _C.lora_depth_tiles(task(*(segment(length) for length in lengths)))
    assert (found.count, found.total) == (len(lengths), sum(found.tiles))
    for length, tiles, last in zip(lengths, found.tiles, found.last_blocks, strict=True):
        begins = [
            tile * TILE + block * BLOCK for tile in range(tiles) for block in range(last if tile == tiles - 1 else 4)
        ]
        assert begins == list(range(0, length, BLOCK))
        assert 1 <= last <= TILE // BLOCK


# ---- what is refused -------------------------------------------------------------------------------------------------


def refusal(given_task, element_bytes=2, device=H100):
    return _C.lora_refuse_gemm_sm90(given_task, element_bytes, device)


@given(st.lists(depths, min_size=1, max_size=4), sizes, sizes, st.booleans())
def test_matrices_on_16_bytes_are_taken(lengths, rows, columns, down):
    columns = blocks(columns, 8) * 8
    segments = [segment(length, w_stride=columns if down else -(-length // 8) * 8, down=down) for length in lengths]
    assert refusal(task(*segments, rows=rows, columns=columns, mask=1 if down else 0)) is None


REFUSED = [
    (lambda: refusal(task(segment()), device=_C.Device(sm=80, sm_count=108, shared_memory=163 * 1024)), "9.0"),
    (lambda: refusal(task(segment()), device=_C.Device(sm=100, sm_count=148, shared_memory=227 * 1024)), "9.0"),
    (lambda: refusal(task(segment()), device=_C.Device(sm=90, sm_count=1, shared_memory=227 * 1024)), "cluster"),
    (lambda: refusal(task(segment()), element_bytes=4), "16-bit"),
    (lambda: refusal(task()), "segments"),
    (lambda: refusal(task(*[segment()] * 5)), "segments"),
    (lambda: refusal(task(segment(), rows=0)), "empty"),
    (lambda: refusal(task(segment(), columns=0)), "empty"),
    (lambda: refusal(task(segment(depth=0, stride=8))), "empty"),
    (lambda: refusal(task(segment(), rows=MOST + 1)), "32 bits"),
    (lambda: refusal(task(segment(depth=2**31))), "32 bits"),
    (lambda: refusal(task(segment(depth=2**30), segment(depth=2**30))), "contraction"),
    (lambda: refusal(task(segment(), segment(down=True, w_stride=520))), "alike"),
    (lambda: refusal(task(segment(x=8))), "start on 16 bytes"),
    (lambda: refusal(task(segment(w=2))), "start on 16 bytes"),
    (lambda: refusal(task(segment(), d=24)), "start on 16 bytes"),
    (lambda: refusal(task(segment(depth=100, stride=100))), "rows that start on 16 bytes"),
    (lambda: refusal(task(segment(), columns=521)), "rows that start on 16 bytes"),
    (lambda: refusal(task(segment(x_stride=0))), "overlap"),
    (lambda: refusal(task(segment(down=True, w_stride=512))), "overlap"),
    (lambda: refusal(task(segment(x_stride=2**39))), "2^40"),
    (lambda: refusal(task(segment(), mask=1)), "masked"),
]


@pytest.mark.parametrize(("refused", "reason"), REFUSED)
def test_what_is_refused_and_why(refused, reason):
    assert reason in refused()


def test_the_stride_of_a_single_row_does_not_matter():
    assert refusal(task(segment(depth=100, x_stride=3, w_stride=104), rows=1, d_stride=1)) is None
    assert refusal(task(segment(depth=1, x_stride=8, w_stride=5, down=True), columns=521, rows=1, d_stride=3)) is None


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_tiles_fit_a_device_with_compute_capability_9():
    assert [(tile.rows, tile.columns) for tile in _C.lora_sm90_tiles] == [(128, 256), (128, 128)]
    for tile in _C.lora_sm90_tiles:
        assert tile.shared_memory <= 227 * 1024


@given(sizes, sizes)
def test_tiles_cover_the_result(rows, columns):
    for candidate, tile in enumerate(_C.lora_sm90_tiles):
        plan = _C.lora_plan_gemm_sm90(candidate, rows, columns)
        assert plan.candidate == candidate
        assert plan.row_tiles % CLUSTER == 0 and plan.row_tiles - blocks(rows, tile.rows) in (0, 1)
        assert plan.column_tiles == blocks(columns, tile.columns)


@given(sizes, sizes)
def test_swizzling_adds_no_tiles(rows, columns):
    """CUTLASS rounds the tiles up to whole groups."""
    for candidate in (LARGE, SMALL):
        plan = _C.lora_plan_gemm_sm90(candidate, rows, columns)
        fits = [s for s in (1, 2, 4, 8) if plan.row_tiles % (s * CLUSTER) == 0 and plan.column_tiles % s == 0]
        assert plan.swizzle == max(fits)


@given(sizes, sizes, sm_counts)
def test_the_plan_takes_the_shortest_time(rows, columns, sm_count):
    def time(candidate: int) -> int:
        plan, tile = _C.lora_plan_gemm_sm90(candidate, rows, columns), _C.lora_sm90_tiles[candidate]
        waves = blocks(plan.row_tiles // CLUSTER * plan.column_tiles, sm_count // CLUSTER)
        return waves * tile.rows * tile.columns * tile.cost

    plan = _C.lora_plan_gemm_sm90(rows, columns, _C.Device(sm=90, sm_count=sm_count, shared_memory=227 * 1024))
    assert plan.candidate == (SMALL if time(SMALL) < time(LARGE) else LARGE)


# Worked by hand: 66 clusters run at a time; a small tile has half the products of a large one, at 5/4 of the cost.
TABLE = [
    ((8192, 4096), LARGE),  # 512 clusters, 8 waves; 1024 small, 16 waves
    ((8192, 14336), LARGE),
    ((1024, 4096), LARGE),  # 64 clusters, one wave; 128 small, two
    ((512, 4096), SMALL),  # 32 clusters, one wave; 64 small, one
    ((2048, 1024), SMALL),
    ((8192, 128), SMALL),  # half of each large tile is empty
    ((16, 4096), SMALL),
    ((2048, 4096), LARGE),
]


@pytest.mark.parametrize(("shape", "wanted"), TABLE)
def test_plan_table(shape, wanted):
    assert _C.lora_plan_gemm_sm90(*shape, H100).candidate == wanted
