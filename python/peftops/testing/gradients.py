"""Checks of gradients against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peftops.ops.contract import Contract, Sample
from peftops.testing.samples import (
    Bound,
    asking,
    bind,
    call_grouped,
    carrying,
    clone_layout,
    fresh,
    map_tensors,
    tensors,
)
from peftops.testing.seeds import generator
from peftops.testing.tolerance import assert_law, oracle

#: (result, its number among those with a gradient) -> gradient
Upstream = Callable[[torch.Tensor, int], torch.Tensor]


def randn_upstream(seed: int) -> Upstream:
    """Random gradients, on a grid that every dtype has: the float64 oracle must see what the kernel sees."""

    def make(result: torch.Tensor, index: int = 0) -> torch.Tensor:
        values = torch.randn(result.shape, generator=generator(seed + index, "upstream"), dtype=torch.float64)
        return values.to(torch.bfloat16).to(torch.float16).to(result.device, result.dtype)

    return make


def integer_upstream(seed: int) -> Upstream:
    """Gradients in {-1, 0, 1}, mostly 0, for exact comparison."""

    def make(result: torch.Tensor, index: int = 0) -> torch.Tensor:
        source = generator(seed + index, "upstream")
        values = torch.randint(-1, 2, result.shape, generator=source) * (
            torch.rand(result.shape, generator=source) < 0.25
        )
        return values.to(result.device, result.dtype)

    return make


def sum_upstream(result: torch.Tensor, index: int = 0) -> torch.Tensor:
    """What `result.sum().backward()` hands over: a single 1 with stride 0 in every dimension."""
    return torch.ones((), dtype=result.dtype, device=result.device).expand(result.shape)


def gradients(
    function: Callable,
    contract: Contract,
    bound: Bound,
    names: Sequence[str],
    upstream: Upstream,
    share: bool = False,
) -> tuple[tuple, tuple]:
    """Results of `function`, and gradients of `names`; `upstream` makes each differentiable result's gradient.

    share: the leaves are views of the arguments' own memory instead of copies.
    """

    def leaf(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach() if share else clone_layout(tensor)
        return tensor.requires_grad_(name in names)

    leaves = map_tensors(leaf, bound)
    with torch.enable_grad():
        groups = call_grouped(function, contract, leaves)
    driven = [(i, result) for i, result in enumerate(carrying(contract, groups)) if result.requires_grad]
    given = [upstream(result, i) for i, result in driven]
    wanted = [tensors(leaves)[name] for name in names]
    driven = [result for _, result in driven]
    grads = torch.autograd.grad(driven, wanted, given, allow_unused=True) if driven else (None,) * len(wanted)
    return tuple(result.detach() for group in groups for result in group), tuple(grads)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Each name alone, all names, all but one."""
    chosen = [(name,) for name in names] + [tuple(names)]
    chosen += [tuple(n for n in names if n != left) for left in names]
    return list(dict.fromkeys(subset for subset in chosen if subset))


def check_gradients(contract: Contract, sample: Sample, seed: int) -> None:
    """Gradients obey the tolerance law against autograd through the reference in float64.

    Random upstream gradients with each subset of the inputs asking, and `sum`'s with all of them. Other layouts:
    `check_upstream`.
    """
    bound = bind(contract, sample)
    names, arguments = asking(contract, bound), tensors(bound)
    recording = map_tensors(lambda name, t: t.requires_grad_(name in names), fresh(bound))
    for index, group in enumerate(call_grouped(contract.op, contract, recording)):
        carries = index in contract.differentiable_results
        assert all(result.requires_grad == carries for result in group), (
            f"result {index} {'does not carry' if carries else 'carries'} a gradient"
        )
    for label, upstream, plans in (("randn", randn_upstream(seed), subsets(names)), ("sum", sum_upstream, [names])):
        whole = oracle(lambda b, up=upstream: gradients(contract.reference, contract, b, names, up)[1], bound, seed)
        for asked in plans:
            grads = gradients(contract.op, contract, bound, asked, upstream)[1]
            for index, (name, grad) in enumerate(zip(asked, grads, strict=True)):
                given = arguments[name]
                assert grad is None or (grad.dtype == given.dtype and grad.shape == given.shape), (
                    f"gradient of {name}: {grad.dtype} {tuple(grad.shape)}, argument {given.dtype} {tuple(given.shape)}"
                )
                what = f"gradient of {name} ({', '.join(asked)} asked, upstream: {label})"
                assert_law(grads[index : index + 1], whole.select([names.index(name)]), what)


#: gradcheck differentiates numerically, element by element.
GRADCHECK_ELEMENTS = 700


def check_gradcheck(contract: Contract, sample: Sample, seed: int) -> None:
    """torch.autograd.gradcheck in float64. Samples of more than GRADCHECK_ELEMENTS elements use its fast mode."""
    bound = map_tensors(lambda _, t: t.detach().clone(memory_format=torch.contiguous_format), bind(contract, sample))
    names = asking(contract, bound)
    leaves = [tensors(bound)[name].requires_grad_() for name in names]

    def function(*inputs: torch.Tensor) -> tuple:
        given = dict(zip(names, inputs, strict=True))
        changed = map_tensors(lambda name, t: given.get(name, t), bound)
        return tuple(carrying(contract, call_grouped(contract.op, contract, changed)))

    fast = sum(leaf.numel() for leaf in leaves) > GRADCHECK_ELEMENTS
    try:
        torch.autograd.gradcheck(function, leaves, fast_mode=fast)
    except torch.autograd.gradcheck.GradcheckError as error:
        raise AssertionError(f"gradcheck: {error}") from error


def check_double_backward(contract: Contract, sample: Sample, seed: int) -> None:
    """Differentiating a gradient is refused with a RuntimeError that names the operator."""
    bound = fresh(bind(contract, sample))
    leaves = [tensors(bound)[name].requires_grad_() for name in asking(contract, bound)]
    family = contract.op._schema.name.split("::")[1].removesuffix("_forward")
    try:
        result, *_ = carrying(contract, call_grouped(contract.op, contract, bound))
        grads = torch.autograd.grad(result.sum(), leaves, create_graph=True, allow_unused=True)
        torch.autograd.grad(sum(grad.double().sum() for grad in grads if grad is not None), leaves, allow_unused=True)
    except RuntimeError as error:
        assert family in str(error), f"double backward is refused without naming {family}: {error}"
        return
    raise AssertionError("double backward gave a result; the operator has no second derivative and must say so")
