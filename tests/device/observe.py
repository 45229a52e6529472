"""In a process of standin.Process that records: calls of operators, and what they told the CUDA runtime."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from peftops.ops import lora_dropout_mask, lora_linear

from .emulate import device as stand_ins
from .recording import ARGUMENT_BYTES, GPUS, OTHER_STREAM, STREAM, TASK_BYTES, Runtime


def start() -> None:
    """Before the first observation: tensors become address space without memory."""
    stand_ins.record()


def observe_lora(
    *,
    rows: int,
    features: int,
    out_features: int,
    rank: int,
    dtype: str = "bfloat16",
    factor_dtype: str | None = None,
    dropout_p: float = 0.0,
    tensor_scale: bool = False,
    layout: str = "contiguous",
    gradients: str = "",
    forced: str = "",
    **where: Any,
) -> dict:
    """One call of lora_linear, and the named gradients.

    layout: of x and of the upstream gradient. forced: the plan that PEFTOPS_FORCE_PLAN names.
    """

    def call(device: str):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

        x, upstream = {
            "contiguous": lambda: (empty(rows, features), empty(rows, out_features)),
            "sliced": lambda: (empty(rows, features + 8)[:, 8:], empty(rows, out_features + 8)[:, 8:]),
            "unaligned": lambda: (empty(rows, features + 1)[:, 1:], empty(rows, out_features + 1)[:, 1:]),
            "transposed": lambda: (empty(features, rows).t(), empty(out_features, rows).t()),
            "expanded": lambda: (empty(features).expand(rows, features), empty().expand(rows, out_features)),
        }[layout]()
        factors = factor_dtype or dtype
        tensors = {
            "x": x,
            "weight": empty(out_features, features),
            "bias": empty(out_features),
            "lora_a": empty(rank, features, dtype=factors),
            "lora_b": empty(out_features, rank, dtype=factors),
        }
        leaves = [tensors[name].requires_grad_() for name in gradients.split()]
        scale = empty(dtype="float32") if tensor_scale else 0.5
        seed = empty(1, dtype="int64") if dropout_p else None

        def run() -> list:
            if forced:
                os.environ["PEFTOPS_FORCE_PLAN"] = forced
            try:
                y = lora_linear(*tensors.values(), scale, dropout_p, seed)
                return [y, *(torch.autograd.grad(y, leaves, upstream) if leaves else ())]
            finally:
                os.environ.pop("PEFTOPS_FORCE_PLAN", None)

        return run

    return _observe(call, **where)


def observe_gemm_sm90(
    *,
    library: str,
    rows: int,
    columns: int,
    depths: list[int],
    dtype: str = "bfloat16",
    down: bool = False,
    adapters: int = 0,
    padding: int = 0,
    options: str = "",
    scale: float = 1.0,
    candidate: int = -1,
    programmatic: bool = False,
    old_driver: bool = False,
    **where: Any,
) -> dict:
    """One launch of the GEMM for sm_90a, through the operator in a library (gemm_sm90.cpp).

    padding: elements between rows. options: of "bias column_scale device_scale mask unaligned". The observation holds
    under "matrices" where d, every x and every w start, and how many bytes they have.
    """
    matrices: list[tuple[int, int]] = []
    options = options.split()

    def call(device: str):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

        def matrix(rows: int, columns: int):
            start = 1 if "unaligned" in options else 0
            made = empty(rows, columns + padding)[:, start : start + columns]
            # Of the last row nothing lies behind the last column.
            matrices.append((made.data_ptr(), 2 * ((rows - 1) * made.stride(0) + columns)))
            return made

        d = matrix(rows, columns)
        x = [matrix(rows, depth) for depth in depths]
        w = [matrix(depth, columns) if down else matrix(columns, depth) for depth in depths]
        extra = {
            "bias": lambda: empty(columns),
            "column_scale": lambda: empty(columns, dtype="float32"),
            "device_scale": lambda: empty(dtype="float32"),
            "mask": lambda: empty(rows, -(-columns // 8), dtype="uint8"),
        }
        bias, column_scale, device_scale, mask = (make() if name in options else None for name, make in extra.items())
        torch.ops.load_library(library)
        Runtime(stand_ins.runtime).set_old_driver(old_driver)
        return lambda: [
            torch.ops.peftops_test.gemm_sm90(
                d, x, w, down, adapters, bias, column_scale, scale, device_scale, mask, candidate, programmatic
            )
        ]

    return _observe(call, bytes_of_task=ARGUMENT_BYTES, **{"gpu": "H100"} | where) | {"matrices": matrices}


def observe_lora_dropout_mask(*, rows: int, features: int, **where: Any) -> dict:
    """One call of lora_dropout_mask."""

    def call(device: str):
        seed = torch.empty(1, dtype=torch.int64, device=device)
        return lambda: [lora_dropout_mask(seed, rows, features, 0.5)]

    return _observe(call, **where)


def observe_launcher(*, library: str, name: str, count: int, **where: Any) -> dict:
    """One call of a C function (device, count) of a library."""
    return _observe(lambda device: lambda: _launch(library, name, int(device.partition(":")[2]), count), **where)


def _launch(library: str, name: str, device: int, count: int) -> list:
    ctypes.CDLL(library)[name](device, ctypes.c_int64(count))
    return []


def _observe(
    prepare: Callable[[str], Callable[[], list]],
    *,
    gpu: str = "A100",
    device: int = 0,
    current: int = 0,
    fresh: bool = True,
    bytes_of_task: int = TASK_BYTES,
) -> dict:
    """What happens in the call that `prepare` makes for a device, while device `current` is the current one.

    fresh: on devices on which nothing was done before.
    """
    runtime = Runtime(stand_ins.runtime)
    if fresh:
        runtime.set_devices(GPUS[gpu])
    for index in range(2):
        stand_ins.set_stream(index, STREAM if index == device else OTHER_STREAM)
    runtime.library.cudaSetDevice(current)
    call = prepare(f"cuda:{device}")
    with runtime.recorded() as calls:
        results = call()
    shapes = [[list(t.shape), str(t.dtype).removeprefix("torch."), str(t.device)] for t in results]
    return {
        "gpu": gpu,
        "device": device,
        "current": current,
        "current_after": runtime.device(),
        "results": shapes,
        "calls": [asdict(call) | {"argument": call.argument[:bytes_of_task].hex()} for call in calls],
    }
