"""The checks of `make gpu-check`, part by part, in the order in which they run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peftops.ops.contract import CONTRACTS, Contract, Sample
from peftops.testing import plan, suite
from peftops.testing.dispatch import check_errors, check_samples
from peftops.testing.gradients import randn_upstream
from peftops.testing.samples import bind, call_grouped, carrying, fresh, map_tensors, same_bits, tensors
from peftops.testing.tolerance import assert_law, oracle
from peftops.testing.values import forward_of, results_of
from torch.utils.checkpoint import checkpoint

from tests.gpu import grouped, lora, modules, multi
from tests.gpu.calls import ExactCall, assert_expected, every, exact_samples, short, variants
from tests.gpu.device import Cuda, Rehearsal
from tests.gpu.runner import Case, Skipped

#: The operator families with calls of their own for a GPU.
FAMILIES = (lora, grouped, multi)
REPEATS = 200


@dataclass(frozen=True)
class Setting:
    """device: where the checks run; seed: the integer that all data comes from; fuzz: number of random calls."""

    device: Cuda | Rehearsal
    seed: int = 0
    fuzz: int = 300


def smoke(setting: Setting) -> Iterator[Case]:
    """Every operator and dtype on small integers, results and gradients equal, fresh memory full of NaN."""
    for contract, dtype in every(setting.device.device):
        yield _kit(setting, contract, dtype, suite.CHECKS["poison"])


def kit(setting: Setting) -> Iterator[Case]:
    """The whole oracle kit (compile, export and autocast among it), the error messages, the samples themselves."""
    for contract, dtype, check in plan(CONTRACTS.values(), setting.device.device):
        if check.name != "poison":
            yield _kit(setting, contract, dtype, check)
    for contract in CONTRACTS.values():
        if not contract.dtypes_on(setting.device.device):
            continue
        name = contract.schema.partition("::")[2]
        yield Case(f"{name}-errors", lambda contract=contract: check_errors(contract, setting.device.device))
        for dtype in contract.dtypes_on(setting.device.device):
            yield Case(
                f"{short(contract, dtype)}-samples",
                lambda contract=contract, dtype=dtype: check_samples(
                    contract, setting.device.device, dtype, setting.seed
                ),
            )


def _kit(setting: Setting, contract: Contract, dtype: torch.dtype, check: suite.Check) -> Case:
    return Case(
        f"{short(contract, dtype)}-{check.name}",
        lambda: suite.run(check, contract, setting.device.device, dtype, setting.seed),
    )


def fuzz(setting: Setting) -> Iterator[Case]:
    """Random calls, forward and all gradients, against the tolerance law."""

    def run(family, index: int) -> None:
        contract, sample = family.fuzz(setting.device.device, setting.seed, index)
        try:
            _law(contract, sample, setting.seed)
        except Exception as error:
            raise AssertionError(f"{sample.label}: {error}") from error

    for family in FAMILIES:
        for index in range(setting.fuzz):
            yield Case(f"{_name(family)}-{index}", lambda family=family, index=index: run(family, index))


def _name(family) -> str:
    return family.__name__.rpartition(".")[2]


def _law(contract: Contract, sample: Sample, seed: int) -> None:
    bound = bind(contract, sample)
    upstream = randn_upstream(seed)
    expected = oracle(results_of(contract.reference, contract, upstream), bound, seed)
    assert_law(results_of(contract.op, contract, upstream)(bound), expected, "results and gradients")
    plain = forward_of(contract.op, contract)(bound)
    assert_law(plain, expected.select(range(len(plain))), "results without gradients")


def stream(setting: Setting) -> Iterator[Case]:
    """Inputs are written late, on a busy stream: a kernel on another one reads what was there before."""

    def run(contract: Contract, dtype: torch.dtype) -> None:
        for sample in exact_samples(contract, setting.device.device, dtype, None):
            source = ExactCall(contract, sample, setting.seed)
            target = source.copy()
            target.spoil()
            with setting.device.delayed_stream():
                target.overwrite(source)
                results = target.evaluate()
            assert_expected(results, source.expected, f"sample '{sample.label}' on a side stream")

    for contract, dtype in every(setting.device.device):
        yield Case(short(contract, dtype), lambda contract=contract, dtype=dtype: run(contract, dtype))


def graph(setting: Setting) -> Iterator[Case]:
    """Forward and backward are captured once and replayed with every input changed in place."""

    def run(contract: Contract, dtype: torch.dtype) -> None:
        for sample in exact_samples(contract, setting.device.device, dtype, 6):
            (_, static), *others = variants(contract, sample, setting.seed)
            results, replay = setting.device.capture(static.evaluate)
            for label, changed in [("first", static.copy()), *others]:
                static.overwrite(changed)
                replay()
                setting.device.synchronize()
                assert_expected(results, changed.expected, f"sample '{sample.label}', replay with {label}")

    for contract, dtype in every(setting.device.device):
        yield Case(short(contract, dtype), lambda contract=contract, dtype=dtype: run(contract, dtype))


def large(setting: Setting) -> Iterator[Case]:
    """Calls of a model's size against the tolerance law."""
    yield from _large(setting, lambda contract, sample: _law(contract, sample, setting.seed))


