"""Checks of what an operator computes and what it leaves alone. Each raises AssertionError with the reason.

Every check takes (contract, sample, seed); gradients are covered in the same breath where the contract promises them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from peftops.ops.contract import Contract, Sample
from peftops.testing.gradients import Upstream, gradients, integer_upstream, randn_upstream
from peftops.testing.samples import (
    Bound,
    argument_of,
    asking,
    bind,
    call,
    call_grouped,
    carrying,
    expansions,
    floating,
    fresh,
    integers,
    is_scale,
    map_tensors,
    relayouts,
    same_bits,
    storage_bytes,
    tensors,
)
from peftops.testing.seeds import generator
from peftops.testing.tolerance import Oracle, assert_law, assert_masks, oracle

#: torch's intra-op thread counts under which an operator must give the same bits.
THREADS = (1, 2, 7)


def forward_of(function: Callable, contract: Contract) -> Callable[[Bound], tuple]:
    """bound arguments -> results of `function`, without gradients."""

    def evaluate(bound: Bound) -> tuple:
        with torch.no_grad():
            return call(function, contract, bound)

    return evaluate


def results_of(function: Callable, contract: Contract, upstream: Upstream) -> Callable[[Bound], tuple]:
    """bound arguments -> results of `function` (while autograd records) followed by all gradients."""

    def evaluate(bound: Bound) -> tuple:
        names = asking(contract, bound)
        if not names:
            return forward_of(function, contract)(bound)
        results, grads = gradients(function, contract, bound, names, upstream)
        return results + grads

    return evaluate


def check_values(contract: Contract, sample: Sample, seed: int) -> None:
    """Forward obeys the tolerance law, without gradients and, where they exist, while autograd records."""
    bound = bind(contract, sample)
    expected = oracle(forward_of(contract.reference, contract), bound, seed)
    assert_law(forward_of(contract.op, contract)(fresh(bound)), expected, "output")
    if contract.differentiable:
        recording = map_tensors(
            lambda name, t: t.requires_grad_(argument_of(name) in contract.differentiable), fresh(bound)
        )
        assert_law(call(contract.op, contract, recording), expected, "output while autograd records")


def exact_call(
    contract: Contract, sample: Sample, seed: int, evaluate: Callable[[Bound], tuple]
) -> tuple[Bound, tuple]:
    """The call on small integers whose results float64 and the plain composition find alike, exactly.

    The share of non-zeros starts at a quarter and falls until no sum rounds. Returns the call and the results in the
    dtype.
    """
    bound = bind(contract, sample)
    for density, magnitude in ((0.25, 2), (0.25, 1), (0.125, 1), (0.05, 1), (0.02, 1), (0.005, 1)):
        candidate = integers(bound, seed, density, magnitude)
        low = _exact(evaluate, candidate)
        if low is not None:
            return candidate, low
    raise AssertionError("the plain composition rounds even on sparse integers")


def _exact(evaluate: Callable[[Bound], tuple], bound: Bound) -> tuple | None:
    """The results in the call's dtypes if float64 gives the same numbers, else None."""
    low, ref64 = evaluate(bound), evaluate(_double(bound))
    same = all(
        a is None or not a.is_floating_point() or torch.equal(a.double(), b) for a, b in zip(low, ref64, strict=True)
    )
    return low if same else None


def _double(bound: Bound) -> Bound:
    return map_tensors(lambda _, t: t.double() if t.is_floating_point() else t, bound)


def check_exact(contract: Contract, sample: Sample, seed: int) -> None:
    """On small integers, three quarters of them zero, results and gradients equal the reference's."""
    bound, expected = exact_call(
        contract, sample, seed, results_of(contract.reference, contract, integer_upstream(seed))
    )
    _assert_equal(results_of(contract.op, contract, integer_upstream(seed))(fresh(bound)), expected, "on integers")
    plain = forward_of(contract.op, contract)(fresh(bound))
    _assert_equal(plain, expected[: len(plain)], "on integers, without gradients")


def _assert_equal(out: tuple, expected: tuple, what: str) -> None:
    for index, (a, b) in enumerate(zip(out, expected, strict=True)):
        if a is None or b is None:
            rest = b if a is None else a
            assert rest is None or not bool(rest.any()), f"result {index} {what}: one is missing, the other is not zero"
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"result {index} {what}: {a.dtype} {tuple(a.shape)}, reference {b.dtype} {tuple(b.shape)}"
        )
        wrong = (a != b).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            raise AssertionError(
                f"result {index} {what}: {len(wrong)} of {a.numel()} elements differ, first at {list(at)}: "
                f"got {a[at].item()}, reference {b[at].item()}"
            )


