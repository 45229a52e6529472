"""Rules of the house that a look at the source decides."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import peftops  # noqa: F401  (registers the schemas)
import pytest
import torch

from .conftest import ROOT

CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "peftops"
NATIVE = {".cpp", ".h", ".cu", ".cuh"}

# Function-local statics that hold no fact about a device, so that they need no device key.
DEVICE_FREE_STATICS = {
    ("common/cpu_level.cpp", "chosen"),  # the instruction-set level of the process
    ("lora/cpu_call.h", "kernels"),  # the kernels of that level
}

# What a part of the package may import from another one; a part that is not listed is free for all.
LAYERS = {
    "ops": {"ops"},
    "nn": {"ops", "nn"},
    "methods": {"ops", "nn", "methods"},
    "testing": {"ops", "testing"},
    "integrations": {"ops", "nn", "methods", "integrations"},
    "cli": {"ops", "nn", "methods", "integrations", "cli"},
}


def repository_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert listing.returncode == 0, f"git: {listing.stderr}"
    return [path for path in map(ROOT.joinpath, listing.stdout.splitlines()) if path.is_file()]


def native_files() -> dict[str, str]:
    """The C++ and CUDA sources by their path in csrc."""
    files = {str(path.relative_to(CSRC)): path.read_text() for path in CSRC.rglob("*") if path.suffix in NATIVE}
    assert files
    return files


def code(text: str) -> list[tuple[int, str]]:
    """Numbered lines of a C++ file without its comments."""
    return [(number, line.partition("//")[0]) for number, line in enumerate(text.splitlines(), 1)]


@dataclass(frozen=True)
class Rule:
    """What must not stand in a source file. bad: a line that breaks the rule. applies: to which paths in csrc."""

    pattern: str
    bad: str
    applies: Callable[[str], bool] = lambda path: True


def only_in(*allowed: str) -> Callable[[str], bool]:
    return lambda path: path not in allowed


DOOR = "common/launch.h"
RULES = {
    "no launch in triple chevrons": Rule(r"<<<", "kernel<<<grid, 128, 0, stream>>>(task);"),
    "launches go through one door": Rule(
        r"\bcu(da)?Launch|\bcudaGraphLaunch|\bcudaFuncSetAttribute",
        "cudaLaunchKernelExC(&config, function, arguments);",
        only_in(DOOR),
    ),
    "the door alone knows device and stream": Rule(
        r"DeviceGuard|\bcudaStream_t|get_current_cuda_stream|\bcudaDeviceGetAttribute",
        "cudaStream_t stream;",
        only_in(DOOR),
    ),
    "nobody changes the device by hand": Rule(r"\bcu(da)?(SetDevice|CtxSet|CtxPush)", "cudaSetDevice(1);"),
    "the id of a stream is not its handle": Rule(r"[.>]id\(\)", "launch(stream.id());"),  # flash-attention#1957
    "no allocation outside torch": Rule(r"\bcu(da)?(Malloc|Free|Mem\w*Alloc)", "cudaMallocAsync(&pointer, 8, stream);"),
    "no hidden copy": Rule(r"\bcu(da)?Mem(cpy|set)", "cudaMemcpyAsync(to, from, 8, cudaMemcpyDefault, stream);"),
    "no hidden synchronisation": Rule(r"\bcu(da)?\w*(Synchronize|WaitEvent)\b", "cudaStreamSynchronize(stream);"),
    "PTX stands in one header": Rule(r"\basm\b", 'asm volatile("bar.sync 0;");', only_in("common/ptx.cuh")),
    "threads are those of torch": Rule(
        r"std::(j?thread|async)\b|#pragma omp|\bomp_|\bpthread_", "std::thread worker([] {});"
    ),
    "one Philox for CPU and CUDA": Rule(
        r"(?i)0x(D2511F53|CD9E8D57|9E3779B9|BB67AE85)", "key += 0x9E3779B9u;", only_in("common/philox.h")
    ),
    "one conversion of 16-bit floats for CPU and CUDA": Rule(
        r"\b(float16|bfloat16) to_(float16|bfloat16)\(|\bfloat to_float\(",
        "bfloat16 to_bfloat16(float value) {",
        only_in("common/numeric.h"),
    ),
    "no unstable torch header": Rule(
        r'#include [<"](?!torch/csrc/(stable|inductor/aoti_torch)/|torch/headeronly/)(torch|ATen|c10|caffe2)/',
        "#include <ATen/ATen.h>",
    ),
}


def violations(rule: Rule, files: Mapping[str, str]) -> list[str]:
    return [
        f"csrc/{path}:{number}: {line.strip()}"
        for path, text in files.items()
        if rule.applies(path)
        for number, line in code(text)
        if re.search(rule.pattern, line)
    ]


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    assert not violations(RULES[name], native_files())


@pytest.mark.parametrize("name", RULES)
def test_rule_bites(name):
    rule = RULES[name]
    assert violations(rule, {"lora/cuda.cu": f"  {rule.bad}  // why"}) == [f"csrc/lora/cuda.cu:1: {rule.bad}"]
    assert not violations(rule, {"lora/cuda.cu": f"// {rule.bad}"})


def included(files: Mapping[str, str], path: str) -> set[str]:
    """What a file of csrc includes, also through other files of csrc, which are named by their paths in csrc."""
    found, open_ends = set(), [path]
    while open_ends:
        where = open_ends.pop()
        for _, line in code(files.get(where, "")):
            if match := re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line):
                name = match.group(2)
                if match.group(1) == '"':
                    name = str((CSRC / where).parent.joinpath(name).resolve().relative_to(CSRC))
                if name not in found:
                    found.add(name)
                    open_ends.append(name)
    return found


def headers_with_torch(files: Mapping[str, str]) -> dict[str, list[str]]:
    """Device headers (*.cuh) that include torch, by themselves or through another header: path -> torch's headers."""
    every = {
        path: sorted(name for name in included(files, path) if re.match("torch/|ATen/|c10/", name))
        for path in files
        if path.endswith(".cuh")
    }
    return {path: headers for path, headers in every.items() if headers}


