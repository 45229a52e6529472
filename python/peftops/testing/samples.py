"""Calls as data: bind a sample to a schema's argument names, run operator or reference on it, change its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from peftops.ops.contract import Contract, Sample
from peftops.testing.seeds import generator

Bound = dict[str, Any]


def bind(contract: Contract, sample: Sample) -> Bound:
    """The schema's argument names with the sample's values, defaults filled in."""
    arguments = contract.op._schema.arguments
    if len(sample.args) > len(arguments):
        raise TypeError(
            f"{contract.schema}: sample '{sample.label}' has {len(sample.args)} of {len(arguments)} arguments"
        )
    bound = {argument.name: value for argument, value in zip(arguments, sample.args, strict=False)}
    unknown = set(sample.kwargs) - {argument.name for argument in arguments}
    if unknown or set(sample.kwargs) & set(bound):
        raise TypeError(
            f"{contract.schema}: sample '{sample.label}' has unknown or repeated arguments {sorted(sample.kwargs)}"
        )
    bound.update(sample.kwargs)
    for argument in arguments:
        if argument.name not in bound:
            if not argument.has_default_value():
                raise TypeError(f"{contract.schema}: sample '{sample.label}' has no argument {argument.name}")
            bound[argument.name] = argument.default_value
    return {argument.name: bound[argument.name] for argument in arguments}


def call(function: Callable, contract: Contract, bound: Bound) -> tuple:
    """Call `function` (the operator or its reference) as the schema says; the results as a tuple, lists in a row.

    Arguments that the contract mutates are handed over as copies and appended to the results.
    """
    return tuple(result for results in call_grouped(function, contract, bound) for result in results)


def call_grouped(function: Callable, contract: Contract, bound: Bound) -> list[tuple]:
    """The results of `call`, those of each place in the schema together: one, or the elements of a list."""
    bound = {name: clone_layout(value) if name in contract.mutates else value for name, value in bound.items()}
    keyword = {argument.name for argument in contract.op._schema.arguments if argument.kwarg_only}
    result = function(
        *(value for name, value in bound.items() if name not in keyword),
        **{name: value for name, value in bound.items() if name in keyword},
    )
    returns = len(contract.op._schema.returns)
    results = [] if returns == 0 else [result] if returns == 1 else list(result)
    results += [bound[name] for name in contract.mutates]
    return [tuple(value) if isinstance(value, (tuple, list)) else (value,) for value in results]


def carrying(contract: Contract, groups: list[tuple]) -> list[torch.Tensor]:
    """The results of `call_grouped` that carry a gradient by the contract."""
    return [result for index in contract.differentiable_results for result in groups[index]]


def argument_of(name: str) -> str:
    """The schema's argument that a tensor belongs to: `weights` for `weights[1]`."""
    return name.partition("[")[0]


def asking(contract: Contract, bound: Bound) -> tuple[str, ...]:
    """The floating tensors that get gradients by the contract, in its order."""
    found = floating(bound)
    return tuple(name for argument in contract.differentiable for name in found if argument_of(name) == argument)


def tensors(bound: Bound) -> dict[str, torch.Tensor]:
    """The arguments that are tensors; those in a list under `name[index]`."""
    found = {}
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}[{i}]": item for i, item in enumerate(value) if isinstance(item, torch.Tensor)}
    return found


