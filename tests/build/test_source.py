"""Rules of the house that a look at the source decides."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import peftops  # noqa: F401  (registers the schemas)
import pytest
import torch

from .conftest import ROOT

CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "peftops"
NATIVE = {".cpp", ".h", ".cu", ".cuh"}

# Function-local statics that hold no fact about a device, so that they need no device key.
DEVICE_FREE_STATICS = {
    ("common/cpu_level.cpp", "chosen"),  # the instruction-set level of the process
    ("lora/cpu.cpp", "kernels"),  # the kernels of that level
}

# What a part of the package may import from another one; a part that is not listed is free for all.
LAYERS = {
    "ops": {"ops"},
    "nn": {"ops", "nn"},
    "methods": {"ops", "nn", "methods"},
    "testing": {"ops", "testing"},
    "integrations": {"ops", "nn", "methods", "integrations"},
    "cli": {"ops", "nn", "methods", "integrations", "cli"},
}


def repository_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert listing.returncode == 0, f"git: {listing.stderr}"
    return [path for path in map(ROOT.joinpath, listing.stdout.splitlines()) if path.is_file()]


def native_files() -> list[Path]:
    files = [path for path in CSRC.rglob("*") if path.suffix in NATIVE]
    assert files
    return files


def code(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a C++ file without its comments."""
    return [(number, line.partition("//")[0]) for number, line in enumerate(path.read_text().splitlines(), 1)]


def places(pattern: str, files: list[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in code(path)
        if re.search(pattern, line)
    ]


def test_launches_go_through_one_door():
    assert not places(r"<<<", [path for path in native_files() if path != CSRC / "common" / "launch.h"])


def test_threads_are_those_of_torch():
    assert not places(r"std::(j?thread|async)\b|#pragma omp|\bomp_|\bpthread_", native_files())


def test_no_unstable_torch_header():
    headers = r'#include [<"](?!torch/csrc/(stable|inductor/aoti_torch)/|torch/headeronly/)(torch|ATen|c10|caffe2)/'
    assert not places(headers, native_files())


def test_function_local_statics_hold_no_fact_about_a_device():
    found = {
        (str(path.relative_to(CSRC)), name)
        for path in native_files()
        for _, line in code(path)
        for name in re.findall(r"^\s+static (?!constexpr)[^()]*?(\w+)\s*(?:=|;|\{)", line)
    }
    assert found == DEVICE_FREE_STATICS


def test_schemas_take_no_string():
    """A `str` argument leaks one string per call in the stable ABI (pytorch#191340)."""
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("peftops::")]
    assert schemas
    for schema in schemas:
        bad = [argument.name for argument in schema.arguments if "str" in str(argument.type)]
        assert not bad, f"{schema.name}: {bad}"


def test_every_schema_stands_in_ops_cpp():
    listed = set(re.findall(r'^\s*(?:m\.def\()?"(\w+(?:\.\w+)?)\(', (CSRC / "ops.cpp").read_text(), re.MULTILINE))
    registered = {
        name.removeprefix("peftops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("peftops::")
    }
    assert listed == registered


@pytest.mark.parametrize(
    "room", sorted(path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "common")
)
def test_a_room_has_the_same_names_everywhere(room):
    wanted = [
        f"csrc/{room}/README.md",
        f"csrc/{room}/{room}.cpp",
        f"csrc/{room}/plan.h",
        f"csrc/{room}/cpu.cpp",
        f"python/peftops/ops/{room}.py",
        f"tests/ops/test_{room}.py",
        f"bench/{room}.py",
    ]
    assert not [path for path in wanted if not (ROOT / path).is_file()]


def imported(path: Path) -> set[str]:
    """The parts of peftops that a module imports, at its top or lazily."""
    package = ("peftops", *path.relative_to(PACKAGE).parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names += [[*base, alias.name] for alias in node.names]
    return {name[1] for name in names if len(name) > 1 and name[0] == "peftops"} & set(LAYERS)


@pytest.mark.parametrize("part", LAYERS)
def test_layers(part):
    for path in (PACKAGE / part).rglob("*.py"):
        assert imported(path) <= LAYERS[part], f"{path.relative_to(ROOT)} imports {imported(path) - LAYERS[part]}"


def test_files_are_short():
    for path in repository_files():
        if path.suffix in NATIVE | {".py"}:
            limit = 900 if path.suffix in {".cu", ".cuh"} else 600
            lines = path.read_text().count("\n")
            assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines; at most {limit}: split it"


def test_repository_is_tidy():
    for path in repository_files():
        name, content = path.relative_to(ROOT), path.read_bytes()
        assert len(content) <= 1_000_000, f"{name}: {len(content)} bytes in the repository"
        if path.suffix == ".png":
            continue
        text = content.decode()
        assert "\r" not in text, f"{name}: carriage return"
        assert not text or text.endswith("\n"), f"{name}: no newline at the end"
        bad = [number for number, line in enumerate(text.splitlines(), 1) if line != line.rstrip()]
        assert not bad, f"{name}: blanks at the end of lines {bad}"
