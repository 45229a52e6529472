"""The checks as data, and how one is run: the same for real contracts and for planted faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from peftops.ops.contract import Contract, Sample
from peftops.testing import dispatch, gradients, values
from peftops.testing.samples import Bound, bind, floating, tensors


def _any(contract: Contract) -> bool:
    return True


def _has_floats(contract: Contract) -> bool:
    samples = contract.sample_inputs(torch.device("cpu"), contract.dtypes[0], 0)
    return any(floating(bind(contract, sample)) for sample in samples)


def _has_gradient(contract: Contract) -> bool:
    return bool(contract.differentiable)


def _has_rows(contract: Contract) -> bool:
    return bool(contract.rows)


@dataclass(frozen=True)
class Check:
    """One promise, checked on samples of a contract.

    run: (contract, sample, seed), raises AssertionError. applies: whether a contract makes the promise at all. wants:
    which samples show something, by contract and bound arguments. limit: at most so many of them, spread over the list.
    dtypes: the dtypes it is run in, None for all of the contract's; where the contract has none of them, its first.
    """

    name: str
    run: Callable[[Contract, Sample, int], None]
    applies: Callable[[Contract], bool] = _any
    wants: Callable[[Contract, Bound], bool] = lambda contract, bound: True
    limit: int | None = None
    dtypes: tuple[torch.dtype, ...] | None = None


def _floats(contract: Contract, bound: Bound) -> bool:
    return bool(floating(bound))


def _filled(contract: Contract, bound: Bound) -> bool:
    return all(t.numel() for t in tensors(bound).values())


def _tiny(contract: Contract, bound: Bound) -> bool:
    return _filled(contract, bound) and sum(t.numel() for t in floating(bound).values()) <= gradients.GRADCHECK_ELEMENTS


def _small(contract: Contract, bound: Bound) -> bool:
    return sum(t.numel() for t in floating(bound).values()) <= 30_000


def _small_floats(contract: Contract, bound: Bound) -> bool:
    return _floats(contract, bound) and _small(contract, bound)


def _filled_floats(contract: Contract, bound: Bound) -> bool:
    return _floats(contract, bound) and _filled(contract, bound)


def _token_rows(contract: Contract, bound: Bound) -> bool:
    return all(bound[name].ndim >= 2 for name in contract.rows) and _filled(contract, bound)


_WIDE = (torch.float32,)

#: Every check that is run on samples, in the order of its cost.
CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("values", values.check_values),
        Check("exact", values.check_exact, applies=_has_floats, wants=_floats),
        Check("mutation", values.check_mutation),
        Check("poison", values.check_poison),
        Check("gradients", gradients.check_gradients, applies=_has_gradient),
        Check("views", values.check_views, wants=_small),
        Check("upstream", values.check_upstream, applies=_has_gradient, wants=_small),
        Check("special", values.check_special, applies=_has_floats, wants=_small_floats, limit=6),
        Check("determinism", values.check_determinism, limit=6),
        Check("fake", dispatch.check_fake),
        Check(
            "gradcheck", gradients.check_gradcheck, applies=_has_gradient, wants=_tiny, limit=6, dtypes=(torch.float64,)
        ),
        Check("double_backward", gradients.check_double_backward, applies=_has_gradient, wants=_filled, limit=1),
        Check(
            "autocast",
            dispatch.check_autocast,
            applies=_has_floats,
            wants=_filled_floats,
            limit=6,
            dtypes=_WIDE,
        ),
        Check("opcheck", dispatch.check_opcheck, dtypes=_WIDE),
        Check("compile", dispatch.check_compile, limit=4, dtypes=_WIDE),
        Check("dynamic", dispatch.check_dynamic, applies=_has_rows, wants=_token_rows, limit=1, dtypes=_WIDE),
        Check("export", dispatch.check_export, limit=2, dtypes=_WIDE),
        Check("inductor", dispatch.check_inductor, wants=_filled, limit=1, dtypes=_WIDE),
    )
}


_CPU = torch.device("cpu")


def plan(contracts: Iterable[Contract], device: torch.device = _CPU) -> Iterator[tuple[Contract, torch.dtype, Check]]:
    """Every (contract, dtype, check) that is to be run on `device`."""
    for contract in contracts:
        for check in CHECKS.values():
            if not check.applies(contract):
                continue
            if check.dtypes is None:
                dtypes = contract.dtypes
            else:
                dtypes = tuple(dtype for dtype in contract.dtypes if dtype in check.dtypes) or contract.dtypes[:1]
            for dtype in dtypes:
                if dtype in contract.dtypes_on(device):
                    yield contract, dtype, check


def chosen(check: Check, contract: Contract, device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """The samples that `check` looks at: those it wants, at most `limit`, spread evenly over the list."""
    samples = [s for s in contract.sample_inputs(device, dtype, seed) if check.wants(contract, bind(contract, s))]
    if check.limit is None or len(samples) <= check.limit:
        return samples
    return [samples[i * len(samples) // check.limit] for i in range(check.limit)]


def run(check: Check, contract: Contract, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Run `check` on its samples; AssertionError names schema, check, sample and what is wrong."""
    samples = chosen(check, contract, device, dtype, seed)
    assert samples, f"{contract.schema}, {check.name}, {dtype}: no sample is fit for this check"
    for sample in samples:
        try:
            check.run(contract, sample, seed)
        except Exception as error:
            text = f"{contract.schema}, {check.name}, {dtype}, sample '{sample.label}': {error}"
            raise AssertionError(text) from error
