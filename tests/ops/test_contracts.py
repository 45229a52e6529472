"""Generated from the contracts: every operator, dtype and check; and every schema has a contract."""

from __future__ import annotations

import os
from pathlib import Path

import peftops  # noqa: F401  (registers operators and contracts)
import pytest
import torch
from peftops.ops.contract import CONTRACTS
from peftops.testing import plan, run
from peftops.testing.dispatch import check_errors, check_samples, check_schema

CPU = torch.device("cpu")
PLAN = list(plan(CONTRACTS.values(), CPU))
FROZEN = Path(__file__).parent / "schemas.txt"

pytestmark = pytest.mark.usefixtures("one_thread")


def _short(value) -> str:
    return str(value).removeprefix("peftops::").removeprefix("torch.")


@pytest.mark.parametrize(
    ("contract", "dtype", "check"),
    PLAN,
    ids=[f"{_short(contract.schema)}-{_short(dtype)}-{check.name}" for contract, dtype, check in PLAN],
)
def test_contract(contract, dtype, check, seed):
    run(check, contract, CPU, dtype, seed)


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=lambda contract: _short(contract.schema))
def test_errors(contract):
    assert list(contract.error_inputs(CPU)), "no error samples"
    check_errors(contract, CPU)


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=lambda contract: _short(contract.schema))
def test_contract_agrees_with_the_schema(contract, seed):
    check_schema(contract)
    for dtype in contract.dtypes_on(CPU):
        check_samples(contract, CPU, dtype, seed)


def registered() -> dict[str, torch._C.FunctionSchema]:
    """Every schema of the library, by qualified name with overload."""
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("peftops::")]
    return {schema.name + (f".{schema.overload_name}" if schema.overload_name else ""): schema for schema in schemas}


def test_every_schema_has_a_contract():
    assert registered(), "no operator is registered"
    assert set(registered()) == set(CONTRACTS)


def test_schemas_stay_backward_compatible():
    frozen = [torch._C.parse_schema(line) for line in FROZEN.read_text().splitlines() if line]
    now = registered()
    for old in frozen:
        name = old.name + (f".{old.overload_name}" if old.overload_name else "")
        assert name in now, f"{name} is gone; schemas are removed only with a new major version"
        assert now[name].is_backward_compatible_with(old), f"{now[name]} breaks callers of {old}"
    missing = set(now) - {old.name + (f".{old.overload_name}" if old.overload_name else "") for old in frozen}
    assert not missing, f"add to {FROZEN.name}:\n" + "\n".join(str(now[name]) for name in sorted(missing))


@pytest.mark.skipif("PEFTOPS_CPU_LEVEL" not in os.environ, reason="no level was asked for")
def test_the_level_asked_for_is_in_use():
    from peftops import _C

    assert _C.cpu_level() == os.environ["PEFTOPS_CPU_LEVEL"]
