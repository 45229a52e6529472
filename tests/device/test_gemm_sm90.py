"""The GEMM for sm_90a without a GPU: launches as they are recorded, tensor maps, and the places of keep-bits."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C

from tests.build.conftest import BUILD
from tests.build.kernels import largest_blocks
from tests.device import standin
from tests.device.recording import ALLOWED, GPUS, LAUNCHES, STREAM, tensor_maps
from tests.device.test_launches import short_name

CLUSTER, STAGE_DEPTH, BYTES = 2, _C.lora_depth_tile, 2
# Of CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapFloatOOBfill. TMA does not look at operands.
OPERAND, RESULT = 1, {"bfloat16": 9, "float16": 6}
LINE_OF_128_BYTES, ZEROS = 3, 0
MAPS = 128  # bytes of a tensor map
SEGMENTS = 4


class Depth(ctypes.Structure):
    """What follows the tensor maps of X and W in the kernel's struct."""

    _fields_ = [
        ("count", ctypes.c_int32),
        ("tiles", ctypes.c_int32 * SEGMENTS),
        ("last_blocks", ctypes.c_int32 * SEGMENTS),
        ("total", ctypes.c_int32),
        ("adapter", ctypes.c_bool * SEGMENTS),
        ("awaiting", ctypes.c_int32),
        ("scale", ctypes.c_float),
    ]


