"""libpeftops loads into every PyTorch from 2.10 on and every Python: what it imports, exports and needs."""

from __future__ import annotations

import re
from pathlib import Path

from .conftest import LIBRARY, ROOT, symbols, tool

SHIMS = Path(__file__).parent / "shims-2.10.txt"
MAX_BYTES = 3_000_000


def imports(library: Path) -> list[str]:
    return [name for _, name in symbols(library, "-D", "--undefined-only")]


def needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", library))


def test_imports_no_cxx_symbol_of_torch(library):
    # c10, at or torch as a namespace inside a mangled name, as in _ZN3c10...
    bad = [name for name in imports(library) if re.match(r"_Z.*(3c10|2at|5torch|5caffe)", name)]
    assert not bad, f"imports C++ symbols of torch, which change from version to version: {bad}"


def test_imports_no_python_symbol(library):
    bad = [name for name in imports(library) if re.match(r"_?Py", name)]
    assert not bad, f"imports symbols of Python: {bad}"


def test_imported_shims_exist_in_torch_2_10(library):
    shims = {line for line in SHIMS.read_text().splitlines() if line and not line.startswith("#")}
    used = {name for name in imports(library) if name.startswith(("aoti_torch_", "torch_"))}
    assert used, "imports no shim at all: is this the library with the operators?"
    assert used <= shims, f"imports shims that torch 2.10 lacks: {sorted(used - shims)}"


def test_starts_no_threads(library):
    bad = [name for name in imports(library) if re.match(r"GOMP_|omp_|__kmpc|pthread_|_ZNSt6thread", name)]
    assert not bad, f"threads come from torch alone, but this imports {bad}"


def test_exports_what_export_h_lists(library):
    exported = {name for _, name in symbols(library, "-D", "--defined-only")}
    assert exported == set(
        re.findall(r"^PEFTOPS_EXPORT .*?(\w+)\(\);", (ROOT / "csrc/common/export.h").read_text(), re.MULTILINE)
    )


def test_needs_torch_and_the_compiler_runtime_only(library):
    allowed = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}
    assert "libtorch_cpu.so" in needed(library)
    assert set(needed(library)) <= allowed, "neither Python, nor an OpenMP runtime beside torch's, nor anything else"


def test_no_path_of_the_build_machine(library):
    extension = next((ROOT / "python" / "peftops").glob("_C*.so"))
    for path, wanted in ((library, []), (extension, ["$ORIGIN/lib"])):
        assert re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", tool("readelf", "-d", path)) == wanted, path.name
        assert str(ROOT).encode() not in path.read_bytes(), f"{path.name} contains {ROOT}"


def test_size(library):
    assert library.stat().st_size <= MAX_BYTES


def test_stripped(library):
    assert not tool("nm", library), "the installed library still has its symbol table"


def test_is_the_library_that_tests_load(library):
    import peftops._load

    assert peftops._load.LIBRARY.resolve() == LIBRARY
