"""The wheel and the source distribution: what is in them, and that the package works away from the source tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from peftops import _C

from .conftest import ROOT

LIBRARIES = {"peftops/lib/libpeftops.so"} | ({"peftops/lib/libpeftops_cuda.so"} if _C.cuda_targets else set())

RUN = """
import torch, peftops
from peftops import _C
x, weight, a, b = torch.ones(3, 8), torch.ones(4, 8), torch.ones(2, 8, requires_grad=True), torch.ones(4, 2)
y = peftops.ops.lora_linear(x, weight, None, a, b, 0.5)
y.sum().backward()
print(peftops.__file__, y[0, 0].item(), a.grad[0, 0].item(), peftops.__version__ == _C.version)
"""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    # cmake and ninja as `make build` finds them, so that nothing is compiled twice.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    (path,) = folder.iterdir()
    return path


def test_wheel_name(wheel):
    assert re.fullmatch(r"peftops-\d+\.\d+\.\d+-py3-none-linux_(x86_64|aarch64)\.whl", wheel.name)


def test_wheel_contents(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        f"peftops/{path.relative_to(ROOT / 'python/peftops')}" for path in (ROOT / "python/peftops").rglob("*.py")
    }
    native = {name for name in names if name.endswith(".so")}
    assert names - native == sources
    assert native >= LIBRARIES
    assert [re.sub(r"_C\..*\.so", "_C", name) for name in native - LIBRARIES] == ["peftops/_C"]


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    required = [r for r in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE) if "extra ==" not in r]
    assert required == ["torch>=2.10"]
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_installed_package_works_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    pip("install", "--no-deps", "--target", target, wheel)
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # y = 8 + 0.5 * 2 * 8; dA = 0.5 * sum over 3 tokens and 4 outputs.
    assert done.stdout.split() == [str(target / "peftops" / "__init__.py"), "16.0", "6.0", "True"]
    done = subprocess.run(
        [sys.executable, "-m", "peftops", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "finetune" in done.stdout, done.stderr


def test_source_distribution_has_what_the_build_needs(tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(p.relative_to(ROOT))
        for folder in ("cmake", "csrc", "python")
        for p in (ROOT / folder).rglob("*.*")
        if p.is_file()
    }
    wanted = {name for name in wanted if Path(name).suffix in {".cmake", ".cpp", ".cu", ".cuh", ".h", ".map", ".py"}}
    assert wanted | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