# ---- launches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Path:
    """The built kernels with an operator of their own."""
    objects = [
        BUILD / "CMakeFiles/peftops_cuda.dir/csrc/lora" / f"gemm_sm90_{name}.cu.o" for name in ("bfloat16", "float16")
    ]
    torch = Path(find_spec("torch").origin).parent
    flags = [
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DTORCH_STABLE_ONLY",
    ]
    flags += ["-DUSE_CUDA", "-isystem", str(torch / "include"), *standin.cuda_includes()]
    source = standin.HERE / "gemm_sm90.cpp"
    key = standin.hash_of([source, *objects, *standin.CSRC.rglob("*.h")], standin.COMPILER, *flags)
    command = [standin.COMPILER, *flags, str(source), *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    return standin.make(standin.BUILD / f"gemm-{key}" / "libgemm_sm90.so", command)


@pytest.fixture(scope="module")
def call() -> Iterator[Callable[..., dict]]:
    process = standin.Process(str(standin.runtime()), str(standin.backend()))
    process.call("tests.device.observe:start")
    yield lambda **arguments: process.call("tests.device.observe:observe_gemm_sm90", **arguments)
    process.close()


@pytest.fixture(scope="module")
def threads(library) -> dict[str, int]:
    """Threads that a block of each kernel may have."""
    return {kernel: threads for (kernel, _), threads in largest_blocks(library).items()}


@pytest.fixture(scope="module")
def gemm(call, library, threads) -> Callable[..., dict]:
    """A launch in which nothing may be wrong."""

    def run(**arguments) -> dict:
        sizes = {"rows": 300, "columns": 520, "depths": [200, 16]} | arguments
        seen = call(library=str(library), **sizes)
        (launch,) = [call for call in seen["calls"] if call["name"] in LAUNCHES]
        check_launch(seen, launch, threads, **sizes)
        check_matrices(seen, launch, **sizes)
        return launch

    return run


def plan_of(rows, columns, candidate=-1, gpu="H100"):
    gpu = GPUS[gpu]
    device = _C.Device(sm=gpu.sm, sm_count=gpu.sm_count, shared_memory=gpu.shared_memory)
    return (
        _C.lora_plan_gemm_sm90(rows, columns, device)
        if candidate < 0
        else _C.lora_plan_gemm_sm90(candidate, rows, columns)
    )


def check_launch(
    seen, launch, threads, *, rows, columns, dtype="bfloat16", down=False, candidate=-1, programmatic=False, **_
):
    """It is what the plan says, and legal."""
    assert all(call["name"] in ALLOWED and call["status"] == 0 for call in seen["calls"]), seen["calls"]
    assert seen["current_after"] == seen["current"]
    plan = plan_of(rows, columns, candidate)
    kernel = f"lora::sm90::gemm<{dtype},{str(down).lower()},{plan.candidate}>"
    assert short_name(launch["kernel"]) == kernel
    assert (launch["device"], launch["stream"]) == (seen["device"], STREAM)
    assert launch["block"] == [threads[launch["kernel"]], 1, 1]
    assert launch["shared_memory"] == _C.lora_sm90_tiles[plan.candidate].shared_memory <= GPUS["H100"].shared_memory
    assert launch["cluster"] == [CLUSTER, 1, 1]
    assert launch["programmatic"] == programmatic
    # Blocks stay and take one tile after the other: as many as the device runs at a time, or as there are tiles.
    x, y, z = launch["grid"]
    assert x * y * z == min(plan.row_tiles * plan.column_tiles, GPUS["H100"].sm_count)


def check_matrices(
    seen,
    launch,
    *,
    rows,
    columns,
    depths,
    dtype="bfloat16",
    down=False,
    adapters=0,
    padding=0,
    scale=1.0,
    candidate=-1,
    **_,
):
    """Tensor maps show the matrices and nothing else; each stage gets the bytes that its barrier waits for."""
    argument = bytes.fromhex(launch["argument"])
    maps = tensor_maps(argument)
    start, count = maps[0][0], len(depths)
    at = dict(maps)
    tile = _C.lora_sm90_tiles[plan_of(rows, columns, candidate).candidate]
    d, *operands = seen["matrices"]
    # D's map, the last one, is the epilogue's.
    assert len(maps) == 2 * count + 1
    x = [at[start + MAPS * j] for j in range(count)]
    w = [at[start + MAPS * (SEGMENTS + j)] for j in range(count)]
    lines = columns if down else None
    for j, depth in enumerate(depths):
        check_map(x[j], operands[j], rows, depth, padding)
        check_map(w[j], operands[count + j], depth if down else columns, lines or depth, padding)
        assert list(x[j].box) == [STAGE_DEPTH, tile.rows, 1, 0, 0]
        assert [(found.type, found.swizzle) for found in (x[j], w[j])] == [(OPERAND, LINE_OF_128_BYTES)] * 2
        # Each block of a cluster loads half of W's tile, in boxes of one line of 128 bytes each.
        assert list(w[j].box)[:3] == [64, STAGE_DEPTH // CLUSTER if down else tile.columns // CLUSTER, 1]
    assert maps[-1][1].type == RESULT[dtype]
    check_map(maps[-1][1], d, rows, columns, padding)

    found = Depth.from_buffer_copy(argument, start + MAPS * 2 * SEGMENTS)
    wanted = _C.lora_depth_tiles(
        _C.LoraGemmTask([_C.LoraSegment(x_stride=k, w_stride=k, depth=k) for k in depths], rows, columns, d_stride=8)
    )
    assert (found.count, found.total) == (count, wanted.total)
    assert (list(found.tiles)[:count], list(found.last_blocks)[:count]) == (wanted.tiles, wanted.last_blocks)
    assert list(found.adapter) == [bool(adapters >> j & 1) for j in range(SEGMENTS)]
    first = [j for j in range(count) if adapters >> j & 1]
    assert found.awaiting == (first[0] if first else 0)
    assert found.scale == scale


def check_map(found, matrix, rows, columns, padding):
    """Exactly rows x columns, so that what lies beyond is read as zeros, and within the matrix's memory."""
    address, size = matrix
    stride = columns + padding if rows > 1 else -(-columns // 8) * 8
    assert (found.rank, found.fill) == (3, ZEROS)
    assert found.address == address
    assert list(found.sizes)[:3] == [columns, rows, 1]
    assert found.strides[0] == BYTES * stride
    assert BYTES * ((rows - 1) * stride + columns) == size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("candidate", [0, 1])
def test_every_kernel_is_launched(gemm, dtype, down, candidate):
    gemm(dtype=dtype, down=down, candidate=candidate)
    gemm(
        dtype=dtype,
        down=down,
        candidate=candidate,
        programmatic=True,
        adapters=2,
        options="bias column_scale device_scale",
    )


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("rank", [8, 16, 24, 64, 128, 1000])
def test_any_rank_is_a_segment(gemm, rank, down):
    gemm(depths=[4096, rank], down=down, adapters=2)
    gemm(depths=[rank, 4096], down=down, adapters=1, options="mask" if down else "")


def test_a_rank_that_is_no_whole_chunk_lies_in_rows_of_whole_chunks(gemm):
    gemm(depths=[4, 100], columns=100, padding=4)
    gemm(depths=[512, 100, 7], down=True, rows=1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_to_four_segments(gemm, count):
    for adapters in range(1 << count):
        gemm(depths=[64, 200, 16, 72][:count], adapters=adapters, programmatic=True)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 127, 128, 129, 257, 8191])
def test_ragged_rows_and_columns(gemm, rows):
    for columns in (8, 120, 128, 136, 256, 264, 4096):
        for down in (False, True):
            gemm(rows=rows, columns=columns, down=down, padding=8)


def test_scales_and_devices(gemm):
    gemm(scale=0.0, adapters=2)
    gemm(scale=0.25, adapters=2, options="device_scale", device=1, current=0)


@pytest.mark.parametrize("size", [2**24, 2**31 - 2048])
def test_elements_beyond_32_bits(gemm, size):
    gemm(rows=size, columns=256, depths=[512, 16])
    gemm(rows=512, columns=size, depths=[256, 16])
    gemm(rows=8, columns=8, depths=[size, 16])
    gemm(rows=size, columns=256, depths=[16, 512], down=True, options="mask", adapters=1)


depths = st.integers(1, 600).map(lambda units: 8 * units) | st.sampled_from([4096, 11008])


@given(
    rows=st.integers(1, 20_000),
    columns=st.integers(1, 3000).map(lambda units: 8 * units),
    lengths=st.lists(depths, min_size=1, max_size=4),
    padding=st.sampled_from([0, 8, 64]),
    down=st.booleans(),
    candidate=st.sampled_from([-1, 0, 1]),
    programmatic=st.booleans(),
)
def test_any_problem_is_launched(gemm, rows, columns, lengths, padding, down, candidate, programmatic):
    gemm(
        rows=rows,
        columns=columns,
        depths=lengths,
        padding=padding,
        down=down,
        candidate=candidate,
        programmatic=programmatic,
    )


def test_a_shape_that_tma_cannot_take_is_refused(call, library):
    for wrong in (
        {"options": "unaligned"},
        {"depths": [200, 100]},
        {"columns": 521},
        {"gpu": "A100"},
        {"options": "mask"},
    ):
        with pytest.raises(standin.Failed, match="refused: "):
            call(library=str(library), **({"rows": 300, "columns": 520, "depths": [200, 16]} | wrong))


def test_a_driver_without_tensor_maps_is_an_error(call, library):
    with pytest.raises(standin.Failed, match="makes no tensor maps"):
        call(library=str(library), rows=300, columns=520, depths=[200, 16], old_driver=True)


# ---- keep-bits -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragments() -> Path:
    return standin.program(standin.HERE / "gemm_fragments.cpp")


@pytest.mark.parametrize(
    ("rows", "columns", "stride", "behind"),
    [
        (128, 256, 32, 0),
        (256, 512, 64, 0),
        (200, 520, 65, 0),  # rows that start on any byte
        (200, 520, 68, 0),
        (200, 520, 68, 3),
        (130, 8, 1, 0),
        (129, 264, 33, 1),
        (1, 1000, 125, 0),
        (300, 96, 12, 0),
    ],
)
def test_each_accumulator_has_its_keep_bit(fragments, rows, columns, stride, behind):
    """Where CUTLASS says that it lies, for both tiles; memory ends behind the mask."""
    command = [fragments, *map(str, (rows, columns, stride, behind))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


# ---- boxes -----------------------------------------------------------------------------------------------------------


def test_both_blocks_of_a_cluster_fill_the_tile_of_w():
    """The boxes that each loads for both, as TMA swizzles them into shared memory, are what CUTLASS reads there."""
    program = standin.program(standin.HERE / "gemm_boxes.cpp")
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == ""
