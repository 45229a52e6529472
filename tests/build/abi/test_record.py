"""The record that `make abi` left: the libraries work under the oldest PyTorch that is promised and a newer one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peftops.ops.contract import CONTRACTS
from peftops.testing import CHECKS

from tests.build.abi.run import imports
from tests.build.conftest import ROOT

RECORD = json.loads((Path(__file__).parent / "record.json").read_text())
AGAIN = "run `make abi` and commit the record"


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split("."))


def test_covers_the_oldest_and_a_newer_torch():
    (pinned,) = (
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    versions = sorted(release(environment["torch"]) for environment in RECORD["environments"])
    assert versions[0][:2] == (2, 10)
    assert versions[-1] >= release(pinned)


@pytest.mark.parametrize("environment", RECORD["environments"], ids=lambda environment: environment["torch"])
def test_every_check_passed(environment):
    assert set(environment["passed"]) == {*CHECKS, "errors"}, AGAIN
    assert all(environment["passed"].values())


def test_cuda_library_loads_in_every_torch_with_cuda():
    with_cuda = [environment for environment in RECORD["environments"] if environment["cuda"]]
    assert with_cuda and all("CUDA library loads" in environment for environment in with_cuda)
    assert [e["torch"] for e in with_cuda if e["no CUDA kernels, because"] is None], "import loads it in none"


def test_schemas_are_those_of_today():
    assert RECORD["schemas"] == sorted(str(contract.op._schema) for contract in CONTRACTS.values()), AGAIN


def test_libraries_need_no_more_than_was_loaded(library):
    assert set(imports(library)) <= set(RECORD["imports"][library.name]), AGAIN


@pytest.mark.cuda_library
def test_cuda_library_needs_no_more_than_was_loaded(cuda_library):
    assert set(imports(cuda_library)) <= set(RECORD["imports"][cuda_library.name]), AGAIN


def test_names_no_machine():
    assert "/" not in json.dumps(RECORD)
