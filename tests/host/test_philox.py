"""csrc/common/philox.h: the generator's published vectors, and dropout's bits against their definition."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

WORD = 2**32 - 1

# Random123's kat_vectors, philox4x32 with 10 rounds.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

words = st.integers(0, WORD)
seeds = st.integers(0, 2**64 - 1)
rows = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3]) | st.integers(0, 2**63 - 1)
blocks = st.sampled_from([0, 1, 2**28 - 1]) | st.integers(0, 2**31 - 1)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_published_vectors(counter, key, wanted):
    assert tuple(_C.philox4x32(counter, key)) == wanted
    assert tuple(philox(list(counter), list(key))) == wanted


@given(st.lists(words, min_size=4, max_size=4), st.lists(words, min_size=2, max_size=2))
def test_philox_is_its_definition(counter, key):
    assert _C.philox4x32(counter, key) == philox(counter, key)


@given(seeds, rows, blocks, st.integers(0, 65536))
def test_dropout_byte_is_its_definition(seed, row, block, threshold):
    """Key = seed, counter = (block, row low, row high, 0); element j takes half j of the 128 bits, low half first."""
    random = philox([block, row & WORD, row >> 32, 0], [seed & WORD, seed >> 32])
    halves = [word >> shift & 0xFFFF for word in random for shift in (0, 16)]
    assert _C.dropout_byte(seed, row, block, threshold) == sum(
        (half >= threshold) << j for j, half in enumerate(halves)
    )


@given(seeds, rows, blocks)
def test_dropout_ends(seed, row, block):
    assert _C.dropout_byte(seed, row, block, 0) == 0xFF
    assert _C.dropout_byte(seed, row, block, 65536) == 0


@given(st.floats(0, 1))
def test_dropout_threshold(p):
    assert _C.dropout_threshold(p) == math.floor(65536 * p + 0.5)


def test_dropout_keeps_the_share_it_says():
    """2^18 bits: the share that is kept is within five standard deviations of 1 - p."""
    for p in (0.05, 0.1, 0.5, 0.9):
        threshold = _C.dropout_threshold(p)
        count = 2**18
        kept = sum(
            _C.dropout_byte(2024, row, block, threshold).bit_count()
            for row in range(64)
            for block in range(count // 8 // 64)
        )
        probability = 1 - threshold / 65536
        assert abs(kept - count * probability) <= 5 * math.sqrt(count * probability * (1 - probability))
