"""Text classification data that every machine has: docstrings of Python's own standard library.

The task is docstring -> top-level module. The sources are parsed with `ast`, never imported, so nothing runs and no
window opens, whatever a module does at import time. About one docstring in nine names its module. The texts depend on
the Python version (3.11 and 3.12 document different objects); for one version and seed they are always the same.
"""

from __future__ import annotations

import ast
import functools
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

# Test suites, teaching material, graphical packages and what newer Pythons dropped: Linux distributions ship them in
# separate packages, so that the data would depend on what happens to be installed.
EXCLUDED = frozenset({"test", "idlelib", "turtledemo", "turtle", "tkinter", "lib2to3", "ensurepip", "distutils"})
EXCLUDED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "_vendor"})


def _sources(stdlib: Path) -> Iterator[tuple[str, Path]]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in EXCLUDED:
            continue
        if (stdlib / f"{name}.py").is_file():
            yield name, stdlib / f"{name}.py"
        elif (stdlib / name / "__init__.py").is_file():
            for path in sorted((stdlib / name).rglob("*.py")):
                if not EXCLUDED_FOLDERS & set(path.relative_to(stdlib).parts[:-1]):
                    yield name, path


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if text:
                yield text


@functools.cache
def _documented(stdlib: Path) -> dict[str, list[str]]:
    """Texts by module, each text under the first module that has it."""
    texts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for module, path in _sources(stdlib):
        for text in _docstrings(path):
            if text not in seen:
                seen.add(text)
                texts.setdefault(module, []).append(text)
    return texts


def stdlib_docstrings(modules: int = 20, per_module: int = 150, seed: int = 0) -> list[tuple[str, str]]:
    """(docstring, top-level module) of the `modules` modules with most documented objects, at most `per_module` each.

    White space is collapsed to single spaces. Equal texts are kept once, under the first module in alphabetical order.
    The choice of `per_module` texts is drawn with `seed`.

    Raises:
        InputError: this Python's standard library has no sources on disk.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = _documented(stdlib)
    if len(texts) < modules:
        raise InputError(f"{stdlib} holds documented sources of {len(texts)} modules, wanted at least {modules}")
    chosen = sorted(texts, key=lambda name: (-len(texts[name]), name))[:modules]
    generator = random.Random(seed)
    rows = []
    for module in sorted(chosen):
        picked = generator.sample(texts[module], min(per_module, len(texts[module])))
        rows.extend((text, module) for text in picked)
    return rows
