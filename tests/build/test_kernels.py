"""The machine code of each CUDA kernel: what it owes, what the record says; every gate names a planted fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peftops import _C

from . import kernels
from .conftest import ROOT, reason_to_leave_out
from .kernels import Kernel, Rule

sys.path.insert(0, str(ROOT / "cmake"))
import cuda_toolkit  # noqa: E402
import ptxas_gate  # noqa: E402

PLANTED = Path(__file__).parent / "planted_faults.cu"
SM_80 = "-gencode=arch=compute_80,code=[compute_80,sm_80]"
SM_90A = "-gencode=arch=compute_90a,code=sm_90a"


def gate(folder: Path, name: str, *options: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Compile the planted faults as the build compiles a source."""
    target = folder / f"{name}.o"
    switches = [option for option in options if option.startswith("--report")]
    nvcc = [cuda_toolkit.nvcc(), "-std=c++17", "-O3", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra"]
    rest = [option for option in options if option not in switches]
    command = [sys.executable, ROOT / "cmake" / "ptxas_gate.py", *switches, *nvcc, *rest, "-c", PLANTED, "-o", target]
    return target, subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> dict[str, Kernel]:
    """The planted kernels by name, built in spite of the gate."""
    target, done = gate(tmp_path_factory.mktemp("faulty"), "faulty", "--report-only", SM_80, "-DFAULTS")
    assert done.returncode == 0, done.stderr
    return {kernel.name.removeprefix("planted::"): kernel for kernel in kernels.kernels(target)}


# ---- the library -----------------------------------------------------------------------------------------------------


def test_cuda_is_built_where_nvcc_is_found():
    assert bool(_C.cuda_targets) == cuda_toolkit.wanted()


@pytest.mark.cuda_library
def test_every_kernel_keeps_the_laws(built):
    assert built
    assert not kernels.faults(built, kernels.RULES, kernels.TARGETS)


def test_what_cannot_run_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(_C, "cuda_targets", ["sm_80"])
    monkeypatch.setattr(kernels, "LIBRARY", PLANTED)
    monkeypatch.setattr(kernels, "read_record", lambda path: ("13.0.88", {}))
    for version, reason in (
        ("13.0.88", None),
        ("12.8.61", "kernels.txt is of nvcc 13.0.88, but the library of nvcc 12.8.61"),
    ):
        monkeypatch.setattr(kernels, "compiler", lambda library, version=version: version)
        assert reason_to_leave_out("same_nvcc") == reason
    assert reason_to_leave_out("cuda_library") is None
    monkeypatch.setattr(_C, "cuda_targets", [])
    assert reason_to_leave_out("cuda_library").startswith("libpeftops_cuda was not built")


@pytest.mark.cuda_library
@pytest.mark.same_nvcc
def test_every_kernel_is_as_recorded(built):
    """Neither worse nor silently better: `make kernels RECORD=1` writes what is now, for the review to see."""
    _, record = kernels.read_record(kernels.RECORD)
    assert not kernels.changes(built, record), f"if that is wanted: {kernels.COMMAND}"


@pytest.mark.cuda_library
def test_the_report_has_every_kernel(built, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "kernels", lambda library: built)
    kernels.main([str(kernels.LIBRARY)])
    lines = capsys.readouterr().out.splitlines()
    for kernel in built:
        assert any(line.startswith(kernel.name + " ") and f" {kernel.hash} " in line for line in lines), kernel.name


# ---- the record ------------------------------------------------------------------------------------------------------


@pytest.mark.cuda_library
def test_what_is_recorded_is_read_back(built, tmp_path):
    path = tmp_path / "kernels.txt"
    kernels.write_record(path, "13.0.88", built)
    version, record = kernels.read_record(path)
    assert version == "13.0.88"
    assert kernels.changes(built, record) == []


@pytest.mark.cuda_library
@pytest.mark.parametrize(
    ("column", "recorded", "said"),
    [
        ("registers", lambda now: now - 1, "worse"),
        ("registers", lambda now: now + 1, "better"),
        ("stack", lambda now: now + 8, "better"),
        ("shared", lambda now: now - 16, "worse"),
        ("mma", lambda now: now + 1, "worse"),
        ("mma", lambda now: now - 1, "better"),
        ("wide", lambda now: now + 1, "worse"),
    ],
)
def test_a_number_that_differs_from_the_record(built, column, recorded, said):
    kernel = built[0]
    value = str(recorded(int(kernel.recorded[column])))
    record = {(k.name, k.arch): k.recorded for k in built} | {
        (kernel.name, kernel.arch): kernel.recorded | {column: value}
    }
    line = f"{kernel.name} for {kernel.arch}: {column} {value} -> {kernel.recorded[column]}, {said}"
    assert kernels.changes(built, record) == [line]


@pytest.mark.cuda_library
def test_other_code_new_kernels_and_lost_kernels_differ_from_the_record(built):
    kernel, other = built[0], built[-1]
    record = {(k.name, k.arch): k.recorded for k in built[1:-1]}
    record[kernel.name, kernel.arch] = kernel.recorded | {"hash": "0" * 16}
    record["lora::lost", "sm_80"] = kernel.recorded
    found = kernels.changes(built, record)
    assert len(found) == 3
    assert any(line.startswith(f"{kernel.name} for {kernel.arch}: other machine code") for line in found)
    assert f"{other.name} for {other.arch} is not in the record" in found
    assert "lora::lost for sm_80 is in the record, but not in the library" in found


# ---- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda_library
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("spills", r"has \d+ accesses to local memory"),
        ("indexes_an_array", r"has \d+ accesses to local memory"),
        ("adds_in_any_order", r"has 1 atomic instructions, but no `atomic` in its name"),
        ("in_double", r"has \d+ instructions in double precision"),
        ("divides", r"calls subroutines"),
        ("without_bounds", r"states no __launch_bounds__"),
    ],
)
def test_a_planted_fault_is_named(faulty, name, fault):
    found = list(kernels.faults_of(faulty[name], None))
    assert len(found) == 1 and re.match(fault, found[0]), found