def repeats(setting: Setting) -> Iterator[Case]:
    """The same call many times gives the same bits while other work shares the memory bus."""

    def run(contract: Contract, sample: Sample) -> None:
        drawn: dict[int, torch.Tensor] = {}

        def upstream(result: torch.Tensor, index: int) -> torch.Tensor:
            if index not in drawn:
                drawn[index] = randn_upstream(setting.seed)(result, index)
            return drawn[index]

        evaluate, bound = results_of(contract.op, contract, upstream), bind(contract, sample)
        first = evaluate(bound)
        try:
            for turn in range(REPEATS):
                setting.device.press()
                for index, (a, b) in enumerate(zip(evaluate(bound), first, strict=True)):
                    assert a is b is None or same_bits(a, b), f"result {index}: run {turn + 2} gives other bits"
        finally:
            setting.device.relieve()

    yield from _large(setting, run)


def _large(setting: Setting, run: Callable[[Contract, Sample], None]) -> Iterator[Case]:
    """Cases over the families' calls of a model's size; a rehearsal takes random calls in their place."""

    def start(family, index: int) -> None:
        device = setting.device
        call = family.large(device.device, index) if device.real else family.fuzz(device.device, setting.seed, index)
        try:
            run(*call)
        except Exception as error:
            raise AssertionError(f"{call[1].label}: {error}") from error

    for family in FAMILIES:
        for index in range(len(family.LARGE)):
            yield Case(f"{_name(family)}-{index}", lambda family=family, index=index: start(family, index))


def leak(setting: Setting) -> Iterator[Case]:
    """After 200 steps the allocator holds as many bytes as after 20, and nothing of a step is alive."""

    def run(contract: Contract, dtype: torch.dtype, way: str) -> None:
        (sample,) = exact_samples(contract, setting.device.device, dtype, 1)
        call = ExactCall(contract, sample, setting.seed)
        alive: list[weakref.ref] = []

        def step() -> None:
            leaves = map_tensors(lambda name, t: t.requires_grad_(name in call.names), fresh(call.bound))
            inputs = [tensors(leaves)[name] for name in call.names]

            def forward() -> list[tuple]:
                return call_grouped(contract.op, contract, leaves)

            if way == "no grad":
                with torch.no_grad():
                    groups = forward()
            else:
                groups = checkpoint(forward, use_reentrant=False) if way == "checkpoint" else forward()
            first, *_ = carrying(contract, groups)
            if way != "no grad":
                alive.append(weakref.ref(first.grad_fn))
                torch.autograd.grad(first, inputs, call.upstream[0], allow_unused=True)
            alive.extend(weakref.ref(tensor) for tensor in (first, *inputs))

        held = []
        for count in (20, 180):
            for _ in range(count):
                step()
            gc.collect()
            setting.device.synchronize()
            held.append(setting.device.allocated())
        living = sum(ref() is not None for ref in alive)
        assert not living, f"{living} tensors and graph nodes outlive their step"
        assert held[0] == held[1], f"{held[1] - held[0]} bytes more are held after 200 steps than after 20"

    for contract, dtype in every(setting.device.device):
        for way in ("plain", "checkpoint", "no grad") if contract.differentiable else ():
            yield Case(
                f"{short(contract, dtype)}-{way}",
                lambda contract=contract, dtype=dtype, way=way: run(contract, dtype, way),
            )