def check_views(contract: Contract, sample: Sample, seed: int) -> None:
    """Strides and offsets of an argument do not change the result: equal on small integers.

    Memory between the elements is NaN, so a kernel that reads there shows it. On integers every order of summation is
    exact, so equality is demanded; on other values only the tolerance law, since a vendor GEMM may sum another layout
    in another order.
    """
    results = results_of(contract.op, contract, integer_upstream(seed))
    plain = forward_of(contract.op, contract)
    reference = results_of(contract.reference, contract, integer_upstream(seed))
    bound, expected = exact_call(contract, sample, seed, reference)
    for name, tensor in tensors(bound).items():
        for label, view in relayouts(tensor):
            changed = _replace(bound, name, view)
            _assert_equal(results(changed), expected, f"with {name}: {label}")
            out = plain(changed)
            _assert_equal(out, expected[: len(out)], f"with {name}: {label}, without gradients")
        for label, view in expansions(tensor):
            wanted = _exact(reference, _replace(bound, name, view.contiguous()))
            if wanted is not None:
                _assert_equal(results(_replace(bound, name, view)), wanted, f"with {name}: {label}")


def check_upstream(contract: Contract, sample: Sample, seed: int) -> None:
    """Strides and offsets of the upstream gradient do not change a gradient: equal on small integers, for every layout.

    `sum` hands over stride 0, `cat` a slice of a larger tensor, a matrix product a transposed one; gradcheck sees none
    of them.
    """
    base = integer_upstream(seed)
    bound, expected = exact_call(contract, sample, seed, results_of(contract.reference, contract, base))
    with torch.no_grad():
        some, *_ = carrying(contract, call_grouped(contract.op, contract, fresh(bound)))
    for label, _ in relayouts(some):
        moved = lambda result, index, label=label: dict(relayouts(base(result, index)))[label]  # noqa: E731
        _assert_equal(results_of(contract.op, contract, moved)(bound), expected, f"with upstream gradient: {label}")
    for label, _ in expansions(some):
        expanded = lambda result, index, label=label: _expanded(base(result, index), label)  # noqa: E731
        dense = lambda *given, expanded=expanded: expanded(*given).contiguous()  # noqa: E731
        wanted = _exact(results_of(contract.reference, contract, dense), bound)
        if wanted is not None:
            got = results_of(contract.op, contract, expanded)(bound)
            _assert_equal(got, wanted, f"with upstream gradient: {label}")


def _expanded(tensor: torch.Tensor, label: str) -> torch.Tensor:
    """The expansion of that name; the tensor itself where it has only one element in that dimension."""
    return dict(expansions(tensor)).get(label, tensor)


def _replace(bound: Bound, name: str, tensor: torch.Tensor) -> Bound:
    return map_tensors(lambda other, t: tensor if other == name else t, bound)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every tensor that torch allocates without a value is full of NaN (integers: the maximum)."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def check_poison(contract: Contract, sample: Sample, seed: int) -> None:
    """Exact results and gradients while every fresh allocation is NaN: nothing is left unwritten."""
    with poisoned_allocations():
        check_exact(contract, sample, seed)


def special_values(dtype: torch.dtype) -> dict[str, float]:
    """The values of a floating dtype at which kernels go wrong."""
    info = torch.finfo(dtype)
    return {
        "+0": 0.0,
        "-0": -0.0,
        "subnormal": info.smallest_normal / 4,
        "max": info.max,
        "-max": info.min,
        "inf": math.inf,
        "-inf": -math.inf,
        "nan": math.nan,
    }


def check_special(contract: Contract, sample: Sample, seed: int) -> None:
    """One special value at a time in each floating argument.

    NaN and inf appear where the reference has them, the rest obeys the law. A scale may be folded into a sum: an
    infinite one may give inf or NaN, and +-max leaves the sum room: it is 2^16 times smaller.
    +-max is different: a sum of huge finite numbers overflows in one order and not in another, with either sign or as
    NaN. For it only finite or not is compared, and only where there is room: the reference must say the same with the
    value 2^8 times smaller and, in float64, 2^16 times larger: an intermediate may be that much larger.
    """
    bound = bind(contract, sample)
    reference = forward_of(contract.reference, contract)
    forward = forward_of(contract.op, contract)
    plain = oracle(reference, bound, seed)
    honest = [(plain.ref64, plain.low), *plain.redraws]
    for name, tensor in floating(bound).items():
        if tensor.numel() == 0:
            continue
        place = int(torch.randint(tensor.numel(), (), generator=generator(seed, "special", name)))
        for label, value in special_values(tensor.dtype).items():
            value = value / 2**16 if is_scale(name, tensor) and "max" in label else value
            changed = _replace(bound, name, _put(tensor, place, value))
            what = f"output with {name}[{place}] = {label}"
            if is_scale(name, tensor) and not math.isfinite(value):
                _assert_finite(forward(fresh(changed)), [reference(changed), reference(_double(changed))], what)
            elif "max" not in label:
                expected = oracle(reference, changed, seed, redraws=0)
                assert_law(forward(fresh(changed)), Oracle(expected.ref64, expected.low, honest), what)
            else:
                smaller = _replace(bound, name, _put(tensor, place, value / 2**8))
                larger = _replace(_double(bound), name, _put(tensor.double(), place, value * 2**16))
                cases = (changed, _double(changed), smaller, _double(smaller), larger)
                _assert_finite(forward(fresh(changed)), [reference(case) for case in cases], what)


