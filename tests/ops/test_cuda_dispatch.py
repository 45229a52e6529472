"""What PyTorch does with CUDA tensors before a kernel runs: fake kernels, gradients, compile, export, autocast.

The cases (cuda_dispatch.py) run on fake tensors in one process of their own, because torch decides on import whether
there is CUDA.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ops import cuda_dispatch, cuda_faults

HERE = Path(__file__).parent
CASES = [name for name, *_ in cuda_dispatch.cases()]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str | None]:
    """What is wrong with each case; None where nothing is."""
    torch, library = Path(find_spec("torch").origin).parent, tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    options = ["-std=c++20", "-fPIC", "-shared", f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", HERE / "fake_cuda.cpp", *options, "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, HERE / "cuda_dispatch.py", library],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_contract(name, outcomes):
    assert outcomes[name] is None, outcomes[name]


@pytest.mark.parametrize("check", cuda_dispatch.CHECKS)
def test_correct_operator_passes(check, outcomes):
    assert outcomes[f"clean-{check}"] is None, outcomes[f"clean-{check}"]


@pytest.mark.parametrize(
    ("schema", "text"), [(contract.schema, text) for contract, _, text in cuda_faults.CAUGHT], ids=lambda v: v[:40]
)
def test_fault_is_caught(schema, text, outcomes):
    assert outcomes[schema] is not None, "not caught"
    assert re.search(text, outcomes[schema]), outcomes[schema]
