"""Calls whose results are known exactly and whose tensors may be overwritten where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from peftops.ops.contract import CONTRACTS, Contract, Sample
from peftops.testing.gradients import integer_upstream
from peftops.testing.samples import (
    Bound,
    asking,
    bind,
    call_grouped,
    carrying,
    floating,
    fresh,
    is_scale,
    map_tensors,
    tensors,
)
from peftops.testing.suite import CHECKS, chosen
from peftops.testing.values import exact_call, results_of


def short(contract: Contract, dtype: torch.dtype) -> str:
    return f"{contract.schema.partition('::')[2]}-{str(dtype).removeprefix('torch.')}"


class ExactCall:
    """A schema's call on small integers: forward and all gradients, equal in every order of summation.

    `bound` holds the arguments, `upstream` the gradients handed to backward, `expected` the results of `evaluate`.
    """

    def __init__(self, contract: Contract, sample: Sample, seed: int):
        self.contract = contract
        given = integer_upstream(seed)
        bound, self.expected = exact_call(contract, sample, seed, results_of(contract.reference, contract, given))
        self.bound = fresh(bound)  # integer arguments are still the sample's own
        with torch.no_grad():
            carriers = carrying(contract, call_grouped(contract.reference, contract, self.bound)) if self.names else []
        self.upstream = [given(result, index) for index, result in enumerate(carriers)]

    @property
    def names(self) -> tuple[str, ...]:
        return asking(self.contract, self.bound)

    def evaluate(self, function: Callable | None = None) -> tuple:
        """Results and gradients: nothing is copied from the host, so a CUDA graph can hold it."""
        leaves = map_tensors(lambda name, t: t.detach().requires_grad_(name in self.names), self.bound)
        with torch.enable_grad():
            groups = call_grouped(function or self.contract.op, self.contract, leaves)
        driven = [result for result in carrying(self.contract, groups) if result.requires_grad]
        wanted = [tensors(leaves)[name] for name in self.names]
        grads = torch.autograd.grad(driven, wanted, self.upstream, allow_unused=True) if driven else ()
        return tuple(result.detach() for group in groups for result in group) + tuple(grads)

    def overwrite(self, other: ExactCall) -> None:
        """Put the other call's values into this one's memory."""
        for mine, theirs in zip(self._memory(), other._memory(), strict=True):
            mine.untyped_storage().copy_(theirs.untyped_storage())
        self.expected = other.expected

    def spoil(self) -> None:
        """Fill this call's memory with NaN (integers: their maximum)."""
        for tensor in self._memory():
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            whole.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def copy(self) -> ExactCall:
        """The same call in memory of its own."""
        other = object.__new__(ExactCall)
        other.contract, other.bound, other.expected = self.contract, fresh(self.bound), self.expected
        other.upstream = [gradient.clone() for gradient in self.upstream]
        return other

    def _memory(self) -> list[torch.Tensor]:
        return [*tensors(self.bound).values(), *self.upstream]


def assert_expected(results: tuple, expected: tuple, what: str) -> None:
    """Every result equals what the reference says; a missing gradient stands for zeros."""
    for index, (got, wanted) in enumerate(zip(results, expected, strict=True)):
        if got is None or wanted is None:
            rest = wanted if got is None else got
            assert rest is None or not bool(rest.any()), f"{what}: result {index}: one is missing, the other not zero"
            continue
        wrong = (got != wanted).nonzero()
        assert len(wrong) == 0, (
            f"{what}: result {index}: {len(wrong)} of {got.numel()} elements differ, first at {wrong[0].tolist()}: "
            f"got {got[tuple(wrong[0])].item()}, wanted {wanted[tuple(wrong[0])].item()}"
        )


def variants(contract: Contract, sample: Sample, seed: int) -> Iterator[tuple[str, ExactCall]]:
    """The same call, then with everything changed that may change in place: values, dropout seed, scale 0, and back."""
    bound = bind(contract, sample)
    yield "first", ExactCall(contract, sample, seed)
    yield "other values", ExactCall(contract, sample, seed + 1)
    for name, tensor in tensors(bound).items():
        if name in ("seed", "seeds"):
            yield "another dropout seed", ExactCall(contract, _with(bound, name, tensor ^ 0x5DEECE66D, sample), seed)
        if is_scale(name, tensor) and tensor.is_floating_point():
            yield f"{name} 0", ExactCall(contract, _with(bound, name, torch.zeros_like(tensor), sample), seed)
    yield "back", ExactCall(contract, sample, seed)


def _with(bound: Bound, name: str, tensor: torch.Tensor, sample: Sample) -> Sample:
    return Sample((), {**bound, name: tensor}, sample.label)


def exact_samples(contract: Contract, device: torch.device, dtype: torch.dtype, limit: int | None) -> list[Sample]:
    """Samples with something in every tensor, at most `limit`, spread over the list."""

    check = dataclasses.replace(CHECKS["values"], wants=_filled, limit=limit)
    return chosen(check, contract, device, dtype, 0)


def _filled(contract: Contract, bound: Bound) -> bool:
    return all(tensor.numel() for tensor in tensors(bound).values()) or not floating(bound)


def every(device: torch.device) -> Iterator[tuple[Contract, torch.dtype]]:
    """Every schema with every dtype that it takes on the device."""
    for contract in CONTRACTS.values():
        for dtype in contract.dtypes_on(device):
            yield contract, dtype
