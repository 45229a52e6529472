"""Checks of the operators on fake CUDA tensors: all that PyTorch does before a kernel runs, on a machine without GPU.

`python tests/ops/cuda_dispatch.py LIBRARY` runs every case in a process of its own, in which LIBRARY (fake_cuda.cpp)
was loaded before torch, and prints a line of JSON for each: its name, and what is wrong or null.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    # torch asks once, on import, what there is for CUDA.
    ctypes.CDLL(str(Path(find_spec("torch").origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import peftops  # noqa: F401  (registers operators and contracts)
import torch
from peftops.ops.contract import CONTRACTS, Contract, Sample
from peftops.testing import Check, run
from peftops.testing.gradients import gradients, sum_upstream
from peftops.testing.samples import (
    Bound,
    argument_of,
    asking,
    bind,
    call,
    call_grouped,
    carrying,
    floating,
    fresh,
    map_tensors,
    tensors,
)
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALVES = (torch.bfloat16, torch.float16)

Facts = tuple[torch.dtype, torch.Size, tuple[int, ...]]


def on_cuda(mode: FakeTensorMode, bound: Bound, asking: tuple[str, ...] = ()) -> Bound:
    """The same arguments as fake CUDA tensors with the same strides and offsets; those in `asking` want gradients."""

    def fake(name: str, t: torch.Tensor) -> torch.Tensor:
        elements = t.untyped_storage().nbytes() // t.element_size()
        memory = torch.empty(elements, dtype=t.dtype, device=CUDA)
        view = memory.as_strided(t.shape, t.stride(), t.storage_offset())
        return view.requires_grad_(name in asking and t.is_floating_point())

    with mode:
        return map_tensors(fake, bound)


def facts(result: torch.Tensor | None) -> Facts | None:
    return None if result is None else (result.dtype, result.shape, result.stride())


def evaluate(function: Callable, contract: Contract, bound: Bound, names: tuple[str, ...]) -> list[torch.Tensor | None]:
    """Results of `function` and, where `names` ask for them, gradients. `bound` is fake and set up by `on_cuda`."""
    groups = call_grouped(function, contract, bound)
    grads = backward(contract, groups, bound, names) or [None for _ in names]
    return [*(result for group in groups for result in group), *grads]


def real(contract: Contract, bound: Bound, names: tuple[str, ...]) -> list[torch.Tensor | None]:
    """What the CPU operator returns for the real arguments, gradients included."""
    if not names:
        return list(call(contract.op, contract, fresh(bound)))
    results, grads = gradients(contract.op, contract, bound, names, sum_upstream)
    return [*results, *grads]


def assert_alike(got: list, wanted: list, what: str) -> None:
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert facts(a) == facts(b), f"{what}: result {index} is {facts(a)}, but {facts(b)} on the CPU"
        assert a is None or a.device == CUDA, f"{what}: result {index} is on {a.device}"


# ---- checks: (contract, sample, seed), as in peftops.testing ---------------------------------------------------------


def check_fake(contract: Contract, sample: Sample, seed: int) -> None:
    """Results and gradients are on the GPU, with the CPU operator's dtypes, shapes and strides."""
    bound, mode = bind(contract, sample), FakeTensorMode()
    for names in dict.fromkeys([(), asking(contract, bound)]):
        wanted = real(contract, bound, names)
        with mode:
            got = evaluate(contract.op, contract, on_cuda(mode, bound, names), names)
        assert_alike(got, wanted, "with gradients" if names else "without gradients")


def check_compile(contract: Contract, sample: Sample, seed: int) -> None:
    """torch.compile(fullgraph=True) traces forward and backward; all that their graphs know is on the GPU.

    The graphs, run on fake tensors, return what the eager operator returns; under autocast, too.
    """
    bound, mode = bind(contract, sample), FakeTensorMode()
    names = asking(contract, bound)
    for dtype in (None, torch.bfloat16) if floating(bound) else (None,):
        graphs: list[torch.fx.GraphModule] = []
        torch._dynamo.reset()
        compiled = torch.compile(contract.op, fullgraph=True, backend=aot_autograd(fw_compiler=keeping(graphs)))
        with mode, torch.autocast("cuda", dtype, enabled=dtype is not None):
            wanted = evaluate(contract.op, contract, on_cuda(mode, bound, names), names)
            got = evaluate(compiled, contract, on_cuda(mode, bound, names), names)
        assert_alike(got, wanted, f"compiled, autocast to {dtype}")
        differentiated = any(g is not None for g in got[len(got) - len(names) :])
        assert len(graphs) == 1 + differentiated, f"{len(graphs)} graphs"
        assert_calls(contract, graphs[0])
        for graph in graphs:
            assert_on_cuda(graph)


def keeping(graphs: list) -> Callable:
    def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return compiler


def assert_calls(contract: Contract, graph: torch.fx.GraphModule) -> None:
    """The graph calls an operator of this library; autograd may have put another one in the place of the contract's."""
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    namespace = contract.schema.partition("::")[0]
    assert any(target.startswith(namespace + ".") for target in calls), f"no operator of {namespace} in {calls}"


def assert_on_cuda(graph: torch.fx.GraphModule | torch.export.ExportedProgram) -> None:
    for node in graph.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, torch.Tensor):
                assert value.device == CUDA, f"{node} ({node.target}) of the graph is on {value.device}"


