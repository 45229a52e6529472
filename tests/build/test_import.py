"""What `import peftops` costs, needs and says when it cannot work. Each import runs in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from peftops import _C

from .conftest import ROOT


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
