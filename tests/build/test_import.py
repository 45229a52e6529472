"""What `import peftops` costs, needs and says when it cannot work. Each import runs in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peftops import _C

from .conftest import ROOT, symbols, tool


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "PEFTOPS_CPU_LEVEL"} | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=300)


def output(code: str, **environment: str) -> str:
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_takes_less_than_300_ms_over_torch():
    code = "import time, torch; began = time.perf_counter(); import peftops; print(time.perf_counter() - began)"
    fastest = min(float(output(code)) for _ in range(5))
    assert fastest < 0.3


def test_needs_nothing_but_torch():
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        import peftops
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(*sorted(new - set(sys.stdlib_module_names)))
        """
    assert output(code) == "peftops"


def test_initialises_no_cuda():
    assert output("import torch, peftops; print(torch.cuda.is_initialized())") == "False"


def test_extension_module_is_not_needed():
    code = "import sys; sys.modules['peftops._C'] = None; import peftops; print(peftops.ops.lora_linear.__name__)"
    assert output(code) == "lora_linear"


def test_survives_fork():
    """A process that uses the operators and then forks, as data loaders do, leaves working operators in the child."""
    code = """if True:
        import os, torch, peftops
        seed = torch.tensor([1])
        peftops.ops.lora_dropout_mask(seed, 4, 4, 0.5)
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            peftops.ops.lora_dropout_mask(seed, 4, 4, 0.5)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    assert output(code) == "0"


def test_missing_library(tmp_path):
    package = ROOT / "python" / "peftops"
    shutil.copytree(package, tmp_path / "peftops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = python("import peftops", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    wanted = (
        "ImportError: peftops was installed without its native library (libpeftops.so); build it with `pip install .`"
    )
    assert last == wanted


# Every operator on CUDA, by its first sample; prints what each says and what `cuda_error` says.
ON_CUDA = """
import torch
from peftops._load import cuda_error
from peftops.ops.contract import CONTRACTS
print(cuda_error())
for contract in CONTRACTS.values():
    sample = next(iter(contract.sample_inputs(torch.device("cpu"), torch.float32, 0)))
    try:
        contract.op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *sample.args, **sample.kwargs)
    except Exception as error:
        print(contract.op._schema.name.removeprefix("peftops::"), f"{type(error).__name__}: {error}", sep="\\n")
