"""Builds the native libraries with CMake and puts them into the package; the rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1)


class CMakeBuild(build_ext):
    """One CMake build for libpeftops and _C."""

    def run(self) -> None:
        torch = Path(importlib.util.find_spec("torch").origin).parent
        pybind11 = Path(importlib.util.find_spec("pybind11").origin).parent
        # An editable install keeps its build directory, so that the next build is incremental.
        build = ROOT / "build" / "cmake" if self.inplace else Path(self.build_temp).resolve() / "cmake"
        package = ROOT / "python" / "peftops" if self.inplace else Path(self.build_lib).resolve() / "peftops"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            f"-DPEFTOPS_TORCH_DIR={torch}",
            f"-DPEFTOPS_VERSION={version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
        ]
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *configure], check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count())], check=True)
        subprocess.run(["cmake", "--install", str(build), "--strip"], check=True)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the operators need no Python symbol, so one wheel serves every Python.

    `_C`, which no operator needs, is only importable from the Python that built the wheel.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("peftops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