@pytest.mark.parametrize("source", ["lora/cpu_kernels.cpp", "lora/sm80.cuh"])
def test_cpu_and_cuda_kernels_share_their_arithmetic(source):
    """So a test of it on the CPU is one of the device's, and no second copy may stand anywhere (the rules above)."""
    shared = {"common/index.h", "common/numeric.h", "common/philox.h"}
    assert shared <= included(native_files(), source)


def test_device_headers_know_no_torch():
    assert not headers_with_torch(native_files())


def test_device_header_with_torch_is_found():
    torch_header = "#include <torch/csrc/stable/tensor.h>"
    assert headers_with_torch({"lora/sm80.cuh": torch_header}) == {"lora/sm80.cuh": ["torch/csrc/stable/tensor.h"]}
    files = {
        "lora/sm80.cuh": '#include "../common/check.h"',
        "common/check.h": torch_header,
        "lora/cuda.cu": torch_header,
    }
    assert headers_with_torch(files) == {"lora/sm80.cuh": ["torch/csrc/stable/tensor.h"]}


def local_statics(files: Mapping[str, str]) -> set[tuple[str, str]]:
    """(file, name) of each function-local static that is no constant."""
    return {
        (path, name)
        for path, text in files.items()
        for _, line in code(text)
        for name in re.findall(r"^\s+static (?!constexpr)[^()]*?(\w+)\s*(?:=|;|\{)", line)
    }


def test_function_local_statics_hold_no_fact_about_a_device():
    assert local_statics(native_files()) == DEVICE_FREE_STATICS


def test_function_local_static_is_found():
    """As in bitsandbytes#1952: the shared-memory opt-in of the first device was taken for that of all."""
    for line in ("  static bool configured = false;", "  static int sm{};", "  static Device device;"):
        assert local_statics({"lora/cuda.cu": line})
    for line in (
        "  static constexpr int kTile = 64;",
        "static int helper() { return 1; }",
        "  // static bool configured;",
    ):
        assert not local_statics({"lora/cuda.cu": line})


def test_schemas_take_no_string():
    """A `str` argument leaks one string per call in the stable ABI (pytorch#191340)."""
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("peftops::")]
    assert schemas
    for schema in schemas:
        bad = [argument.name for argument in schema.arguments if "str" in str(argument.type)]
        assert not bad, f"{schema.name}: {bad}"


def test_every_schema_stands_in_ops_cpp():
    listed = set(re.findall(r'^\s*(?:m\.def\()?"(\w+(?:\.\w+)?)\(', (CSRC / "ops.cpp").read_text(), re.MULTILINE))
    registered = {
        name.removeprefix("peftops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("peftops::")
    }
    assert listed == registered


def missing_in_room(room: str, files: set[str]) -> list[str]:
    """What a room lacks, of the repository's files; device code where there are CUDA kernels, too."""
    wanted = [
        f"csrc/{room}/README.md",
        f"csrc/{room}/{room}.cpp",
        f"csrc/{room}/plan.h",
        f"csrc/{room}/cpu.cpp",
        f"python/peftops/ops/{room}.py",
        f"tests/ops/test_{room}.py",
        f"bench/{room}.py",
    ]
    if f"csrc/{room}/cuda.cu" in files:
        wanted.append(f"csrc/{room}/sm80.cuh")
    return [path for path in wanted if path not in files]


@pytest.mark.parametrize(
    "room", sorted(path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "common")
)
def test_a_room_has_the_same_names_everywhere(room):
    assert not missing_in_room(room, {str(path.relative_to(ROOT)) for path in repository_files()})


def test_missing_device_code_is_found():
    files = {str(path.relative_to(ROOT)) for path in repository_files()}
    assert missing_in_room("lora", files - {"csrc/lora/sm80.cuh"}) == ["csrc/lora/sm80.cuh"]
    assert not missing_in_room("lora", files - {"csrc/lora/sm80.cuh", "csrc/lora/cuda.cu"})


def imported(path: Path) -> set[str]:
    """The parts of peftops that a module imports, at its top or lazily."""
    package = ("peftops", *path.relative_to(PACKAGE).parts[:-1])
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names += [[*base, alias.name] for alias in node.names]
    return {name[1] for name in names if len(name) > 1 and name[0] == "peftops"} & set(LAYERS)


@pytest.mark.parametrize("part", LAYERS)
def test_layers(part):
    for path in (PACKAGE / part).rglob("*.py"):
        assert imported(path) <= LAYERS[part], f"{path.relative_to(ROOT)} imports {imported(path) - LAYERS[part]}"


def test_files_are_short():
    for path in repository_files():
        if path.suffix in NATIVE | {".py"}:
            limit = 900 if path.suffix in {".cu", ".cuh"} else 600
            lines = path.read_text().count("\n")
            assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines; at most {limit}: split it"


def test_repository_is_tidy():
    for path in repository_files():
        name, content = path.relative_to(ROOT), path.read_bytes()
        assert len(content) <= 1_000_000, f"{name}: {len(content)} bytes in the repository"
        if path.suffix == ".png":
            continue
        text = content.decode()
        assert "\r" not in text, f"{name}: carriage return"
        assert not text or text.endswith("\n"), f"{name}: no newline at the end"
        bad = [number for number, line in enumerate(text.splitlines(), 1) if line != line.rstrip()]
        assert not bad, f"{name}: blanks at the end of lines {bad}"
