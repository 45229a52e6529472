"""What the operators tell the CUDA runtime: every launch of the library that nvcc built, recorded instead of run.

Tensors are address space without memory, so shapes may have any size.
"""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.build.conftest import ROOT
from tests.build.kernels import largest_blocks, short_names
from tests.device import families, standin
from tests.device.recording import ALLOWED, GPUS, LAUNCHES, STREAM

CUDA_LIBRARY = ROOT / "python" / "peftops" / "lib" / "libpeftops_cuda.so"
MAX_THREADS, MAX_GRID = 1024, (2**31 - 1, 65535, 65535)
INT32 = 2**31
MANY = 3_000_000_000
ALL_GRADIENTS = "x weight bias lora_a lora_b"

Observe = Callable[..., dict]


# ---- the rules -------------------------------------------------------------------------------------------------------


def faults(seen: dict, bounds: dict[str, int]) -> list[str]:
    """What is wrong with the calls in an observation. `bounds`: threads that each kernel is compiled for."""
    found = []
    for call in seen["calls"]:
        name = call["name"]
        if name not in ALLOWED:
            found.append(f"{name} within an operator")
        if call["status"]:
            found.append(
                f"{name} of {call['kernel']} on device {call['device']} is refused with error {call['status']}"
            )
    for launch in launches(seen):
        kernel, shared_memory = launch["kernel"], launch["shared_memory"]
        if launch["device"] != seen["device"]:
            found.append(f"{kernel} goes to device {launch['device']}, but the tensors are on {seen['device']}")
        if launch["stream"] != STREAM:
            found.append(f"{kernel} goes to stream {launch['stream']:#x}, but {STREAM:#x} is current")
        if any(not 0 < size <= limit for size, limit in zip(launch["grid"], MAX_GRID, strict=True)):
            found.append(f"{kernel} has a grid of {launch['grid']}")
        threads = launch["block"][0] * launch["block"][1] * launch["block"][2]
        if not 0 < threads <= min(bounds.get(kernel, 0), MAX_THREADS):
            found.append(f"{kernel} has {threads} threads, but is compiled for {bounds.get(kernel, 0)}")
        if shared_memory > GPUS[seen["gpu"]].shared_memory:
            found.append(f"{kernel} wants {shared_memory} bytes of shared memory")
        found += uncovered(launch)
    if seen["current_after"] != seen["current"]:
        found.append(f"device {seen['current_after']} is current afterwards, but {seen['current']} was before")
    return found


def launches(seen: dict) -> list[dict]:
    return [call for call in seen["calls"] if call["name"] in LAUNCHES]


def uncovered(launch: dict) -> list[str]:
    """Extents that a launch's blocks do not cover, or for which it has blocks without work."""
    return [
        f"{launch['kernel']}: {blocks} blocks of {each} for {extent} {axis}"
        for axis, extent, each, blocks in walks(launch)
        if not each * (blocks - 1) < extent <= each * blocks
    ]


