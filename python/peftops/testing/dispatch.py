"""Checks of how an operator sits in PyTorch: schema, fake kernel, autocast, compile, export, errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from peftops.ops.contract import Contract, Sample
from peftops.testing.gradients import gradients, randn_upstream
from peftops.testing.samples import (
    Bound,
    argument_of,
    asking,
    bind,
    call,
    floating,
    fresh,
    map_tensors,
    same_bits,
    storage_bytes,
    tensors,
)
from peftops.testing.tolerance import assert_law, oracle

AUTOCAST = (torch.bfloat16, torch.float16)


def _asking(contract: Contract, bound: Bound) -> Bound:
    return map_tensors(
        lambda name, t: t.requires_grad_(argument_of(name) in contract.differentiable and t.is_floating_point()),
        fresh(bound),
    )


def _arguments(contract: Contract, bound: Bound) -> tuple[tuple, dict]:
    keyword = {argument.name for argument in contract.op._schema.arguments if argument.kwarg_only}
    return (
        tuple(value for name, value in bound.items() if name not in keyword),
        {name: value for name, value in bound.items() if name in keyword},
    )


def check_schema(contract: Contract) -> None:
    """What the contract says about arguments agrees with the schema: names, mutation."""
    arguments = {argument.name: argument for argument in contract.op._schema.arguments}
    written = tuple(name for name, a in arguments.items() if a.alias_info is not None and a.alias_info.is_write)
    assert written == contract.mutates, f"schema writes {written}, contract says {contract.mutates}"
    for field in ("differentiable", "autocast", "rows"):
        unknown = set(getattr(contract, field)) - set(arguments)
        assert not unknown, f"{field} names {sorted(unknown)}, which the schema does not have"


def check_samples(contract: Contract, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Every dtype has an empty, a strided, an offset and an ordinary sample; labels are unique."""
    bounds = [bind(contract, sample) for sample in contract.sample_inputs(device, dtype, seed)]
    labels = [sample.label for sample in contract.sample_inputs(device, dtype, seed)]
    assert labels, "no samples"
    assert len(set(labels)) == len(labels), f"sample labels repeat: {sorted(x for x in labels if labels.count(x) > 1)}"
    if not any(floating(bound) for bound in bounds):
        return
    every = [t for bound in bounds for t in floating(bound).values()]
    for what, present in (
        ("empty", any(t.numel() == 0 for t in every)),
        ("strided", any(not t.is_contiguous() for t in every)),
        ("offset", any(t.storage_offset() for t in every)),
        ("ordinary", any(t.numel() > 8 and t.is_contiguous() for t in every)),
    ):
        assert present, f"no {what} tensor among the samples in {dtype}"
    assert any(dtype == t.dtype for t in every), f"no sample has {dtype}"


def check_opcheck(contract: Contract, sample: Sample, seed: int, utils: tuple[str, ...] | None = None) -> None:
    """torch.library.opcheck: schema, autograd registration, fake kernel, AOT dispatch with dynamic shapes."""
    args, kwargs = _arguments(contract, _asking(contract, bind(contract, sample)))
    options = {} if utils is None else {"test_utils": utils}
    torch.library.opcheck(contract.op, args, kwargs, **options)


def check_fake(contract: Contract, sample: Sample, seed: int) -> None:
    """The cheap half of opcheck: schema and fake kernel."""
    check_opcheck(contract, sample, seed, ("test_schema", "test_faketensor"))


def check_autocast(contract: Contract, sample: Sample, seed: int) -> None:
    """Under autocast the arguments named in `contract.autocast` take its dtype and nothing else changes.

    Results and gradients equal, bit for bit, those of the call with explicit casts outside autocast, and obey the law
    against the reference. Backward runs outside autocast, as PyTorch recommends, and also inside, as some users do;
    gradients have the dtype of their argument. Arguments come all in their own dtype and, one at a time, already in
    autocast's.
    """
    for dtype in AUTOCAST:
        plain = bind(contract, sample)
        cast = [name for name in floating(plain) if argument_of(name) in contract.autocast]
        mixes = [plain] + [_converted(plain, (name,), dtype) for name in cast]
        for bound in mixes:
            _compare_autocast(contract, bound, dtype, seed)


def _converted(bound: Bound, names: tuple[str, ...], dtype: torch.dtype) -> Bound:
    def convert(name: str, t: torch.Tensor) -> torch.Tensor:
        chosen = name in names or argument_of(name) in names
        return t.to(dtype) if chosen and t.is_floating_point() else t

    return map_tensors(convert, bound)