def use(setting: Setting) -> Iterator[Case]:
    """Modules and methods: autocast, checkpointing, Inductor, CUDA graphs, a training run."""
    for check in (
        modules.autocast,
        modules.checkpointing,
        modules.compiled,
        modules.graph_draws_new_masks,
        modules.training,
        modules.several_adapters,
        modules.graph_sees_swapped_weights,
    ):
        yield Case(check.__name__, lambda check=check: check(setting.device))


def kernels(setting: Setting) -> Iterator[Case]:
    """Every kernel of every family against the tolerance law; and which ran: only those count as verified."""

    def law(family) -> None:
        for contract, sample in family.every_kernel(setting.device.device):
            try:
                _law(contract, sample, setting.seed)
            except Exception as error:
                raise AssertionError(f"{sample.label}: {error}") from error

    def launched() -> list[str]:
        def calls() -> None:
            for contract, dtype in every(setting.device.device):
                for sample in contract.sample_inputs(setting.device.device, dtype, setting.seed):
                    evaluate = results_of(contract.op, contract, randn_upstream(setting.seed))
                    evaluate(bind(contract, sample))
                    forward_of(contract.op, contract)(bind(contract, sample))
            for family in FAMILIES:
                for contract, sample in family.every_kernel(setting.device.device):
                    results_of(contract.op, contract, randn_upstream(setting.seed))(bind(contract, sample))

        ran = [name for name in setting.device.launched(calls) if "peftops" in name]
        assert ran or not setting.device.real, "no kernel of the library was seen on the device"
        return ran

    for family in FAMILIES:
        yield Case(_name(family), lambda family=family: law(family))
    yield Case("launched", launched)


def huge(setting: Setting) -> Iterator[Case]:
    """More than 2^31 elements."""

    def run(needed: int, check: Callable[[], None]) -> None:
        free = setting.device.free()
        if free < needed:
            raise Skipped(f"needs {needed >> 30} GiB, {free >> 30} GiB are free")
        check()

    for family in FAMILIES:
        for name, needed, check in family.huge(setting.device.device):
            yield Case(f"{_name(family)}-{name}", lambda needed=needed, check=check: run(needed, check))


def devices(setting: Setting) -> Iterator[Case]:
    """Tensors on the second GPU while the first is current."""

    def none() -> None:
        raise Skipped("there is no second GPU")

    def run(contract: Contract, dtype: torch.dtype) -> None:
        (sample,) = exact_samples(contract, torch.device("cuda", 1), dtype, 1)
        call = ExactCall(contract, sample, setting.seed)
        results = call.evaluate()
        assert torch.cuda.current_device() == 0, "the call changed the current device"
        assert all(result is None or result.device.index == 1 for result in results)
        assert_expected(results, call.expected, "on the second GPU")

    if not setting.device.real or torch.cuda.device_count() < 2:
        yield Case("second", none)
        return
    for contract, dtype in every(setting.device.device):
        yield Case(short(contract, dtype), lambda contract=contract, dtype=dtype: run(contract, dtype))


#: part -> (its checks, whether they may be spread over several processes). The order is that of a run.
PARTS: dict[str, tuple[Callable[[Setting], Iterator[Case]], bool]] = {
    "smoke": (smoke, False),
    "kit": (kit, True),
    "fuzz": (fuzz, True),
    "stream": (stream, False),
    "graph": (graph, False),
    "large": (large, False),
    "repeats": (repeats, False),
    "leak": (leak, False),
    "use": (use, False),
    "kernels": (kernels, False),
    "devices": (devices, False),
    "huge": (huge, False),
}
