"""CUDA without a GPU: builds the stand-ins and starts processes whose torch has CUDA devices.

Stand-ins: the CUDA runtime with an emulator for kernels (cudart.cpp, emulator.cpp, ptx.cpp), what a CUDA build of
torch has beyond a CPU build (torch_cuda.cpp), and, for the emulator, the CUDA sources of peftops compiled by the C++
compiler. They are built into build/device, each under the hash of what it is made from.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "cmake"))
import cuda_toolkit  # noqa: E402

HERE = ROOT / "tests" / "device"
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "device"
COMPILER = os.environ.get("CXX", "g++")

#: A call that takes longer hangs: kernels that wait for each other are recognised, loops without end are not.
TIMEOUT = 300.0


def missing() -> str | None:
    """What the stand-ins lack on this machine; None if they can be built."""
    if platform.machine() != "x86_64":
        return f"the kernel emulator is written for x86-64, and this machine is {platform.machine()}"
    if not cuda_toolkit.wanted():
        return "peftops has no CUDA library here: no nvcc was found, or PEFTOPS_CUDA is 0"
    return None


# ---- building --------------------------------------------------------------------------------------------------------


@functools.cache
def cuda_includes() -> tuple[str, ...]:
    """The include options that nvcc gives its host compiler, as system directories."""
    dry = subprocess.run(
        [cuda_toolkit.nvcc(), "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)$", dry.stderr, re.MULTILINE)
    found = re.findall(r'"-I([^"]+)"|"-isystem" "([^"]+)"', " ".join(lines))
    assert found, f"nvcc names no include directory: {dry.stderr}"
    return tuple(option for pair in found for option in ("-isystem", os.path.realpath(pair[0] or pair[1])))


def _torch() -> Path:
    return Path(find_spec("torch").origin).parent


def cutlass_include() -> Path:
    if (found := cuda_toolkit.cutlass()) is None:
        raise RuntimeError(f"the stand-ins need CUTLASS: pip install --no-deps {cuda_toolkit.CUTLASS}")
    return found / "include"


def hash_of(files: Iterable[Path], *texts: str) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for file in sorted(files):
        digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def make(target: Path, command: list[str]) -> Path:
    """Run `command -o target` unless the target is there; several processes may do so at once."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        done = subprocess.run([*command, "-o", str(made)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join([*command, '-o', str(made)])}\n{done.stdout}{done.stderr}")
        made.replace(target)
    return target


_LIBRARY = ("-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")


def runtime() -> Path:
    """The CUDA runtime: libcudart.so.13, under the name and the symbol versions that nvcc's objects ask for."""
    sources = [HERE / name for name in ("cudart.cpp", "emulator.cpp", "ptx.cpp")]
    script = HERE / "cudart.map"
    flags = [*_LIBRARY, *cuda_includes()]
    link = ["-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={script}", "-ldl"]
    key = hash_of([*sources, script, *HERE.glob("*.h"), *CSRC.glob("common/*.h")], COMPILER, *flags)
    return make(BUILD / f"runtime-{key}" / "libcudart.so.13", [COMPILER, *flags, *map(str, sources), *link])


def backend() -> Path:
    """What a CUDA build of torch has beyond a CPU build."""
    source, torch = HERE / "torch_cuda.cpp", _torch()
    flags = [*_LIBRARY, "-isystem", str(torch / "include")]
    link = ["-Wl,-soname,libtorch_cuda.so", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hash_of([source], COMPILER, *flags, *link, version("torch"))
    return make(BUILD / f"backend-{key}" / "libtorch_cuda.so", [COMPILER, *flags, str(source), *link])


#: Undefined operations that a GPU punishes, or that hide a wrong index: the emulator reports the trap.
_TRAPS = "alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow"


def emulated() -> Path:
    """peftops' CUDA library, compiled by the C++ compiler for the emulator."""
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), HERE / "prelude.h"]
    rooms = sorted({path.parent for path in CSRC.rglob("*.cu")})
    checks = re.compile(r"(?<!kernels)(?<!cpu)\.cpp$")
    files = [file for room in rooms for file in sorted(room.iterdir())]
    sources = [
        file for file in files if checks.search(file.name) or (file.suffix == ".cu" and "_sm90_" not in file.name)
    ]
    return emulated_library("libpeftops_emulated.so", [*sources, HERE / "not_emulated.cpp"], headers)