def _compare_autocast(contract: Contract, bound: Bound, dtype: torch.dtype, seed: int) -> None:
    device = next(iter(tensors(bound).values())).device.type

    def inside(*args, **kwargs):
        with torch.autocast(device, dtype):
            return contract.op(*args, **kwargs)

    def explicit(*args, **kwargs):
        names = [argument.name for argument in contract.op._schema.arguments]
        converted = _converted({**dict(zip(names, args, strict=False)), **kwargs}, contract.autocast, dtype)
        args, kwargs = _arguments(contract, converted)
        return contract.op(*args, **kwargs)

    names, arguments = asking(contract, bound), tensors(bound)
    forward, backward = _forward(contract), _backward(contract, names, seed)

    def all_inside(function: Callable, bound: Bound) -> tuple:
        with torch.autocast(device, dtype):
            return backward(function, bound)

    ways = [(forward, forward, inside)]
    if names:
        ways += [(backward, backward, inside), (backward, all_inside, contract.op)]
    for outside, evaluate, function in ways:
        wanted, got = outside(explicit, fresh(bound)), evaluate(function, fresh(bound))
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert (a is None) == (b is None), (
                f"result {index} under autocast {dtype}: only one of the two ways returns it"
            )
            assert a is None or a.dtype == b.dtype, f"result {index} under autocast {dtype}: {a.dtype}, not {b.dtype}"
            assert a is None or same_bits(a, b), f"result {index} under autocast {dtype} differs from explicit casts"
            place = index - (len(wanted) - len(names))
            if outside is not forward and place >= 0:
                name = names[place]
                assert a is None or a.dtype == arguments[name].dtype, (
                    f"gradient of {name} is {a.dtype}, argument {arguments[name].dtype}"
                )
    reference = oracle(lambda b: forward(contract.reference, b), _converted(bound, contract.autocast, dtype), seed)
    assert_law(forward(inside, fresh(bound)), reference, f"output under autocast {dtype}")


def _forward(contract: Contract) -> Callable:
    def evaluate(function: Callable, bound: Bound) -> tuple:
        with torch.no_grad():
            return call(function, contract, bound)

    return evaluate


def _backward(contract: Contract, names: Sequence[str], seed: int) -> Callable:
    def evaluate(function: Callable, bound: Bound) -> tuple:
        results, grads = gradients(function, contract, bound, names, randn_upstream(seed))
        return results + grads

    return evaluate


def check_compile(contract: Contract, sample: Sample, seed: int, backend: str = "aot_eager") -> None:
    """torch.compile(fullgraph=True) gives the bits of eager mode, forward and backward."""
    bound = bind(contract, sample)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(contract.op, fullgraph=True, backend=backend)
        names = asking(contract, bound)
        evaluate = _backward(contract, names, seed) if names else _forward(contract)
        wanted, got = evaluate(contract.op, fresh(bound)), evaluate(compiled, fresh(bound))
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            same = a is b if a is None or b is None else same_bits(a, b)
            assert same, f"result {index} of torch.compile({backend}) differs from eager mode"
    finally:
        torch._dynamo.reset()


def check_inductor(contract: Contract, sample: Sample, seed: int) -> None:
    """:func:`check_compile` through Inductor."""
    check_compile(contract, sample, seed, backend="inductor")


def check_export(contract: Contract, sample: Sample, seed: int) -> None:
    """torch.export of a module around the operator gives the same bits and keeps the operator whole."""
    bound = fresh(bind(contract, sample))
    names = tuple(tensors(bound))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            given = dict(zip(names, inputs, strict=True))
            return call(contract.op, contract, map_tensors(lambda name, _: given[name], bound))

    inputs = tuple(tensors(bound).values())
    with torch.no_grad():
        program = torch.export.export(Module(), inputs)
        wanted, got = Module()(*inputs), program.module()(*inputs)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)), (
        "the exported program differs from eager mode"
    )
    namespace = contract.schema.split("::")[0]
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(target.startswith(namespace + ".") for target in targets), (
        f"the operator is not in the exported graph: {targets}"
    )


def check_dynamic(contract: Contract, sample: Sample, seed: int) -> None:
    """After mark_dynamic on the tokens' dimension a second token count neither recompiles nor changes a bit."""
    bound = bind(contract, sample)
    names = asking(contract, bound)
    evaluate = _backward(contract, names, seed) if names else _forward(contract)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(contract.op, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count in (19, 41, 23):
                resized = map_tensors(
                    lambda name, t, n=count: _resized(t, n) if name in contract.rows else t.detach(), bound
                )
                for name in contract.rows:
                    torch._dynamo.mark_dynamic(resized[name], 0)
                got = evaluate(_keeping_marks(compiled, contract), resized)
                wanted = evaluate(contract.op, resized)
                for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
                    same = a is b if a is None or b is None else same_bits(a, b)
                    assert same, f"result {index} with {count} tokens differs between torch.compile and eager mode"
    except torch._dynamo.exc.RecompileError as error:
        raise AssertionError(f"recompiled for another token count: {error}") from error
    finally:
        torch._dynamo.reset()


def _resized(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor.detach().index_select(0, torch.arange(count, device=tensor.device) % tensor.shape[0])


def _keeping_marks(function: Callable, contract: Contract) -> Callable:
    """Copies of tensors lose the dynamic mark: set it again on what the call really gets."""

    def marked(*args, **kwargs):
        names = [argument.name for argument in contract.op._schema.arguments]
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            if name in contract.rows:
                torch._dynamo.mark_dynamic(value, 0)
        return function(*args, **kwargs)

    return marked


def check_errors(contract: Contract, device: torch.device) -> None:
    """Every error sample raises its error with its text, and leaves the arguments as they were."""
    for error_sample in contract.error_inputs(device):
        bound = bind(contract, error_sample.sample)
        before = {name: storage_bytes(t) for name, t in tensors(bound).items()}
        args, kwargs = _arguments(contract, bound)
        try:
            contract.op(*args, **kwargs)
        except error_sample.error as error:
            text = str(error)
            assert re.search(error_sample.match, text), f"expected an error like '{error_sample.match}', got '{text}'"
        else:
            raise AssertionError(f"no error like '{error_sample.match}' was raised")
        for name, tensor in tensors(bound).items():
            assert torch.equal(storage_bytes(tensor), before[name]), (
                f"{name} was changed by a refused call ('{error_sample.match}')"
            )