def check_export(contract: Contract, sample: Sample, seed: int) -> None:
    """torch.export on fake CUDA tensors keeps the operator whole, and the program runs on them."""
    bound, mode = bind(contract, sample), FakeTensorMode()
    fakes = on_cuda(mode, bound)
    names = list(tensors(fakes))

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            given = dict(zip(names, inputs, strict=True))
            return call(contract.op, contract, map_tensors(lambda name, _: given[name], bound))

    inputs = tuple(tensors(fakes).values())
    with mode, torch.no_grad():
        program = torch.export.export(Module(), inputs)
        assert_alike(list(program.module()(*inputs)), list(Module()(*inputs)), "exported")
    assert_on_cuda(program)
    assert any(node.target == contract.op for node in program.graph.nodes), f"{contract.op} was taken apart"


class Kernels(TorchDispatchMode):
    """Records what reaches the kernels of one library: operator, and dtypes of its arguments."""

    def __init__(self, namespace: str):
        super().__init__()
        self.namespace, self.calls = namespace, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == self.namespace:
            names = [argument.name for argument in op._schema.arguments]
            arguments = tensors(dict(zip(names, args, strict=False)) | (kwargs or {}))
            self.calls.append((op, {name: t.dtype for name, t in arguments.items()}))
        return op(*args, **(kwargs or {}))


def check_autocast(contract: Contract, sample: Sample, seed: int) -> None:
    """Under CUDA autocast the kernel gets the contract's arguments in autocast's dtype and all others as they are.

    Results are those of the call with explicit casts; gradients have the dtype of their argument, whether backward runs
    inside or outside autocast.
    """
    bound, mode = bind(contract, sample), FakeTensorMode()
    names, arguments = asking(contract, bound), tensors(bound)
    for dtype in HALVES:
        for inside in (False, True):
            what = f"autocast to {dtype}, backward {'inside' if inside else 'outside'}"
            fakes = on_cuda(mode, bound, names)
            with mode, Kernels(contract.schema.partition("::")[0]) as kernels:
                with torch.autocast("cuda", dtype):
                    groups = call_grouped(contract.op, contract, fakes)
                    grads = backward(contract, groups, fakes, names) if inside else []
                if not inside:
                    grads = backward(contract, groups, fakes, names)
            explicit = on_cuda(mode, cast_as_autocast(contract, bound, dtype), names)
            with mode:
                wanted = call(contract.op, contract, explicit)
            assert_alike([result for group in groups for result in group], list(wanted), what)
            for name, grad in zip(names, grads, strict=False):
                assert grad is None or (grad.dtype, grad.device) == (arguments[name].dtype, CUDA), (
                    f"{what}: gradient of {name} is {grad.dtype} on {grad.device}, argument {arguments[name].dtype}"
                )
            assert kernels.calls, f"{what}: no kernel was called"
            for name, got in kernels.calls[0][1].items():
                given = tensors(explicit).get(name)
                assert given is None or got == given.dtype, f"{what}: the kernel gets {name} in {got}"


def backward(contract: Contract, groups: list[tuple], bound: Bound, names: tuple[str, ...]) -> list:
    driven = [result for result in carrying(contract, groups) if result.requires_grad]
    wanted = [tensors(bound)[name] for name in names]
    ups = [sum_upstream(result) for result in driven]
    return list(torch.autograd.grad(driven, wanted, ups, allow_unused=True)) if driven else []


def cast_as_autocast(contract: Contract, bound: Bound, dtype: torch.dtype) -> Bound:
    def cast(name: str, t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if argument_of(name) in contract.autocast and t.is_floating_point() else t

    return map_tensors(cast, bound)


# ---- cases -----------------------------------------------------------------------------------------------------------


def _floats(contract: Contract) -> bool:
    return any(floating(bind(contract, s)) for s in contract.sample_inputs(CPU, contract.dtypes[0], 0))


def _filled(contract: Contract, bound: Bound) -> bool:
    return all(t.numel() for t in tensors(bound).values())


_WIDE = (torch.float32,)
CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("fake", check_fake),
        Check("compile", check_compile, wants=_filled, limit=3, dtypes=_WIDE),
        Check("export", check_export, limit=2, dtypes=_WIDE),
        Check("autocast", check_autocast, applies=_floats, wants=_filled, limit=6, dtypes=_WIDE),
    )
}


def cases() -> Iterator[tuple[str, Contract, torch.dtype, Check]]:
    for contract in (contract for contract in CONTRACTS.values() if contract.dtypes_on(CUDA)):
        for check in CHECKS.values():
            for dtype in (check.dtypes or contract.dtypes_on(CUDA)) if check.applies(contract) else ():
                name = contract.schema.removeprefix("peftops::")
                yield f"{name}-{str(dtype).removeprefix('torch.')}-{check.name}", contract, dtype, check


def outcome(contract: Contract, dtype: torch.dtype, check: Check) -> str | None:
    try:
        run(check, contract, CPU, dtype, seed=0)
    except AssertionError as error:
        return str(error)
    return None


def main() -> None:
    from tests.ops import cuda_faults

    # Python's part of torch was built without CUDA: autocast would switch itself off.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.set_num_threads(1)
    for name, contract, dtype, check in cases():
        print(json.dumps([name, outcome(contract, dtype, check)]), flush=True)
    for check in CHECKS.values():
        print(json.dumps([f"clean-{check.name}", outcome(cuda_faults.CLEAN, torch.float32, check)]), flush=True)
    for contract, check, _ in cuda_faults.CAUGHT:
        print(json.dumps([contract.schema, outcome(contract, torch.float32, CHECKS[check])]), flush=True)


if __name__ == "__main__":
    main()
