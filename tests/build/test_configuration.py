"""The compiler calls: every source is built, with the flags that the design asks for."""

from __future__ import annotations

import re

from peftops import _C

from .conftest import BUILD, ROOT


def definitions(command: dict) -> dict[str, str]:
    return dict(re.findall(r"-D(\w+)(?:=(\S*))?", command["command"]))


def of_target(commands: list[dict], target: str) -> list[dict]:
    found = [c for c in commands if c["output"].is_relative_to(BUILD / "CMakeFiles" / f"{target}.dir")]
    assert found, f"the build has no target {target}"
    return found


def test_every_source_is_in_the_build(commands):
    kinds = ["*.cpp", "*.cu"] if _C.cuda_targets else ["*.cpp"]
    sources = {path for kind in kinds for path in (ROOT / "csrc").rglob(kind)}
    assert sources, "no sources"
    assert {command["file"] for command in commands} == sources


def test_target_is_torch_2_10(commands):
    for command in of_target(commands, "peftops"):
        value = int(definitions(command)["TORCH_TARGET_VERSION"], 16)
        assert ((value >> 56) & 0xFF, (value >> 48) & 0xFF) == (2, 10)
        assert "TORCH_STABLE_ONLY" in definitions(command)


def test_flags(commands):
    for command in commands:
        words = command["command"].split()
        assert {"-O3", "-Wall", "-Wextra"} <= set(words), command["file"]
        assert "NDEBUG" in definitions(command), command["file"]
        assert not {"-march=native", "-fopenmp", "-ffast-math", "-Ofast"} & set(words), command["file"]


def test_instruction_sets_are_for_levels_only(commands):
    for target in ("peftops", "peftops_baseline", "_C"):
        for command in of_target(commands, target):
            assert not re.findall(r"\s-m\S+", command["command"]), f"{target}: {command['file']}"
