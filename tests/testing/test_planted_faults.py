"""The oracle kit bites: each planted fault is caught, and the correct twin passes every check."""

from __future__ import annotations

import pytest
import torch
from peftops.testing import CHECKS, plan, run
from peftops.testing.dispatch import check_errors, check_samples, check_schema
from peftops.testing.laws import assert_offsets

from tests.testing import faults, list_faults

CPU = torch.device("cpu")
CLEAN = (faults.CLEAN, list_faults.CLEAN)
CLEAN_PLAN = list(plan(CLEAN))

# (contract, check that catches it, what the check says)
CAUGHT = (
    (faults.IGNORED_STRIDE, "views", "with x: gaps between elements"),
    (faults.IGNORED_STRIDE, "values", "sample 'strided'"),
    (faults.IGNORED_UPSTREAM_STRIDE, "upstream", "with upstream gradient: gaps between elements"),
    (faults.MISSING_SCALE, "gradients", "gradient of lora_a"),
    (faults.MISSING_SCALE, "gradcheck", "gradcheck"),
    (faults.MISSING_SCALE, "exact", "result [34] on integers"),
    (faults.DROPPED_TAIL, "values", "sample 'ragged': output"),
    (faults.DROPPED_TAIL, "exact", "sample 'ragged': result 0 on integers"),
    (faults.NARROW_OFFSET, "values", "sample 'dropout': output"),
    (faults.WRONG_MASK_IN_BACKWARD, "gradients", "sample 'dropout': gradient of x"),
    (faults.WRONG_MASK_IN_BACKWARD, "exact", "sample 'dropout': result 1 on integers"),
    (faults.UNINITIALISED_COLUMN, "poison", "result 0 on integers.*got nan"),
    (faults.UNDECLARED_MUTATION, "mutation", "lora_b was changed by the call"),
    (faults.SWALLOWED_NAN, "special", "got 0.0, reference nan"),
    *list_faults.CAUGHT,
)


def _short(contract) -> str:
    return contract.schema.removeprefix("peftops_").replace("faults::", "")


@pytest.mark.parametrize(
    ("contract", "check", "text"),
    CAUGHT,
    ids=[f"{_short(contract)}-{check}" for contract, check, _ in CAUGHT],
)
def test_fault_is_caught(contract, check, text, seed):
    dtype = CHECKS[check].dtypes[0] if CHECKS[check].dtypes else torch.float32
    with pytest.raises(AssertionError, match=text):
        run(CHECKS[check], contract, CPU, dtype, seed)


def test_offset_in_32_bits_is_caught():
    with pytest.raises(AssertionError, match="offset of row 0, stride 0, column 4294967296 is 0, not 4294967296"):
        assert_offsets(faults.int32_offset)
    assert_offsets(lambda row, stride, column: row * stride + column)


def test_gradcheck_alone_misses_the_upstream_stride(seed):
    # why `check_upstream` exists: gradcheck only ever hands over contiguous gradients
    run(CHECKS["gradcheck"], faults.IGNORED_UPSTREAM_STRIDE, CPU, torch.float64, seed)


@pytest.mark.parametrize(
    ("contract", "dtype", "check"),
    CLEAN_PLAN,
    ids=[f"{_short(contract)}-{check.name}-{dtype}".replace("torch.", "") for contract, dtype, check in CLEAN_PLAN],
)
def test_clean_twin_passes(contract, dtype, check, seed):
    run(check, contract, CPU, dtype, seed)


@pytest.mark.parametrize("contract", CLEAN, ids=_short)
def test_clean_twin_keeps_the_rest_of_its_contract(contract, seed):
    check_schema(contract)
    check_errors(contract, CPU)
    for dtype in contract.dtypes:
        check_samples(contract, CPU, dtype, seed)
