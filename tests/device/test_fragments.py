"""The emulator's instructions against another authority than our reading of the PTX ISA: the layouts of CUTLASS."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from tests.device import standin
from tests.device.test_emulator import WARP, a_places, b_places, d_places, lanes


@pytest.fixture(scope="module")
def cutlass() -> dict[str, np.ndarray]:
    """Offsets [lane, value] by name, as fragments.cpp prints them."""
    program = standin.program(standin.HERE / "fragments.cpp")
    found: dict[str, dict[tuple[int, int], int]] = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, lane, value, offset = line.split()
        found.setdefault(name, {})[int(lane), int(value)] = int(offset)
    return {
        name: np.array([[offsets[lane, value] for value in range(len(offsets) // WARP)] for lane in range(WARP)])
        for name, offsets in found.items()
    }


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mma_fragments_are_those_of_cutlass(cutlass, kind):
    a, b, d = a_places(), b_places(), d_places()
    np.testing.assert_array_equal(cutlass[f"{kind}_a"], a[..., 0] + 16 * a[..., 1])
    np.testing.assert_array_equal(cutlass[f"{kind}_b"], b[..., 1] + 8 * b[..., 0])
    np.testing.assert_array_equal(cutlass[f"{kind}_d"], d[..., 0] + 16 * d[..., 1])


def test_ldmatrix_fragments_are_those_of_cutlass(cutlass):
    """Values 2 m and 2 m + 1 of a lane are the two halves of its register for matrix m."""
    plain = [[64 * m + 8 * g + 2 * t + e for m in range(4) for e in range(2)] for g, t in lanes()]
    transposed = [[64 * m + 8 * (2 * t + e) + g for m in range(4) for e in range(2)] for g, t in lanes()]
    np.testing.assert_array_equal(cutlass["load"], plain)
    np.testing.assert_array_equal(cutlass["load_trans"], transposed)