def emulated_library(name: str, sources: list[Path], headers: list[Path]) -> Path:
    flags = [
        *(
            "-std=c++17",
            "-O2",
            "-g1",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
            "-fno-strict-aliasing",
        ),
        *(f"-fsanitize={_TRAPS}", "-fsanitize-undefined-trap-on-error"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA", "-DNDEBUG"),
        *("-isystem", str(_torch() / "include"), "-isystem", str(cutlass_include()), *cuda_includes()),
    ]
    versions = [version("torch"), str(cutlass_include())]

    def compile_one(source: Path) -> Path:
        key = hash_of([source, *headers], COMPILER, *flags, *versions)
        command = [COMPILER, *flags, "-include", str(HERE / "prelude.h"), "-x", "c++", "-c", str(source)]
        return make(BUILD / f"object-{key}" / f"{source.parent.name}-{source.name}.o", command)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    link = ["-shared", f"-L{_torch() / 'lib'}", "-ltorch_cpu"]
    return make(BUILD / f"emulated-{hash_of(objects)}" / name, [COMPILER, *map(str, objects), *link])


def program(source: Path) -> Path:
    """A program of the host that uses headers of CUDA, CUTLASS and csrc."""
    flags = ["-std=c++17", "-O1", "-w", "-I", str(CSRC), "-isystem", str(cutlass_include()), *cuda_includes()]
    key = hash_of([source, *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")], COMPILER, *flags)
    return make(BUILD / f"program-{key}" / source.stem, [COMPILER, *flags, str(source)])


# ---- processes -------------------------------------------------------------------------------------------------------


class Failed(AssertionError):
    """A call raised an exception in its process; the text holds its traceback there."""


class Process:
    """A process with CUDA devices that runs functions by name, one after another.

    A call that ends the process (a kernel's access to nobody's memory in torch's own code, say) fails, and the next one
    starts another process.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None):
        self._command = [sys.executable, "-X", "faulthandler", "-m", "tests.device.emulate", *arguments]
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (environment or {})
        self._process: subprocess.Popen | None = None

    def call(self, function: str, **arguments: Any) -> Any:
        """The result of `module:name` with these arguments, all of them JSON. Raises Failed with its error."""
        process = self._process or self._start()
        process.stdin.write(json.dumps({"function": function, "arguments": arguments}).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], TIMEOUT)
        answer = process.stdout.readline() if ready else b""
        if answer:
            reply = json.loads(answer)
            if "error" in reply:
                raise Failed(reply["error"])
            return reply["result"]
        self._process = None
        if not ready:
            process.kill()
        code = process.wait()
        how = f"was still busy after {TIMEOUT:.0f} s" if not ready else _ending(code)
        process.stdin.close()
        process.stdout.close()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")[-6000:]
        self._errors.close()
        raise Failed(f"the process {how} in {function}({arguments}):\n{errors}")

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
            self._errors.close()

    def _start(self) -> subprocess.Popen:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self._process


def runs_in(process: str) -> Callable[[Callable], Callable]:
    """Decorator of a test: its body runs in the process that the fixture of this name gives.

    What the body gets, from fixtures and parameters, must be JSON.
    """

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def elsewhere(**arguments: Any) -> None:
            arguments.pop(process).call(f"{test.__module__}:{test.__name__}", **arguments)

        elsewhere.body = test
        signature = inspect.signature(test)
        fixture = inspect.Parameter(process, inspect.Parameter.KEYWORD_ONLY)
        elsewhere.__signature__ = signature.replace(parameters=[*signature.parameters.values(), fixture])
        return elsewhere

    return decorate


def _ending(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
