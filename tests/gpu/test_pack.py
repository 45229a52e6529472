"""The archive for a GPU machine holds what the checks need, and what is unpacked runs without `_C`."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile

import pytest

from tests.gpu import pack
from tests.gpu.record import ROOT


def test_what_is_unpacked_imports_and_checks_without_the_extension_module(tmp_path):
    archive = tmp_path / "peftops-gpu.tar.gz"
    size = pack.pack(ROOT, archive, "0123456789ab", required=["libpeftops.so"])
    assert size == archive.stat().st_size < pack.LIMIT
    there = tmp_path / "there"
    with tarfile.open(archive) as file:
        names = file.getnames()
        file.extractall(there)
    assert not any("_C" in name or name.startswith((".git/", ".venv", "build")) for name in names)
    assert {"Makefile", "tests/gpu/check.py", "bench/lora.py", "python/peftops/lib/libpeftops.so"} <= set(names)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"PYTHONPATH": "python", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu.check", "--device", "cpu", "--part", "stream", "--output", "r.json"]
    done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "commit 0123456789ab" in done.stdout
    where = "import peftops, importlib.util as u; print(peftops.__file__, u.find_spec('peftops._C'))"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=there, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{there}/python/peftops/__init__.py None\n"


@pytest.fixture(autouse=True)
def same_library(monkeypatch):
    """Whether the library is that of kernels.txt is tested in tests/build."""
    monkeypatch.setattr(pack, "library_differs", lambda: None)


def test_a_library_that_is_not_that_of_the_record_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "library_differs", lambda: "finish for sm_80: other machine code, and 3 more")
    with pytest.raises(ValueError, match="not that of tests/build/kernels.txt .* finish for sm_80: other machine code"):
        pack.pack(ROOT, tmp_path / "a.tar.gz", "0", required=["libpeftops.so"])
    assert not (tmp_path / "a.tar.gz").exists()


def test_a_library_that_is_not_built_is_named(tmp_path):
    with pytest.raises(ValueError, match="libother.so is not built: make build"):
        pack.pack(ROOT, tmp_path / "a.tar.gz", "0", required=["libpeftops.so", "libother.so"])
    assert not (tmp_path / "a.tar.gz").exists()


def test_an_archive_that_cannot_be_carried_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "LIMIT", 1000)
    with pytest.raises(ValueError, match="but may have 0"):
        pack.pack(ROOT, tmp_path / "a.tar.gz", "0", required=["libpeftops.so"])