@pytest.mark.cuda_library
def test_kernels_without_faults_pass(faulty):
    names = ["clean", "clean_twin", "clean_other", "clean_wide", "clean_reduction", "atomic_by_name"]
    assert {name: list(kernels.faults_of(faulty[name], None)) for name in names} == {name: [] for name in names}


@pytest.mark.cuda_library
def test_rules_are_held(faulty):
    def said(name: str, **owed: bool) -> list[str]:
        return list(kernels.faults_of(faulty[name], Rule("", **({"tensor_cores": False, "wide": False} | owed))))

    assert said("clean_wide", wide=True) == []
    assert said("clean", wide=True) == ["has no 128-bit access to global memory"]
    assert said("clean", tensor_cores=True) == ["uses no tensor cores"]
    assert said("clean_product", tensor_cores=True) == []
    assert said("clean_product") == ["uses tensor cores, but must not"]
    assert said("clean_product", tensor_cores=True, loop="HMMA.16816") == []
    assert said("clean_product", tensor_cores=True, loop="HGMMA.64x256x16") == ["has no HGMMA.64x256x16 in its loop"]


@pytest.mark.cuda_library
def test_every_kernel_is_in_one_rule_and_every_rule_has_kernels(faulty):
    found, targets = [faulty["clean"]], {"sm_80", "compute_80"}
    plain = {"tensor_cores": False, "wide": False}
    one, two, none = Rule(r"planted::.*", **plain), Rule(r".*::clean", **plain), Rule(r"lora::.*", **plain)
    assert kernels.faults(found, (one,), targets) == []
    assert kernels.faults(found, (one, two), targets) == [
        "planted::clean matches 2 of the rules in kernels.py, but must match one"
    ]
    assert kernels.faults(found, (none,), targets) == [
        "planted::clean matches 0 of the rules in kernels.py, but must match one",
        "the rule for lora::.* matches no kernel",
    ]


