"""csrc/common/numeric.h: bfloat16 and float16 against torch, every bit pattern and every rounding boundary of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

FORMATS = {
    torch.bfloat16: (_C.bfloat16_to_float, _C.float_to_bfloat16),
    torch.float16: (_C.float16_to_float, _C.float_to_float16),
}
formats = pytest.mark.parametrize("dtype", FORMATS, ids=["bfloat16", "float16"])


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """All 2^16 values of the format."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def bits(values: torch.Tensor) -> list[int]:
    return [value & 0xFFFF for value in values.view(torch.int16).tolist()]


def rounded(dtype: torch.dtype, values: torch.Tensor) -> list[int]:
    """Our rounding of float32 values, as bit patterns."""
    return [FORMATS[dtype][1](value) for value in values.tolist()]


@formats
def test_every_value_widens_as_torch_does(dtype):
    values = patterns(dtype)
    ours = torch.tensor([FORMATS[dtype][0](pattern) for pattern in bits(values)])
    theirs = values.float()
    assert torch.equal(ours.isnan(), theirs.isnan())
    exact = ~theirs.isnan()
    assert torch.equal(ours.view(torch.int32)[exact], theirs.view(torch.int32)[exact])


@formats
def test_every_value_comes_back(dtype):
    values = patterns(dtype)
    to_float, from_float = FORMATS[dtype]
    numbers = ~values.isnan()
    for pattern in bits(values[numbers]):
        assert from_float(to_float(pattern)) == pattern
    for pattern in bits(values[~numbers]):
        assert math.isnan(to_float(from_float(to_float(pattern))))


def boundaries(dtype: torch.dtype) -> torch.Tensor:
    """The float32 value halfway between each two neighbours of the format, the last one and infinity among them."""
    positive = patterns(dtype)
    positive = positive[positive.view(torch.int16) >= 0].sort().values
    positive = positive[positive.isfinite()].double()
    beyond = 2 * positive[-1] - positive[-2]  # where the next value would be, had the exponent one more step
    halves = (positive + torch.cat([positive[1:], beyond.view(1)])) / 2
    floats = halves.float()
    assert torch.equal(floats.double(), halves)
    return torch.cat([floats, -floats])


@formats
def test_every_halfway_case_rounds_to_even(dtype):
    halves = boundaries(dtype)
    assert len(halves) == 2 * (0x7F80 if dtype == torch.bfloat16 else 0x7C00)
    ours = rounded(dtype, halves)
    assert ours == bits(halves.to(dtype))
    assert all(pattern % 2 == 0 for pattern in ours)


@formats
@pytest.mark.parametrize("direction", [-math.inf, math.inf])
def test_a_step_beside_halfway_rounds_to_the_nearest(dtype, direction):
    beside = torch.nextafter(boundaries(dtype), torch.tensor(direction))
    assert rounded(dtype, beside) == bits(beside.to(dtype))


@formats
@given(pattern=st.integers(0, 2**32 - 1))
def test_any_float_rounds_as_torch_does(dtype, pattern):
    value = torch.tensor([pattern - 2**32 if pattern >= 2**31 else pattern], dtype=torch.int32).view(torch.float32)
    theirs = value.to(dtype)
    (ours,) = rounded(dtype, value)
    if value.isnan():
        assert math.isnan(FORMATS[dtype][0](ours))
    else:
        assert [ours] == bits(theirs)
