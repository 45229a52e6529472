"""libpeftops_cuda loads into every CUDA build of PyTorch from 2.10 on: what it imports, exports and needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peftops import _C

from . import kernels
from .conftest import ROOT, symbols, tool
from .test_configuration import definitions, of_target
from .test_symbols import SHIMS, imports, needed

pytestmark = pytest.mark.cuda_library

CUDA_SHIMS = Path(__file__).parent / "shims-2.10-cuda.txt"
# Measured: 4.23 MB. A quarter more, so that what grows it is noticed.
MAX_BYTES = 5_290_000

# Registration, launches, queries, the driver's maker of tensor maps: no memory, no stream, no synchronisation.
RUNTIME = {
    "__cudaGetKernel",
    "__cudaLaunchKernel",
    "__cudaPopCallConfiguration",
    "__cudaRegisterFatBinary",
    "__cudaRegisterFatBinaryEnd",
    "__cudaRegisterFunction",
    "__cudaRegisterVar",
    "__cudaUnregisterFatBinary",
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDriverEntryPointByVersion",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaLaunchKernelExC",
}


def shims(path: Path) -> set[str]:
    return {line for line in path.read_text().splitlines() if line and not line.startswith("#")}


def test_imports_device_guard_and_stream(cuda_library):
    """A launch without them would run on another device or another stream than the tensor's."""
    wanted = {
        "aoti_torch_create_device_guard",
        "aoti_torch_delete_device_guard",
        "aoti_torch_get_current_cuda_stream",
    }
    assert not wanted - set(imports(cuda_library))


def test_imported_shims_exist_in_torch_2_10(cuda_library):
    used = {name for name in imports(cuda_library) if name.startswith(("aoti_torch_", "torch_"))}
    missing = used - shims(SHIMS) - shims(CUDA_SHIMS)
    assert not missing, f"imports shims that torch 2.10 lacks: {sorted(missing)}"
    # The others copy, synchronise or change streams.
    assert used & shims(CUDA_SHIMS) == {"aoti_torch_get_current_cuda_stream"}


def test_imports_of_the_cuda_runtime_are_known(cuda_library):
    used = {name for name in imports(cuda_library) if re.match(r"_*cuda|_*cu[A-Z]", name)}
    assert used == RUNTIME


def test_imports_no_cxx_symbol_of_torch_and_none_of_python(cuda_library):
    bad = [name for name in imports(cuda_library) if re.match(r"_Z.*(3c10|2at|5torch|5caffe)|_?Py", name)]
    assert not bad, f"imports symbols that change from version to version: {bad}"


def test_exports_nothing(cuda_library):
    assert symbols(cuda_library, "-D", "--defined-only") == []


def test_needs_torch_the_cuda_runtime_and_the_compiler_runtime_only(cuda_library):
    libraries = set(needed(cuda_library))
    (runtime,) = (name for name in libraries if re.fullmatch(r"libcudart\.so\.\d+", name))
    torch = {"libtorch_cpu.so", "libtorch_cuda.so"}  # what it does not ask for by name, it does not see
    assert torch <= libraries
    assert libraries <= {runtime, *torch, "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6"}


def test_no_path_of_the_build_machine(cuda_library):
    assert not re.findall(r"\((?:RPATH|RUNPATH)\)", tool("readelf", "-d", cuda_library))
    assert str(ROOT).encode() not in cuda_library.read_bytes(), f"contains {ROOT}"


def test_size(cuda_library):
    assert cuda_library.stat().st_size <= MAX_BYTES


def test_stripped(cuda_library):
    assert not tool("nm", cuda_library), "the installed library still has its symbol table"


def test_compiler_calls(commands):
    """The same ABI and optimisation for g++ and nvcc; machine code and PTX for the promised targets."""
    calls = of_target(commands, "peftops_cuda")
    assert {call["file"] for call in calls if call["file"].suffix == ".cu"} == set((ROOT / "csrc").rglob("*.cu"))
    for call in calls:
        defined = definitions(call)
        assert defined["TORCH_TARGET_VERSION"] == "0x020a000000000000"
        assert {"TORCH_STABLE_ONLY", "USE_CUDA", "NDEBUG"} <= set(defined)
        assert {"-O3", "-Wall", "-Wextra", "-Wconversion"} <= set(call["command"].split())
        if call["file"].suffix == ".cu":
            assert "-std=c++17" in call["command"].split()
            assert "use_fast_math" not in call["command"]
            targets = set(re.findall(r"\w+_\d+a?", " ".join(re.findall(r"code=\[([^\]]+)\]", call["command"]))))
            wanted = {"sm_90a"} if "_sm90_" in call["file"].name else kernels.TARGETS
            assert targets == wanted and set(_C.cuda_targets) == kernels.TARGETS


def test_what_nvcc_said_is_kept(commands):
    for call in of_target(commands, "peftops_cuda"):
        if call["file"].suffix == ".cu":
            log = call["output"].with_suffix(".ptxas.txt")
            assert log.is_file(), f"{log}: nvcc was not run through cmake/ptxas_gate.py"