@pytest.mark.cuda_library
def test_every_kernel_is_there_for_every_target(faulty):
    rule = Rule(r"planted::.*", tensor_cores=False, wide=False)
    assert kernels.faults([faulty["clean"]], (rule,), kernels.TARGETS) == [
        "planted::clean is there for compute_80, sm_80, but must be for compute_80, sm_80, sm_90a"
    ]
    own = Rule(r"planted::.*", tensor_cores=False, wide=False, targets=frozenset({"sm_90a"}))
    assert kernels.faults([faulty["clean"]], (own,), kernels.TARGETS) == [
        "planted::clean is there for compute_80, sm_80, but must be for sm_90a"
    ]


@pytest.mark.cuda_library
def test_the_hash_is_that_of_the_code_alone(faulty, tmp_path):
    """Not of the name, the place or the neighbours; but of every constant."""
    target, done = gate(tmp_path, "clean", SM_80)
    assert done.returncode == 0, done.stderr
    alone = {kernel.name.removeprefix("planted::"): kernel.hash for kernel in kernels.kernels(target)}
    assert set(alone) < set(faulty)
    assert {name: faulty[name].hash for name in alone} == alone
    assert alone["clean"] == alone["clean_twin"] != alone["clean_other"]


@pytest.mark.cuda_library
def test_two_kernels_of_one_name_are_refused(tmp_path):
    target, done = gate(tmp_path, "twice", SM_80, "-DTWICE")
    assert done.returncode == 0, done.stderr
    with pytest.raises(SystemExit, match="two kernels planted::clean for sm_80"):
        kernels.kernels(target)


# ---- the build -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda_library
def test_the_build_passes_what_is_clean(tmp_path):
    target, done = gate(tmp_path, "clean", SM_80)
    assert (done.returncode, done.stderr) == (0, "")
    assert target.exists()
    assert "Used" in target.with_suffix(".ptxas.txt").read_text()


@pytest.mark.cuda_library
def test_the_build_fails_on_spills_stack_frames_and_warnings(tmp_path):
    target, done = gate(tmp_path, "faulty", SM_80, "-DFAULTS")
    assert done.returncode == 1
    assert not target.exists(), "the next build would take it for built"
    assert re.search(r"^peftops::planted::spills for sm_80: [1-9]\d* bytes spilled, stack", done.stderr, re.MULTILINE)
    said = r"^peftops::planted::indexes_an_array for sm_80: 0 bytes spilled, stack frame of 128; allowed are 0 and 0$"
    assert re.search(said, done.stderr, re.MULTILINE)
    assert re.search(r'variable "unused" was declared but never referenced', done.stderr)
    assert "clean" not in done.stderr
    assert done.stderr.endswith("-DPEFTOPS_PTXAS_GATE=OFF builds it all the same\n")


@pytest.mark.cuda_library
def test_the_build_fails_where_wgmma_is_serialized(tmp_path):
    target, done = gate(tmp_path, "serialized", SM_90A, "-DSERIALIZED")
    assert done.returncode == 1 and not target.exists()
    assert re.search(r"wgmma.mma_async instructions are serialized .*planted::serialized", done.stderr)


def test_the_gate_knows_only_harmless_lines():
    harmless = """ptxas info    : 11 bytes gmem, 88 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN1a1kENS_4TaskE' for 'sm_90a'
ptxas info    : Function properties for _ZN1a1kENS_4TaskE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 416 bytes cmem[0]
ptxas info    : Compile time = 12.959 ms
"""
    assert ptxas_gate.findings(harmless) == []
    for line in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to it",
        "ptxas warning : Something that no compiler says yet",
        "nvcc warning : Support for it is going to end",
        "csrc/lora/cuda.cu:1:2: warning: conversion from 'int64_t' to 'int' may change value [-Wconversion]",
    ):
        assert ptxas_gate.findings(harmless + line) == [line]


def test_a_listed_stack_frame_passes_up_to_its_size(monkeypatch):
    monkeypatch.setitem(ptxas_gate.STACK_FRAMES, "a::k", 64)
    said = """ptxas info    : Compiling entry function '_ZN1a1kENS_4TaskE' for 'sm_80'
ptxas info    : Function properties for _ZN1a1kENS_4TaskE
    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads"""
    assert ptxas_gate.findings(said.format(64, 0)) == []
    line = "a::k for sm_80: {} bytes spilled, stack frame of {}; allowed are 0 and 64"
    assert ptxas_gate.findings(said.format(72, 0)) == [line.format(0, 72)]
    assert ptxas_gate.findings(said.format(64, 4)) == [line.format(4, 64)]


