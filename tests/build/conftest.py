"""The built libraries and their objects, and what nm, objdump and readelf say about them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from peftops import _C

from . import kernels

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cmake"
LIBRARY = ROOT / "python" / "peftops" / "lib" / "libpeftops.so"


# What is not run, by the marker that asks for it: why, and how many tests.
left_out: dict[str, tuple[str, int]] = {}


def reason_to_leave_out(marker: str) -> str | None:
    """Why tests with this marker cannot run here."""
    if not _C.cuda_targets:
        return "libpeftops_cuda was not built, because there is no nvcc or PEFTOPS_CUDA is 0"
    if marker == "same_nvcc" and kernels.LIBRARY.exists():
        recorded, _ = kernels.read_record(kernels.RECORD)
        if (built := kernels.compiler(kernels.LIBRARY)) != recorded:
            return f"{kernels.RECORD.name} is of nvcc {recorded}, but the library of nvcc {built}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker in ("cuda_library", "same_nvcc"):
        out = [item for item in items if item.get_closest_marker(marker)]
        if out and (reason := reason_to_leave_out(marker)):
            left_out[marker] = (reason, len(out))
            config.hook.pytest_deselected(items=out)
            items[:] = [item for item in items if item not in out]


def pytest_terminal_summary(terminalreporter) -> None:
    for reason, count in left_out.values():
        terminalreporter.write_line(f"left out: {count} tests, because {reason}")


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
def cuda_library() -> Path:
    if not kernels.LIBRARY.exists():
        pytest.fail(f"{kernels.LIBRARY} is missing: run `make build`")
    return kernels.LIBRARY


@pytest.fixture(scope="session")
def built(cuda_library) -> list[kernels.Kernel]:
    """The kernels of the built library."""
    return kernels.kernels(cuda_library)


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
    """The objects of each instruction-set level; those compiled for every machine are under "" and, for `_C`, "_C".

    Of CUDA sources it is the host's part that binutils sees.
    """
    found: dict[str, list[Path]] = {}
    for command in commands:
        target = command["output"].relative_to(BUILD / "CMakeFiles").parts[0].removesuffix(".dir")
        level = "" if target in ("peftops", "peftops_cuda") else target.removeprefix("peftops_")
        found.setdefault(level, []).append(command["output"])
    return found
