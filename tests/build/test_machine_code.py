"""Each instruction-set level keeps to its instructions, and no function of a higher level can reach a lower machine."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from peftops import _C

from .conftest import symbols, tool

# What a level's objects may not contain, as patterns on a line of disassembly. "" and "_C" are code for every machine.
VEX = re.compile(r"\sv[a-z0-9]+\s+.*%[xyz]mm")  # three-operand forms: AVX and later
EVEX = re.compile(
    r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b"
)  # 512 bits, registers 16 to 31, mask registers: AVX-512
FORBIDDEN = {"": VEX, "_C": VEX, "baseline": VEX, "avx2": EVEX}


@cache
def disassembly(path: Path) -> list[str]:
    return tool("objdump", "-d", "--no-show-raw-insn", path).splitlines()


def test_every_level_is_built(level_objects):
    assert set(level_objects) == {"", "_C", *_C.cpu_levels}


@pytest.mark.parametrize("level", [level for level in FORBIDDEN if level in ("", "_C", *_C.cpu_levels)])
def test_no_instruction_above_the_level(level_objects, level):
    pattern = FORBIDDEN[level]
    bad = [
        f"{path.name}: {line.strip()}"
        for path in level_objects[level]
        for line in disassembly(path)
        if pattern.search(line)
    ]
    assert not bad, f"{len(bad)} instructions above the level, the first: {bad[:3]}"


def test_levels_use_their_vectors(level_objects):
    """The patterns above bite: each matches the objects of the next level up."""
    for level, pattern in (("avx512", EVEX), ("avx2", VEX)):
        if level in _C.cpu_levels:
            assert any(pattern.search(line) for path in level_objects[level] for line in disassembly(path)), level


def test_level_objects_export_their_entries_only(level_objects):
    """A weak symbol of a level's object could replace the one of another level when the linker keeps a single copy."""
    for level in _C.cpu_levels:
        for path in level_objects[level]:
            defined = symbols(path, "--defined-only", "--extern-only")
            assert defined, path
            bad = [(kind, name) for kind, name in defined if kind != "T" or not name.endswith(f"kernels_{level}Ev")]
            assert not bad, f"{path.name} of {level} also defines {bad}"
