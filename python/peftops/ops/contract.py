"""What an operator promises, as data: the tests of :mod:`peftops.testing` are generated from these records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of a schema, in its order."""

    args: tuple
    kwargs: dict = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class ErrorSample:
    """A call that must be refused with an error whose text matches `match` (regular expression)."""

    sample: Sample
    match: str
    error: type[Exception] = RuntimeError


@dataclass(frozen=True)
class Contract:
    """One schema's promise.

    schema: qualified name, with the overload behind a dot where there is one (`peftops::lora_linear.tensor_scale`).
    reference: same arguments as the schema, plain torch. With float64 arguments it is the oracle, in the sample's dtype
        it is what an honest user would write, whose error sets the bound.
    sample_inputs: (device, dtype, seed) -> samples; zero, ragged and strided ones among them.
    error_inputs: (device) -> calls that must be refused.
    dtypes: activation dtypes the schema takes on the CPU; :meth:`dtypes_on` says which on another device.
    differentiable: names of the arguments that get gradients; empty where the schema has none.
    mutates: names of the arguments written in place.
    autocast: names of the arguments that autocast casts to its dtype; empty where autocast changes nothing.
    rows: names of the arguments whose first dimension counts tokens, which may differ from call to call without a
        recompilation; empty where the schema has none.
    differentiable_results: positions of the results that carry a gradient, where `differentiable` is not empty.
    devices: types of the devices that the schema has kernels for.
    """

    schema: str
    reference: Callable
    sample_inputs: Callable[[torch.device, torch.dtype, int], Iterable[Sample]]
    error_inputs: Callable[[torch.device], Iterable[ErrorSample]]
    dtypes: tuple[torch.dtype, ...]
    differentiable: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    autocast: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    differentiable_results: tuple[int, ...] = (0,)
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def op(self) -> torch._ops.OpOverload:
        """The operator overload that the schema names."""
        namespace, name = self.schema.split("::")
        name, _, overload = name.partition(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")

    def dtypes_on(self, device: torch.device) -> tuple[torch.dtype, ...]:
        """The activation dtypes the schema takes on `device`, none where it has no kernels; float64 is for the CPU."""
        if device.type not in self.devices:
            return ()
        return tuple(dtype for dtype in self.dtypes if device.type == "cpu" or dtype != torch.float64)


CONTRACTS: dict[str, Contract] = {}


def register(contract: Contract) -> Contract:
    """Add `contract` to :data:`CONTRACTS`; a second one for the same schema is an error."""
    if contract.schema in CONTRACTS:
        raise ValueError(f"contract for {contract.schema} is registered twice")
    CONTRACTS[contract.schema] = contract
    return contract
