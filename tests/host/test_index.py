"""csrc/common/index.h against Python's integers, which have no width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)

# Where widths end, and a few steps to each side.
CORNERS = sorted(
    {sign * 2**power + step for power in (0, 15, 16, 31, 32, 53, 62, 63) for sign in (-1, 1) for step in range(-3, 4)}
)


def within(low: int, high: int) -> st.SearchStrategy[int]:
    corners = [value for value in CORNERS if low <= value <= high]
    return st.sampled_from(corners) | st.integers(low, high)


sizes = within(0, INT64[1])
values = within(*INT64)
divisors = within(1, INT64[1])


@given(sizes, divisors)
def test_ceil_div(a, b):
    assert _C.ceil_div(a, b) == -(-a // b)


@given(sizes, divisors)
def test_round_up(a, b):
    wanted = -(-a // b) * b
    if wanted <= INT64[1]:
        assert _C.round_up(a, b) == wanted


@given(sizes, sizes, sizes)
def test_offset_of(row, stride, column):
    wanted = row * stride + column
    if wanted <= INT64[1]:
        assert _C.offset_of(row, stride, column) == wanted


@pytest.mark.parametrize("row", [2**31 - 1, 2**31, 2**32 + 1])
@pytest.mark.parametrize("stride", [1, 4096, 2**31 - 1])
def test_offset_of_passes_32_bits(row, stride):
    assert _C.offset_of(row, stride, 7) == row * stride + 7


@given(values, values)
def test_checked_product(a, b):
    if INT64[0] <= a * b <= INT64[1]:
        assert _C.checked_product(a, b) == a * b
    else:
        with pytest.raises(OverflowError, match=rf"^product: {a} \* {b} does not fit 64 bits$"):
            _C.checked_product(a, b)


@pytest.mark.parametrize(
    ("a", "b"), [(2**32, 2**31), (2**62, 2), (-(2**63), -1), (2**63 - 1, 2**63 - 1), (3037000500, 3037000500)]
)
def test_checked_product_refuses(a, b):
    with pytest.raises(OverflowError):
        _C.checked_product(a, b)


@given(values)
def test_checked_int32(value):
    if INT32[0] <= value <= INT32[1]:
        assert _C.checked_int32(value) == value
    else:
        with pytest.raises(OverflowError, match=rf"^value: {value} does not fit 32 bits$"):
            _C.checked_int32(value)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**32, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_checked_int32_refuses(value):
    with pytest.raises(OverflowError):
        _C.checked_int32(value)
