"""Shared-memory tiles of the LoRA kernels, filled and read by the kernels' own code on the host (layouts.cpp).

Shared memory has 32 banks of four bytes: eight lanes that each move 16 bytes, as in one phase of ldmatrix, do so at
once only if they touch eight different groups of four banks.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

import numpy as np
import pytest

from tests.device import standin

UNIT, GROUPS = 16, 8
# (bytes of an element, rows, columns); a factor that lies by features has fewer columns than a line of the tile.
TILES = [(2, 16, 64), (2, 64, 64), (2, 64, 16), (2, 128, 64), (2, 64, 128), (4, 16, 64), (4, 64, 64), (4, 64, 16)]
LINE = 64


@pytest.fixture(scope="module")
def printed() -> list[dict]:
    program = standin.program(standin.HERE / "layouts.cpp")
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(params=TILES, ids=lambda tile: "{}x{} of {} bytes".format(*tile[1:], tile[0]))
def tile(request, printed) -> dict:
    """One tile; `at` as an array [rows, columns] of offsets in bytes."""
    found = [t for t in printed if t["kind"] == "tile" and (t["bytes"], t["rows"], t["columns"]) == request.param]
    (tile,) = found
    return tile | {"at": np.array(tile["at"]).reshape(tile["rows"], tile["columns"])}


def busiest(offsets: Sequence[int]) -> int:
    """How many of eight 16-byte accesses meet in one group of banks: 1 is free of conflicts, 8 goes one by one."""
    assert len(offsets) == GROUPS
    groups = [offset // UNIT % GROUPS for offset in offsets]
    return max(groups.count(group) for group in groups)


def worst_column(at: np.ndarray, size: int) -> int:
    """The most lanes in one group of banks when eight rows of a block are read in the same column."""
    units = at[:, :: UNIT // size]
    return max(
        busiest(units[row : row + 8, column]) for row in range(0, len(at), 8) for column in range(units.shape[1])
    )


def test_all_tiles_are_listed(printed):
    assert {(t["bytes"], t["rows"], t["columns"]) for t in printed if t["kind"] == "tile"} == set(TILES)


def test_every_element_has_a_place_of_its_own(tile):
    places = tile["at"].ravel()
    assert len(set(places)) == len(places)
    assert (places % tile["bytes"] == 0).all()
    assert places.min() >= 0 and places.max() < tile["rows"] * max(tile["columns"], LINE) * tile["bytes"]


def test_threads_put_every_element_there_once(tile):
    """What lies in memory after all threads have put their chunks: each element where it belongs, and nothing else."""
    wanted = np.full(len(tile["held"]), -1)
    wanted[tile["at"].ravel() // tile["bytes"]] = np.arange(tile["rows"] * tile["columns"])
    assert (np.array(tile["held"]) == wanted).all()


def test_units_of_16_bytes_stay_whole_and_aligned(tile):
    size = tile["bytes"]
    units = tile["at"].reshape(tile["rows"], -1, UNIT // size)
    assert (units[..., 0] % UNIT == 0).all()
    assert (units - units[..., :1] == size * np.arange(UNIT // size)).all()


def test_eight_rows_meet_in_no_bank(tile):
    assert worst_column(tile["at"], tile["bytes"]) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_plain_rows_meet_in_one_bank(size):
    """The layout without its swizzle fails the check above: all eight rows want the same banks."""
    plain = size * np.arange(64 * LINE).reshape(64, LINE)
    assert worst_column(plain, size) == 8


def test_no_phase_of_ldmatrix_has_a_conflict(printed):
    """Each of the four phases of each ldmatrix of each warp, in every product of the kernels."""
    products = [p for p in printed if p["kind"] == "product"]
    assert len(products) == 10
    for product in products:
        phases = np.array(product["calls"]).reshape(-1, GROUPS)
        assert len(phases) and (phases % UNIT == 0).all()
        assert max(map(busiest, phases)) == 1, product["name"]


GEMM_OPERAND, GEMM_RESULT = 128 * 32 * 2, 128 * 128 * 2  # bytes of tiles of the segmented GEMM


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [("sent", "rows", GEMM_OPERAND), ("sent", "down", GEMM_OPERAND), ("loaded", "gemm", GEMM_RESULT)],
)
def test_a_gemm_moves_each_unit_of_its_tiles_once_without_a_conflict(printed, kind, name, size):
    (calls,) = (p["calls"] for p in printed if (p["kind"], p.get("name")) == (kind, name))
    assert sorted(calls) == list(range(0, size, UNIT))
    assert max(map(busiest, np.array(calls).reshape(-1, GROUPS))) == 1


def test_a_gemm_stores_each_pair_of_its_result_once_without_a_conflict(printed):
    """A warp stores two 16-bit numbers a lane at once: no two lanes in one of the 32 banks."""
    (calls,) = (p["calls"] for p in printed if p["kind"] == "stored")
    assert sorted(calls) == list(range(0, GEMM_RESULT, 4))
    for warp in np.array(calls).reshape(-1, 32):
        assert len(set(warp // 4 % 32)) == 32


def test_rows_of_the_up_projection_are_apart(printed):
    """A half warp stores two float32 a lane at once, lane l in row l / 4, columns 2 (l % 4): no two in one bank."""
    (delta,) = (p for p in printed if p["kind"] == "delta")

    def banks(stride: int) -> list[int]:
        return [(lane // 4 * stride + 2 * (lane % 4) + i) % 32 for lane in range(16) for i in range(2)]

    assert len(set(banks(delta["stride"]))) == 32
    assert len(set(banks(LINE))) == 8, "without the gap they do"