"""


def package_with(folder: Path, cuda_library: Path | None) -> str:
    """A copy of the package with another CUDA library; what PYTHONPATH must be for it."""
    ignored = shutil.ignore_patterns("libpeftops_cuda.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "peftops", folder / "peftops", ignore=ignored)
    if cuda_library:
        shutil.copy(cuda_library, folder / "peftops" / "lib" / "libpeftops_cuda.so")
    return str(folder)


@pytest.fixture(scope="module")
def toy_libraries(tmp_path_factory) -> Path:
    """A folder with a CUDA runtime that does nothing, and two libraries that need it: one loads, one lacks a symbol.

    Its version is one that no machine has.
    """
    folder = tmp_path_factory.mktemp("toy")

    def compile(name: str, code: str, *options: str) -> None:
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", folder / name, "-L", folder, *options]
        subprocess.run(command, input=code, text=True, check=True)

    compile("libcudart.so.99", 'extern "C" int cudaGetLastError() { return 0; }', "-Wl,-soname,libcudart.so.99")
    use = 'extern "C" int cudaGetLastError(); int used = cudaGetLastError();'
    compile("loads.so", use, "-l:libcudart.so.99")
    shim = "aoti_torch_get_current_cuda_stream"
    compile(
        "lacks_a_symbol.so", f'{use} extern "C" void {shim}(); void* address = (void*){shim};', "-l:libcudart.so.99"
    )
    return folder


def assert_refused(printed: str, reason: str) -> None:
    """`cuda_error` gives the reason, and every operator raises one sentence that names it and the reason."""
    first, *lines = printed.splitlines()
    assert first == reason
    operators = dict(zip(lines[::2], lines[1::2], strict=True))
    wanted = {
        name.removeprefix("peftops::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("peftops::")
    }
    assert operators == {name: f"RuntimeError: {name}: no CUDA kernel, because {reason}" for name in wanted}


def test_torch_without_cuda():
    code = "import torch; torch.version.cuda = None\n" + ON_CUDA  # None on ROCm, too
    assert_refused(output(code), f"torch {torch.__version__} was built without CUDA")


def test_cuda_library_that_was_not_built(tmp_path):
    code = "import torch; torch.version.cuda = '13.0'\n" + ON_CUDA
    printed = output(code, PYTHONPATH=package_with(tmp_path, None))
    assert_refused(
        printed, "peftops was built without nvcc, so libpeftops_cuda.so is missing; build it where nvcc is in PATH"
    )


def test_torch_with_another_cuda(tmp_path, toy_libraries):
    code = "import torch; torch.__version__, torch.version.cuda = '2.10.0+cu128', '12.8'\n" + ON_CUDA
    printed = output(code, PYTHONPATH=package_with(tmp_path, toy_libraries / "loads.so"))
    assert_refused(printed, "torch 2.10.0+cu128 was built for CUDA 12.8, but libpeftops_cuda.so for CUDA 99")


@pytest.mark.parametrize(
    ("name", "runtime", "reason"),
    [
        ("loads.so", "", "libcudart.so.99: cannot open shared object file: No such file or directory"),
        ("lacks_a_symbol.so", "yes", "{}: undefined symbol: aoti_torch_get_current_cuda_stream"),
    ],
)
def test_cuda_library_that_does_not_load(tmp_path, toy_libraries, name, runtime, reason):
    code = "import torch; torch.version.cuda = '99.0'\n" + ON_CUDA
    path = package_with(tmp_path, toy_libraries / name)
    library = f"{path}/peftops/lib/libpeftops_cuda.so"
    printed = output(code, PYTHONPATH=path, LD_LIBRARY_PATH=str(toy_libraries) if runtime else "")
    assert_refused(printed, f"libpeftops_cuda.so does not load: {reason.format(library)}")


def test_cuda_library_that_loads(tmp_path, toy_libraries):
    """Then nothing stands at the CUDA key but what the library puts there: this one, nothing."""
    code = "import torch; torch.version.cuda = '99.4'\n" + ON_CUDA
    path = package_with(tmp_path, toy_libraries / "loads.so")
    first, *lines = output(code, PYTHONPATH=path, LD_LIBRARY_PATH=str(toy_libraries)).splitlines()
    assert first == "None" and lines
    assert not [line for line in lines if "no CUDA kernel" in line]


@pytest.mark.cuda_library
def test_loading_calls_nothing_of_cuda(tmp_path, cuda_library):
    """The built library beside a runtime whose every call ends the process, but for the registration of kernels.

    As in a CUDA build of torch, symbols of libtorch_cuda.so are seen only by who asks for that library by its name.
    """
    names = sorted({name for _, name in symbols(cuda_library, "-D", "--undefined-only") if re.match("_*cuda", name)})
    (runtime,) = re.findall(r"libcudart\.so\.\d+", tool("readelf", "-d", cuda_library))
    functions = [
        f'extern "C" void* {name}() {{ {"" if name.startswith("__cuda") else "abort();"} return &handle; }}'
        for name in names
    ]
    (tmp_path / "versions").write_text(f"{runtime} {{ *; }};")
    for name, code in (
        (runtime, "#include <stdlib.h>\nstatic void* handle;\n" + "\n".join(functions)),
        ("libtorch_cuda.so", 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'),
    ):
        options = [f"-Wl,-soname,{name}", *(["-Wl,--version-script=versions"] if name == runtime else [])]
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", name, *options]
        subprocess.run(command, input=code, text=True, check=True, cwd=tmp_path)
    code = f"""if True:
        import ctypes, os, torch
        ctypes.CDLL("{tmp_path / runtime}"), ctypes.CDLL("{tmp_path / "libtorch_cuda.so"}")
        torch.version.cuda = "{runtime.rpartition(".")[2]}.0"
        import peftops
        print(peftops._load.cuda_error(), torch.cuda.is_initialized())
        print(torch._C._dispatch_has_kernel_for_dispatch_key("peftops::lora_linear", "CUDA"), flush=True)
        os._exit(0) if os.fork() == 0 else print(os.waitstatus_to_exitcode(os.wait()[1]))
        """
    assert output(code).split() == ["None", "False", "True", "0"]


def test_refusals_leave_fake_tensors_alone():
    """A machine without GPU traces for one: fake kernels answer for fake CUDA tensors, export keeps the operator."""
    code = """if True:
        import torch, peftops
        from torch._subclasses import FakeTensorMode
        class Linear(torch.nn.Module):
            def forward(self, *tensors):
                return torch.ops.peftops.lora_linear(tensors[0], tensors[1], None, *tensors[2:])
        with FakeTensorMode(), torch.no_grad():
            tensors = tuple(torch.empty(*shape, device="cuda") for shape in ((3, 4), (5, 4), (2, 4), (5, 2)))
            print(Linear()(*tensors).device, torch.compile(Linear(), fullgraph=True, backend="eager")(*tensors).device)
            program = torch.export.export(Linear(), tensors)
            print(*(node.target for node in program.graph.nodes if node.op == "call_function"))
        """
    assert output(code).split() == ["cuda:0", "cuda:0", "peftops.lora_linear.default"]


def test_torch_too_old():
    done = python("import torch; torch.__version__ = '2.9.1+cpu'; import peftops")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("ImportError: peftops needs torch >= 2.10, but torch 2.9.1+cpu is installed")


@pytest.mark.parametrize("level", _C.cpu_levels)
def test_level_can_be_lowered(level):
    if _C.cpu_levels.index(level) > _C.cpu_levels.index(_C.best_cpu_level()):
        done = python("import peftops", PEFTOPS_CPU_LEVEL=level)
        wanted = f"ImportError: PEFTOPS_CPU_LEVEL is {level}, but this machine only runs {_C.best_cpu_level()}"
        assert done.stderr.strip().endswith(wanted)
    else:
        assert output("from peftops import _C; print(_C.cpu_level())", PEFTOPS_CPU_LEVEL=level) == level


def test_level_defaults_to_the_best():
    assert output("from peftops import _C; print(_C.cpu_level())") == _C.best_cpu_level()
    assert output("from peftops import _C; print(_C.cpu_level())", PEFTOPS_CPU_LEVEL="") == _C.best_cpu_level()


def test_unknown_level():
    done = python("import peftops", PEFTOPS_CPU_LEVEL="avx1024")
    assert done.returncode == 1
    wanted = "ImportError: PEFTOPS_CPU_LEVEL is avx1024, but must be baseline, avx2 or avx512"
    assert done.stderr.strip().endswith(wanted)
