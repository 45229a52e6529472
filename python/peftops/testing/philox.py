"""Philox4x32-10 and the dropout mask made from it, in plain torch: the oracle of every masked path.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (section 4.3 and the Random123 library).
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: Random123's known answers: (counter, key, words).
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((_MASK32,) * 4, (_MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit numbers held in int64."""
    low = (b * a) & _MASK32
    high = ((a >> 16) * b + (((a & 0xFFFF) * b) >> 16)) >> 16
    return high & _MASK32, low


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32.

    counter: four int64 tensors of one shape holding 32-bit numbers. key: two 32-bit numbers.
    Returns four int64 tensors of that shape holding 32-bit numbers.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def dropout_mask(seed: torch.Tensor | int, rows: int, cols: int, p: float) -> torch.Tensor:
    """bool [rows, cols], True = kept, as every operator with dropout defines it.

    Key = the int64 seed; counter = (column / 8, row low, row high, 0); element j of 8 takes the 16-bit half j, low
    half first; kept iff half >= round(65536 p).
    """
    key = int(seed) & 0xFFFFFFFFFFFFFFFF
    groups = (cols + 7) // 8
    column, row = torch.arange(groups)[None, :], torch.arange(rows)[:, None]
    shape = (rows, groups)
    counter = (
        column.expand(shape),
        (row & _MASK32).expand(shape),
        (row >> 32).expand(shape),
        torch.zeros(shape, dtype=torch.int64),
    )
    words = philox4x32(counter, (key & _MASK32, key >> 32))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (halves >= round(65536 * p)).reshape(rows, groups * 8)[:, :cols]