# ---- what is built with --------------------------------------------------------------------------------------------


def toolkit(code: str, tmp_path: Path, **environment: str) -> str:
    """What cmake/cuda_toolkit.py prints or dies of, in a process that sees nothing but `environment`."""
    variables = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT / "cmake")} | environment
    code = f"import cuda_toolkit; print({code})"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    return (done.stdout + done.stderr).strip()


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_where_nvcc_is_looked_for(tmp_path):
    assert toolkit("cuda_toolkit.nvcc()", tmp_path) == "None"
    on_path = program(tmp_path / "nvcc")
    assert toolkit("cuda_toolkit.nvcc()", tmp_path) == str(on_path)
    home = program(tmp_path / "home" / "bin" / "nvcc")
    assert toolkit("cuda_toolkit.nvcc()", tmp_path, CUDA_HOME=str(tmp_path / "home")) == str(home)
    named = program(tmp_path / "named")
    both = {"CUDACXX": str(named), "CUDA_HOME": str(tmp_path / "home")}
    assert toolkit("cuda_toolkit.nvcc()", tmp_path, **both) == str(named)


def test_peftops_cuda_decides(tmp_path):
    assert toolkit("cuda_toolkit.wanted()", tmp_path) == "False"
    missing = "peftops: PEFTOPS_CUDA is 1, but nvcc is neither CUDACXX, nor in CUDA_HOME, nor on PATH"
    assert toolkit("cuda_toolkit.wanted()", tmp_path, PEFTOPS_CUDA="1") == missing
    program(tmp_path / "nvcc")
    assert toolkit("cuda_toolkit.wanted()", tmp_path) == "True"
    assert toolkit("cuda_toolkit.wanted()", tmp_path, PEFTOPS_CUDA="1") == "True"
    assert toolkit("cuda_toolkit.wanted()", tmp_path, PEFTOPS_CUDA="0") == "False"
    wrong = "peftops: PEFTOPS_CUDA is 2, but must be 1, 0 or empty"
    assert toolkit("cuda_toolkit.wanted()", tmp_path, PEFTOPS_CUDA="2") == wrong


def test_versions_of_cutlass_agree():
    pins = re.findall(r"nvidia-cutlass==([\d.]+)", "\n".join(p.read_text() for p in pinning_files()))
    assert len(pins) == len(pinning_files()) and len(set(pins)) == 1, pins


def pinning_files() -> list[Path]:
    names = ("constraints.txt", "cmake/cuda_toolkit.py", "cmake/cuda.cmake", "third_party/README.md")
    return [ROOT / name for name in names]


@pytest.mark.cuda_library
@pytest.mark.parametrize("version", [None, (4, 1)])
def test_configuration_says_which_cutlass_it_needs(tmp_path, version):
    if version:
        header = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
        header.parent.mkdir(parents=True)
        header.write_text("#define CUTLASS_MAJOR {}\n#define CUTLASS_MINOR {}\n".format(*version))
    cache = dict(re.findall(r"^(\w+):\w+=(.*)$", (ROOT / "build/cmake/CMakeCache.txt").read_text(), re.MULTILINE))
    kept = ("PEFTOPS_TORCH_DIR", "Python_EXECUTABLE", "CMAKE_MAKE_PROGRAM", "CMAKE_CUDA_COMPILER")
    options = [f"-D{name}={cache[name]}" for name in kept]
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", *options, "-DPEFTOPS_CUDA=ON"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*map(str, command), f"-DCUTLASS_DIR={tmp_path / 'cutlass'}"], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    found = "4.1" if version else ""
    assert (
        f"CUTLASS_DIR is '{tmp_path / 'cutlass'}' (CUTLASS {found}), but must be the directory of CUTLASS >= 4.2"
        in said
    )