def walks(launch: dict) -> list[tuple[str, int, int, int]]:
    """(axis, its extent, how much of it a block does, blocks) of a launch."""
    if "sm90" in launch["kernel"]:  # its blocks take tile after tile: test_gemm_sm90.py
        return []
    if short_name(launch["kernel"]).startswith("lora::sm90::"):  # test_gemm_sm90.py looks at its grid
        return []
    x, y, z = launch["grid"]
    task, tile = fields(launch), tasks().lora_tile()
    match = re.fullmatch(r"(?:\w+::)*(\w+)(?:<(.*)>)?", short_name(launch["kernel"]))
    kernel, options = match[1], (match[2] or "").split(",")
    if kernel == "shrink":
        return [
            ("rows", task["rows"], tile, x),
            # Sums over nothing, and keep-bits without ranks, are written all the same.
            ("depth", max(task["depth"], 1), task["depth_per_split"], y),
            ("rank", max(task["rank"], 1), int(options[-1]), z),
        ]
    if kernel == "expand":
        return [("rows", task["rows"], tile, x), ("columns", task["columns"], task["columns_per_block"], y)]
    if kernel == "operand":
        return [("rows", task["rows"], tile, x)]
    if kernel == "factor_operand":  # in y, each block goes on until nothing is left
        return [("columns", task["whole_columns"], tile, x)]
    if kernel == "gemm":
        each = tasks().lora_gemm_tile()
        tiles = -(-task["rows"] // each) * -(-task["columns"] // each)
        return [("tiles", tiles, 1, x)]
    if kernel == "gradient":
        on_tensor_cores = options[0] == options[1] != "float" or options[:2] == ["bfloat16", "float"]
        return [
            ("features", task["features"], 2 * tile if on_tensor_cores else tile, x),
            ("rows", task["rows"], task["rows_per_split"], y),
            ("rank", task["rank"], int(options[-1]), z),
        ]
    if kernel == "finish":
        counts = [count for count in (task["count0"], task["count1"]) if count]
        return [("elements", max(counts), tasks().lora_finish_threads(), x), ("results", len(counts), 1, y)]
    if kernel == "dropout_mask":  # each block goes on until nothing is left
        return []
    if kernel == "fill":
        return [("elements", task["count"], 256, x)]
    if kernel in families.WALKS:
        return families.WALKS[kernel](task, tile, launch["grid"], options)
    raise AssertionError(f"say in walks() what the blocks of {kernel} do")


class CountTask(ctypes.Structure):
    """Of faults.cu."""

    _fields_ = [("data", ctypes.c_void_p), ("count", ctypes.c_int64)]


def fields(launch: dict) -> dict[str, int]:
    """The sizes in the struct that the launch handed to its kernel."""
    argument = bytes.fromhex(launch["argument"])
    name = re.search(r"\d([A-Za-z]+Task)E?$", launch["kernel"])[1]  # a mangled name ends in its argument's
    if name == "CountTask":
        return {"count": CountTask.from_buffer_copy(argument).count}
    text = tasks().task_fields(name.encode(), argument)
    assert text, f"say in tasks.cpp which sizes {name} holds"
    return json.loads(text)


@cache
def short_name(kernel: str) -> str:
    return short_names({kernel})[kernel]


@cache
def tasks() -> ctypes.CDLL:
    source, headers = standin.HERE / "tasks.cpp", [*standin.CSRC.rglob("*.h")]
    command = [standin.COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", str(source)]
    target = standin.BUILD / f"tasks-{standin.hash_of([source, *headers], *command)}" / "libtasks.so"
    library = ctypes.CDLL(str(standin.make(target, command)))
    library.task_fields.restype = ctypes.c_char_p
    return library


# ---- the operators ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., Any]]:
    """Calls a function of observe.py in a process that records."""
    process = standin.Process(str(standin.runtime()), str(standin.backend()))
    process.call("tests.device.observe:start")
    yield lambda function, **arguments: process.call(f"tests.device.observe:{function}", **arguments)
    process.close()


@pytest.fixture(scope="module")
def bounds() -> dict[str, int]:
    """Threads that a block of each kernel may have, by __launch_bounds__."""
    return {kernel: threads for (kernel, _), threads in largest_blocks(CUDA_LIBRARY).items()}


@pytest.fixture(scope="module")
def lora(call, bounds) -> Observe:
    """lora_linear, in which nothing may be wrong."""

    def run(**arguments) -> dict:
        sizes = {"rows": 100, "features": 200, "out_features": 300, "rank": 16, "gradients": ALL_GRADIENTS} | arguments
        seen = call("observe_lora", **sizes)
        assert faults(seen, bounds) == []
        check_results(seen, **sizes)
        check_sizes(seen, **sizes)
        return seen

    return run


def check_results(seen, *, rows, features, out_features, rank, dtype="bfloat16", factor_dtype=None, gradients, **_):
    """Results have their shapes, dtypes and device."""
    shapes = {
        "y": ([rows, out_features], dtype),
        "x": ([rows, features], dtype),
        "weight": ([out_features, features], dtype),
        "bias": ([out_features], dtype),
        "lora_a": ([rank, features], factor_dtype or dtype),
        "lora_b": ([out_features, rank], factor_dtype or dtype),
    }
    wanted = [[*shapes[name], f"cuda:{seen['device']}"] for name in ("y", *gradients.split())]
    assert seen["results"] == wanted


def check_sizes(seen, *, rows, features, out_features, rank, factor_dtype=None, **_):
    """Kernels are told the sizes of the problem, all 64 bits of them."""
    for launch in launches(seen):
        kernel = short_name(launch["kernel"])
        if kernel.startswith("lora::sm90::"):
            continue
        task = fields(launch)
        if "shrink" in kernel:
            assert (task["rows"], task["rank"]) == (rows, rank) and task["depth"] in (features, out_features)
        elif "expand" in kernel:
            assert (task["rows"], task["rank"]) == (rows, rank) and task["columns"] in (features, out_features)
        elif "gradient" in kernel:
            assert (task["rows"], task["rank"]) == (rows, rank) and task["features"] in (features, out_features)
        elif "factor_operand" in kernel:
            assert {task["lines"], task["columns"]} <= {features, out_features, rank}
        elif "operand" in kernel:
            assert (task["rows"], task["stride"]) == (rows, -(-rank // 8) * 8)
        elif "gemm" in kernel:
            first, second = task["depth0"], task["depth1"]
            base, low_rank = (second, first) if task["adapter0"] else (first, second)
            ranks = 3 * -(-rank // 8) * 8 if factor_dtype == "float32" else rank
            assert task["rows"] == rows and low_rank == ranks and task["count"] == 2
            assert (base, task["columns"]) in ((features, out_features), (out_features, features))
            assert task["adapter0"] + task["adapter1"] == 1 and task["masked"] == task["adapter0"]


DTYPES = [
    ("float32", None),
    ("bfloat16", None),
    ("float16", None),
    ("bfloat16", "float32"),
    ("float16", "float32"),
]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES)
def test_launches_are_legal_on_every_gpu_and_dtype(lora, gpu, dtype, factor_dtype):
    for rank in (1, 8, 16, 17, 64, 65, 128, 200):
        for dropout_p in (0.0, 0.5):
            seen = lora(gpu=gpu, dtype=dtype, factor_dtype=factor_dtype, rank=rank, dropout_p=dropout_p)
            kernels = " ".join(short_name(launch["kernel"]) for launch in launches(seen))
            assert all(name in kernels for name in ("shrink", "expand", "gradient"))


HALVES = [("bfloat16", None), ("float16", None), ("bfloat16", "float32")]


def kernels_of(seen: dict) -> list[str]:
    """The names of what was launched, without options."""
    return [re.sub(r"<.*|.*::", "", short_name(launch["kernel"]).partition("<")[0]) for launch in launches(seen)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("dtype", "factor_dtype"), HALVES)
def test_a_forced_gemm_takes_the_place_of_both_up_projections(lora, gpu, dtype, factor_dtype):
    for rank in (1, 8, 17, 200):
        for dropout_p in (0.0, 0.5):
            seen = lora(
                gpu=gpu, dtype=dtype, factor_dtype=factor_dtype, rank=rank, dropout_p=dropout_p, forced="gemm_sm80"
            )
            kernels = kernels_of(seen)
            assert kernels.count("gemm") == kernels.count("operand") == 2 and "expand" not in kernels
            assert kernels.count("factor_operand") == (2 if factor_dtype else 0)


@pytest.mark.parametrize(("dtype", "factor_dtype"), HALVES)
def test_hopper_takes_its_gemm_where_nothing_must_be_copied(lora, dtype, factor_dtype):
    sizes = {"gpu": "H100", "features": 256, "out_features": 512, "dtype": dtype, "factor_dtype": factor_dtype}
    for dropout_p in (0.0, 0.5):
        # lora_b of rank 9 would be copied, lora_a not.
        for options, taken in (({}, 2), ({"forced": "vendor"}, 0), ({"rank": 9}, 1), ({"layout": "unaligned"}, 0)):
            seen = lora(**sizes | {"dropout_p": dropout_p} | options)
            names = [short_name(launch["kernel"]) for launch in launches(seen)]
            assert sum(name.startswith("lora::sm90::gemm") for name in names) == taken
            assert kernels_of(seen).count("expand") == 2 - taken


def test_a_forced_gemm_is_legal_for_every_layout(lora):
    for layout in ("contiguous", "sliced", "unaligned", "transposed", "expanded"):
        for rows, features, rank in ((1, 193, 9), (3000, 192, 16)):
            lora(rows=rows, features=features, rank=rank, layout=layout, dropout_p=0.5, forced="gemm_sm80")
    for size in (INT32 - 1, INT32 + 1, MANY):
        for axis in ("rows", "features", "out_features"):
            lora(**({"rows": 3, "features": 24, "out_features": 16, "rank": 8, "forced": "gemm_sm80"} | {axis: size}))


@pytest.mark.parametrize(("dtype", "factor_dtype"), [case for case in DTYPES if case not in HALVES])
def test_a_plan_that_cannot_be_run_is_not_forced(lora, dtype, factor_dtype):
    kernels = kernels_of(lora(dtype=dtype, factor_dtype=factor_dtype, forced="gemm_sm80"))
    assert "gemm" not in kernels and kernels.count("expand") == 2


def test_the_vendor_is_a_plan_and_an_unknown_one_is_an_error(lora):
    assert "gemm" not in kernels_of(lora(forced="vendor"))
    message = r"lora_linear: PEFTOPS_FORCE_PLAN is 'cutlass', but must be one of vendor, gemm_sm80, gemm_sm90"
    with pytest.raises(standin.Failed, match=message):
        lora(forced="cutlass")


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("device", [0, 1])
def test_launches_go_to_the_tensors_device_and_its_stream(lora, call, bounds, device, current):
    assert launches(lora(device=device, current=current, tensor_scale=True, dropout_p=0.1))
    seen = call("observe_lora_dropout_mask", rows=100, features=77, device=device, current=current)
    assert faults(seen, bounds) == [] and len(launches(seen)) == 1


def test_shared_memory_is_opted_in_on_each_device(lora):
    """More than 48 KiB, on one device after the other."""
    for fresh, device in ((True, 0), (False, 1), (False, 0)):
        seen = lora(dtype="float32", rank=64, device=device, fresh=fresh)
        assert any(launch["shared_memory"] > 48 * 1024 for launch in launches(seen))


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "unaligned", "transposed", "expanded"])
@pytest.mark.parametrize("gradients", ["", "x", "lora_a", "lora_b", "lora_a lora_b", "x lora_b", "weight bias"])
def test_launches_are_legal_for_every_layout_and_set_of_gradients(lora, layout, gradients):
    for rows in (1, 3000):
        for dropout_p in (0.0, 0.5):
            lora(rows=rows, features=193, rank=9, layout=layout, gradients=gradients, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("gradients", ["", ALL_GRADIENTS])
def test_nothing_is_launched_for_no_tokens(lora, gradients, dropout_p):
    assert launches(lora(rows=0, gradients=gradients, dropout_p=dropout_p)) == []


@pytest.mark.parametrize("gradients", ["", ALL_GRADIENTS])
def test_nothing_is_launched_for_rank_0_without_a_mask_to_draw(lora, gradients):
    assert launches(lora(rank=0, gradients=gradients)) == []
    lora(rank=0, gradients=gradients, dropout_p=0.5)


def test_nothing_is_launched_for_an_empty_result(lora):
    assert launches(lora(out_features=0, gradients="")) == []


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("gradients", ["", ALL_GRADIENTS])
@pytest.mark.parametrize("empty", [{"features": 0}, {"out_features": 0}, {"features": 0, "out_features": 0}])
def test_launches_for_an_empty_contraction_are_legal(lora, empty, gradients, dropout_p):
    """A sum over nothing is zero, which times an infinity is NaN: there is something to compute."""
    lora(**empty, gradients=gradients, dropout_p=dropout_p)


@pytest.mark.parametrize(("rows", "features"), [(0, 8), (8, 0), (3, 77), (MANY, 1), (1, MANY), (65537, 65537)])
def test_a_mask_of_any_size_is_one_launch_or_none(call, bounds, rows, features):
    seen = call("observe_lora_dropout_mask", rows=rows, features=features)
    assert faults(seen, bounds) == [] and seen["results"] == [[[rows, features], "bool", "cuda:0"]]
    wanted = [{"rows": rows, "columns": features}] if rows and features else []
    assert [fields(launch) for launch in launches(seen)] == wanted


LARGE = [INT32 - 1, INT32, INT32 + 1, MANY, 2 * INT32, 2 * INT32 + 5]


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("axis", ["rows", "features", "out_features"])
def test_sizes_beyond_32_bits_are_covered(lora, axis, size):
    for dtype in ("bfloat16", "float32"):
        lora(
            **({"rows": 3, "features": 24, "out_features": 16, "rank": 8, "dtype": dtype} | {axis: size}),
            dropout_p=0.25,
        )


@pytest.mark.parametrize("size", LARGE)
def test_elements_beyond_32_bits_are_covered(lora, size):
    """Each size fits 32 bits, their product does not."""
    lora(rows=-(-size // 4096), features=4096, out_features=16, rank=8)
    lora(rows=-(-size // 4096), features=16, out_features=4096, rank=8)
    lora(rows=7, features=65536, out_features=-(-size // 65536), rank=32769)


sizes = st.integers(1, 400) | st.sampled_from([4096, 65535 * 64 + 1, INT32 - 1, INT32, INT32 + 1, MANY])


@given(
    rows=sizes,
    features=sizes,
    out_features=sizes,
    rank=st.integers(1, 300),
    dtype=st.integers(0, len(DTYPES) - 1),
    dropout_p=st.sampled_from([0.0, 0.5]),
    gpu=st.sampled_from(sorted(GPUS)),
)
def test_any_problem_is_covered(lora, rows, features, out_features, rank, dtype, dropout_p, gpu):
    if max(rows, features) * max(features, out_features) < 2**42:  # what address space holds
        kind, factor_dtype = DTYPES[dtype]
        lora(
            rows=rows,
            features=features,
            out_features=out_features,
            rank=rank,
            dtype=kind,
            factor_dtype=factor_dtype,
            dropout_p=dropout_p,
            gpu=gpu,
        )


# ---- planted faults --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(call) -> Callable[..., list[str]]:
    """What the rules say of a launcher of faults.cu."""
    source = standin.HERE / "faults.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-cudart", "shared", "-Xcompiler", "-fPIC", "-shared", str(source)]
    target = standin.BUILD / f"faults-{standin.hash_of([source], *command)}" / "libfaults.so"
    library = standin.make(target, command)
    own = {kernel: threads for (kernel, _), threads in largest_blocks(library).items()}

    def run(name: str, count: int = 1000, how: str = "<<<>>>", **where) -> list[str]:
        seen = call("observe_launcher", library=str(library), name=name, count=count, **where)
        if count == 0 and launches(seen):
            return ["launches for empty input"]
        assert [launch["name"] for launch in launches(seen)] == ([how] if count else [])
        wrong = [f"told {fields(launch)['count']}" for launch in launches(seen) if fields(launch)["count"] != count]
        return faults(seen, own) + wrong

    return run


@pytest.mark.parametrize(("name", "how"), [("clean", "<<<>>>"), ("clean_exc", "cudaLaunchKernelExC")])
def test_the_clean_launchers_pass(planted, name, how):
    for device in (0, 1):
        for count in (0, 1, 256, 257, INT32 - 1, INT32, INT32 + 1, MANY):
            assert planted(name, count, how, device=device) == []


FAULTS = {
    "launch_for_empty_input": ({"count": 0}, "launches for empty input"),
    "grid_of_zero": ({}, "has a grid of [0, 1, 1]"),
    "legacy_stream": ({}, "goes to stream 0x0"),
    "stream_of_another_device": ({}, "goes to stream 0x99"),
    "no_guard": ({"device": 1}, "goes to device 0, but the tensors are on 1"),
    "device_left": ({"device": 1}, "device 1 is current afterwards"),
    "wrapped_count": ({"count": MANY}, "has a grid of [4289908831, 1, 1]"),
    "wrapped_unsigned_count": ({"count": 2 * INT32 + 5}, "1 blocks of 256 for 4294967301 elements"),
    "narrowed_argument": ({"count": 2 * INT32 + 5}, "told 5"),
    "no_opt_in": ({}, "is refused with error 1"),
    "too_much_shared_memory": ({"gpu": "RTX 3090"}, "wants 163840 bytes of shared memory"),
    "too_many_threads": ({}, "has 512 threads, but is compiled for 256"),
    "hidden_allocation": ({}, "cudaMalloc within an operator"),
    "hidden_wait": ({}, "cudaStreamSynchronize within an operator"),
    "hidden_copy": ({}, "cudaMemcpyAsync within an operator"),
    "hidden_fill": ({}, "cudaMemsetAsync within an operator"),
    "occupancy_asked": ({}, "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags within an operator"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(planted, name):
    options, text = FAULTS[name]
    assert text in "; ".join(planted(name, **options))


def test_an_opt_in_kept_per_process_is_noticed_on_the_second_device(planted):
    assert planted("opt_in_cached", device=0) == []
    assert "on device 1 is refused with error 1" in "; ".join(planted("opt_in_cached", device=1, fresh=False))
