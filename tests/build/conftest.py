"""The built library and its objects, and what nm, objdump and readelf say about them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cmake"
LIBRARY = ROOT / "python" / "peftops" / "lib" / "libpeftops.so"


def tool(name: str, *arguments: str | Path) -> str:
    """The output of a program of GNU binutils; a missing one fails the audit, it is never skipped."""
    if shutil.which(name) is None:
        pytest.fail(f"the binary audit needs {name}: install binutils (apt-get install binutils)")
    return subprocess.run([name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type, name) of each symbol that nm lists, without a symbol version."""
    fields = (line.split() for line in tool("nm", *options, path).splitlines())
    return [(f[-2], f[-1].partition("@")[0]) for f in fields if len(f) >= 2]


@pytest.fixture(scope="session")
def library() -> Path:
    if not LIBRARY.exists():
        pytest.fail(f"{LIBRARY} is missing: run `make build`")
    return LIBRARY


@pytest.fixture(scope="session")
def commands() -> list[dict]:
    """The compiler calls of the build: file, output (both absolute) and command of each."""
    path = BUILD / "compile_commands.json"
    if not path.exists():
        pytest.fail(f"{path} is missing: run `make build`")
    entries = json.loads(path.read_text())
    return [
        {
            "file": Path(entry["file"]).resolve(),
            "output": Path(entry["directory"], entry["command"].split(" -o ")[1].split()[0]),
            "command": entry["command"],
        }
        for entry in entries
    ]


@pytest.fixture(scope="session")
def level_objects(commands) -> dict[str, list[Path]]:
    """The objects of each instruction-set level; those compiled for every machine are under "" and, for `_C`, "_C"."""
    found: dict[str, list[Path]] = {}
    for command in commands:
        target = command["output"].relative_to(BUILD / "CMakeFiles").parts[0].removesuffix(".dir")
        level = "" if target == "peftops" else target.removeprefix("peftops_")
        found.setdefault(level, []).append(command["output"])
    return found