def _assert_finite(results: tuple, witnesses: list[tuple], what: str) -> None:
    for out, *others in zip(results, *witnesses, strict=True):
        if out.is_floating_point():
            assert_masks(out, others, what, signs=False)


def _put(tensor: torch.Tensor, place: int, value: float) -> torch.Tensor:
    changed = tensor.detach().clone(memory_format=torch.contiguous_format)
    changed.view(-1)[place] = value
    return changed


def check_mutation(contract: Contract, sample: Sample, seed: int) -> None:
    """No byte of an argument changes unless the contract says so; no result aliases an argument.

    The same holds for the upstream gradient.
    """
    bound = fresh(bind(contract, sample))
    guarded = {name: t for name, t in tensors(bound).items() if name not in contract.mutates}
    before = {name: storage_bytes(t) for name, t in guarded.items()}

    def unchanged(when: str) -> None:
        for name, tensor in guarded.items():
            assert torch.equal(storage_bytes(tensor), before[name]), f"{name} was changed by {when}"

    results = forward_of(contract.op, contract)(bound)
    unchanged("the call")
    _assert_no_alias(results, guarded, "result")
    names = asking(contract, bound)
    if names:
        upstreams: list[torch.Tensor] = []

        def kept(result: torch.Tensor, index: int) -> torch.Tensor:
            upstreams.append(randn_upstream(seed)(result, index))
            return upstreams[-1]

        results, grads = gradients(contract.op, contract, bound, names, kept, share=True)
        unchanged("forward and backward")
        _assert_no_alias(results, guarded, "result")
        _assert_no_alias(grads, guarded, "gradient")
        _assert_no_alias(grads, {f"upstream gradient {i}": t for i, t in enumerate(upstreams)}, "gradient")
        for index, given in enumerate(upstreams):
            assert same_bits(given, randn_upstream(seed)(given, index)), "the upstream gradient was changed by backward"


def _assert_no_alias(results: tuple, arguments: dict[str, torch.Tensor], what: str) -> None:
    owners = {t.untyped_storage().data_ptr(): name for name, t in arguments.items() if t.untyped_storage().nbytes()}
    for index, result in enumerate(results):
        if result is None or result.untyped_storage().nbytes() == 0:
            continue
        owner = owners.setdefault(result.untyped_storage().data_ptr(), f"{what} {index}")
        assert owner == f"{what} {index}", f"{what} {index} shares its memory with {owner}"


def check_determinism(contract: Contract, sample: Sample, seed: int) -> None:
    """Two runs give the same bits, gradients included, and so do 1, 2 and 7 threads.

    A vendor GEMM may sum in another order with another thread count. So a result may differ between thread counts only
    where the same result of the plain composition does, in the layout given or with contiguous arguments.
    """
    bound = bind(contract, sample)
    dense = map_tensors(lambda _, t: t.contiguous(), bound)
    before = torch.get_num_threads()

    def evaluate(function: Callable, bound: Bound) -> tuple:
        return results_of(function, contract, randn_upstream(seed))(fresh(bound)) + forward_of(function, contract)(
            fresh(bound)
        )

    def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else same_bits(a, b)

    try:
        runs = {}
        for threads in THREADS:
            torch.set_num_threads(threads)
            composition = evaluate(contract.reference, bound), evaluate(contract.reference, dense)
            runs[threads] = evaluate(contract.op, bound), evaluate(contract.op, bound), composition
    finally:
        torch.set_num_threads(before)
    first, _, composed = runs[THREADS[0]]
    for threads, (once, again, composition) in runs.items():
        for index in range(len(once)):
            assert same(once[index], again[index]), (
                f"result {index}: two runs with {threads} threads give different bits"
            )
            vendor = any(not same(new[index], old[index]) for new, old in zip(composition, composed, strict=True))
            assert vendor or same(once[index], first[index]), (
                f"result {index}: {threads} threads give other bits than {THREADS[0]}"
            )
