"""The oracle kit: everything an operator promises in its :class:`~peftops.ops.contract.Contract`, checked.

    from peftops.testing import CHECKS, plan, run
    for contract, dtype, check in plan(CONTRACTS.values()):
        run(check, contract, torch.device("cpu"), dtype, seed=0)      # AssertionError names schema, check, sample and
        reason

A check is a function (contract, sample, seed); single ones are `check_values`, `check_gradients` and so on in
:mod:`~peftops.testing.values`, :mod:`~peftops.testing.gradients` and :mod:`~peftops.testing.dispatch`. The tolerance
law is in :mod:`~peftops.testing.tolerance`, laws that need no reference in :mod:`~peftops.testing.laws`. Depends on
torch alone.
"""

from peftops.testing.philox import dropout_mask, philox4x32
from peftops.testing.seeds import derive, generator
from peftops.testing.suite import CHECKS, Check, plan, run
from peftops.testing.tolerance import Oracle, assert_law, oracle, ulp
from peftops.testing.values import poisoned_allocations

__all__ = [
    "CHECKS",
    "Check",
    "Oracle",
    "assert_law",
    "derive",
    "dropout_mask",
    "generator",
    "oracle",
    "philox4x32",
    "plan",
    "poisoned_allocations",
    "run",
    "ulp",
]
