"""Builds the native libraries with CMake and puts them into the package; the rest is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "python" / "peftops"

sys.path.insert(0, str(ROOT / "cmake"))  # pip runs this file without its directory on the path
import cuda_toolkit  # noqa: E402


def version() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1)


def directory_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"peftops: the build needs {package}: install it, or build without --no-build-isolation")
    return Path(spec.origin).parent


def tool(name: str) -> str:
    # The scripts of this Python come last: with build isolation, pip puts those of the build's own environment first.
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))
    if found is None:
        raise SystemExit(f"peftops: the build needs {name}: pip install {name}, or build without --no-build-isolation")
    return found


class CMakeBuild(build_ext):
    """One CMake build for the libraries and _C, incremental. The environment variable CMAKE_ARGS adds options.

    The CUDA library is built where nvcc is found, or as the environment variable PEFTOPS_CUDA (1 or 0) says.
    """

    def run(self) -> None:
        build = ROOT / "build" / "cmake"
        package = PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "peftops"
        cmake = tool("cmake")
        nvcc, cutlass = cuda_toolkit.nvcc(), cuda_toolkit.cutlass()
        configure = [
            f"-DPEFTOPS_TORCH_DIR={directory_of('torch')}",
            f"-DPEFTOPS_VERSION={version()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={directory_of('pybind11') / 'share' / 'cmake' / 'pybind11'}",
            f"-DCMAKE_INSTALL_PREFIX={PACKAGE}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
            *([f"-DCUTLASS_DIR={cutlass}"] if cutlass else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # CMake would keep what it found for another Python, torch or compiler option. CUDA may come later.
        record = build / "configuration.txt"
        before = set(record.read_text().splitlines()) if record.exists() else set()
        if before - set(configure) or any("CUDA" not in o and "CUTLASS" not in o for o in set(configure) - before):
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        # Not in the record: what was built stays valid.
        cuda = f"-DPEFTOPS_CUDA={'ON' if cuda_toolkit.wanted() else 'OFF'}"
        subprocess.run([cmake, *generator, "-S", str(ROOT), "-B", str(build), cuda, *configure], check=True)
        record.write_text("\n".join(configure))
        subprocess.run([cmake, "--build", str(build), "--parallel", str(os.cpu_count())], check=True)
        # A CUDA library that is not built any more must not stay beside newer operators.
        shutil.rmtree(package / "lib", ignore_errors=True)
        subprocess.run([cmake, "--install", str(build), "--strip", "--prefix", str(package)], check=True)


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the operators need no Python symbol, so one wheel serves every Python.

    `_C`, which no operator needs, is only importable from the Python that built the wheel.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        # A module that was deleted since the last build must not come back from this directory.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("peftops._C", sources=[])],
    # Only a build with isolation installs it: CUTLASS's package brings packages that its headers do not need.
    setup_requires=[cuda_toolkit.CUTLASS] if cuda_toolkit.wanted() and cuda_toolkit.cutlass() is None else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