def map_tensors(function: Callable[[str, torch.Tensor], torch.Tensor], bound: Bound) -> Bound:
    """`bound` with every tensor replaced by function(name, tensor)."""

    def change(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return function(name, value)
        if isinstance(value, (list, tuple)):
            return type(value)(change(f"{name}[{i}]", item) for i, item in enumerate(value))
        return value

    return {name: change(name, value) for name, value in bound.items()}


def floating(bound: Bound) -> dict[str, torch.Tensor]:
    """The tensor arguments of a floating dtype."""
    return {name: value for name, value in tensors(bound).items() if value.is_floating_point()}


def cast(bound: Bound, dtype: torch.dtype) -> Bound:
    """Every floating tensor in `dtype`, detached."""
    return map_tensors(lambda _, t: t.detach().to(dtype) if t.is_floating_point() else t, bound)


def clone_layout(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, offset and surroundings in memory: the whole storage is copied."""
    storage = storage_bytes(tensor).untyped_storage()
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def fresh(bound: Bound) -> Bound:
    """All tensors copied with their layout, detached."""
    return map_tensors(lambda _, t: clone_layout(t), bound)


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all bytes of the tensor's storage, also those outside the view."""
    storage = tensor.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage).clone()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (NaN equals itself, -0 differs from +0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def redraw(bound: Bound, seed: int, index: int) -> Bound:
    """The same call with every floating element times a random factor in [0.75, 1): other roundings."""

    def jitter(name: str, t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        factor = (
            torch.rand(t.shape, generator=generator(seed, "redraw", index, name), dtype=torch.float64) * 0.25 + 0.75
        )
        return (t.detach().double() * factor.to(t.device)).to(t.dtype)

    return map_tensors(jitter, bound)


def is_probability(name: str) -> bool:
    """Whether a scalar argument is a dropout probability, by the house's naming."""
    return name == "p" or name.endswith("_p")


def is_scale(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor argument holds factors of whole results, by the house's naming: 0-d, or `scales`."""
    return tensor.ndim == 0 or name == "scales"


def integers(bound: Bound, seed: int, density: float, magnitude: int) -> Bound:
    """Floating tensors become integers in [-magnitude, magnitude], all but `density` of them zero, in the same layout.

    Scalars and scales become the nearest powers of two, dropout probabilities 0 or 0.5.
    """

    def sparse(name: str, t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        if is_scale(name, t):
            return written(t, torch.tensor([power_of_two(value) for value in t.flatten().tolist()]).view(t.shape))
        source = generator(seed, "integers", name)
        values = torch.randint(-magnitude, magnitude + 1, t.shape, generator=source)
        return written(t, values * (torch.rand(t.shape, generator=source) < density))

    def written(t: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        result = clone_layout(t)
        if all(stride > 0 for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
            return result.copy_(values.to(t.device, t.dtype))
        return values.to(t.device, t.dtype).as_strided(t.shape, t.stride(), 0) if t.numel() else result

    changed = map_tensors(sparse, bound)
    for name, value in changed.items():
        if isinstance(value, float):
            changed[name] = (0.5 if value > 0 else 0.0) if is_probability(name) else power_of_two(value)
    return changed


def power_of_two(value: float) -> float:
    """The nearest power of two of the same sign; 0 stays 0."""
    if value == 0:
        return 0.0
    exponent = torch.tensor(abs(value), dtype=torch.float64).log2().round().item()
    return (2.0**exponent) * (1 if value > 0 else -1)


def relayouts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values under other strides and offsets; memory that does not belong to the view is filled with NaN.

    Integer tensors get their dtype's maximum in place of NaN.
    """
    filler = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    if tensor.dtype == torch.bool:
        return

    def buffer(*shape: int) -> torch.Tensor:
        return torch.full(shape, filler, dtype=tensor.dtype, device=tensor.device)

    for offset in (1, 3, 8, 16):
        flat = buffer(tensor.numel() + 2 * offset)
        view = flat[offset : offset + tensor.numel()].view(tensor.shape)
        yield f"offset {offset}", view.copy_(tensor)
    if tensor.ndim >= 1:
        gaps = buffer(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)[..., 1::2]
        yield "gaps between elements", gaps.copy_(tensor)
    if tensor.ndim >= 2:
        padded = buffer(*tensor.shape[:-1], tensor.shape[-1] + 5)[..., 2 : 2 + tensor.shape[-1]]
        yield "gaps between rows", padded.copy_(tensor)
        swapped = buffer(*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]).transpose(-1, -2)
        yield "transposed", swapped.copy_(tensor)


def expansions(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Stride-0 tensors of the same shape, one per dimension: the values differ from the tensor's."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1:
            yield f"stride 0 in dimension {dim}", tensor.narrow(dim, 0, 1).clone().expand(tensor.shape)
