"""The emulator for CUDA kernels: its warp-wide instructions against the PTX ISA, and the faults that it must notice."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.device import recording, standin

WARP = 32
NO_ERROR = ""
SEEDS = range(8)


class Task(ctypes.Structure):
    """The struct that every kernel of emulated_faults.cu takes."""

    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("planted", ctypes.c_int),
    ]


class Outcome(NamedTuple):
    error: str
    out: np.ndarray
    calls: list[recording.Call]


# ---- in the process of the emulator, which has no torch and no other CUDA runtime ------------------------------------


def _start(runtime: Path, kernels: Path) -> None:
    global _runtime, _kernels
    _runtime = recording.Runtime(ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL))
    _kernels = ctypes.CDLL(str(kernels))
    _kernels.emulated_memory.restype = ctypes.c_void_p
    _kernels.emulated_memory.argtypes = [ctypes.c_size_t]


def _memory(array: np.ndarray | None) -> np.ndarray | None:
    """A copy that ends where memory ends."""
    if array is None:
        return None
    address = _kernels.emulated_memory(array.nbytes)
    copy = np.frombuffer((ctypes.c_ubyte * array.nbytes).from_address(address), dtype=array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def _run(name, a, out, b, count, planted, grid, block, shared_memory, seed) -> Outcome:
    a, b, out = _memory(a), _memory(b), _memory(out)
    task = Task(*(None if array is None else array.ctypes.data for array in (a, b, out)), count, planted)
    sizes = [(ctypes.c_uint * 3)(*(list(size) + [1, 1])[:3]) for size in (grid, block)]
    _runtime.set_seed(seed)
    with _runtime.recorded() as calls:
        status = _kernels.emulated_launch(name.encode(), *sizes, ctypes.c_size_t(shared_memory), ctypes.byref(task))
    assert status >= 0, f"no kernel {name}"
    return Outcome(_runtime.error_text(status) if status else NO_ERROR, out.copy(), calls)


# ---- in the process of the test --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch() -> Iterator[Callable[..., Outcome]]:
    kernels = standin.emulated_library(
        "libemulated_faults.so",
        [standin.HERE / "emulated_faults.cu"],
        [*standin.CSRC.glob("common/*"), standin.HERE / "prelude.h"],
    )
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_start, initargs=(standin.runtime(), kernels)
    ) as pool:

        def run(name, a, out, *, b=None, count=0, planted=0, grid=(1,), block=(WARP,), shared_memory=0, seed=0):
            return pool.submit(_run, name, a, out, b, count, planted, grid, block, shared_memory, seed).result(
                timeout=120
            )

        yield run


def lanes() -> list[tuple[int, int]]:
    """(groupID, threadID_in_group) of each lane, as the PTX ISA calls them."""
    return [(lane >> 2, lane % 4) for lane in range(WARP)]


def halves(registers: np.ndarray) -> np.ndarray:
    """The 16-bit elements of 32-bit registers, low half first."""
    return registers.view(np.uint16).reshape(*registers.shape[:-1], -1)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_the_elements_that_the_isa_says(launch, transposed):
    """PTX ISA, ldmatrix: of each 8x8 matrix, lane l holds row l / 4, elements 2 (l % 4) and the next; .trans: of the
    transposed. Lanes 8 m to 8 m + 7 give the addresses of the rows of matrix m. Every element has its own value, and
    the rows lie in random places."""
    random = np.random.default_rng(7)
    rows = random.permutation(64)[:WARP]
    elements = random.permutation(2**16)[: 64 * 8].astype(np.uint16)
    ran = launch(
        "load_trans" if transposed else "load",
        elements,
        np.zeros((WARP, 4), np.uint32),
        b=8 * rows.astype(np.int64),
        count=elements.size,
        shared_memory=elements.nbytes,
    )
    assert ran.error == NO_ERROR
    matrices = elements.reshape(64, 8)[rows].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    wanted = [[matrices[m, g, 2 * t + e] for m in range(4) for e in range(2)] for g, t in lanes()]
    np.testing.assert_array_equal(halves(ran.out), wanted)


def a_places() -> np.ndarray:
    """(row, column) of elements a0 to a7 of each lane: PTX ISA, "Matrix fragments for mma.m16n8k16", 16-bit types."""
    return np.array(
        [
            [(g if i < 2 or 4 <= i < 6 else g + 8, 2 * t + (i & 1) + (0 if i < 4 else 8)) for i in range(8)]
            for g, t in lanes()
        ]
    )


def b_places() -> np.ndarray:
    return np.array([[(2 * t + (i & 1) + (0 if i < 2 else 8), g) for i in range(4)] for g, t in lanes()])


def d_places() -> np.ndarray:
    return np.array([[(g if i < 2 else g + 8, 2 * t + (i & 1)) for i in range(4)] for g, t in lanes()])


def fragments(matrices: np.ndarray, places: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrices[..., places[..., 0], places[..., 1]])


def bits(values: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns of values that the type holds exactly."""
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def products(launch, kind: str, a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """d + a b of many matrices by the emulated instruction, one block each."""
    out = fragments(d.astype(np.float32), d_places())
    ran = launch(
        f"multiply_{kind}",
        bits(fragments(a, a_places()), kind),
        out,
        b=bits(fragments(b, b_places()), kind),
        grid=(len(a),),
    )
    assert ran.error == NO_ERROR
    result = np.full((len(a), 16, 8), np.nan, np.float32)
    result[:, d_places()[..., 0], d_places()[..., 1]] = ran.out
    return result


def test_the_fragments_of_the_isa_hold_each_element_once():
    for places, shape in ((a_places(), (16, 16)), (b_places(), (16, 8)), (d_places(), (16, 8))):
        assert sorted(map(tuple, places.reshape(-1, 2))) == [(i, j) for i in range(shape[0]) for j in range(shape[1])]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mma_takes_each_element_from_its_place(launch, kind):
    """Each of A's 256 and of B's 128 places in turn holds the only 1, the other matrix small integers."""
    random = np.random.default_rng(11)
    a, b = np.zeros((384, 16, 16)), np.zeros((384, 16, 8))
    a[:256].reshape(256, 256)[np.arange(256), np.arange(256)] = 1
    b[:256] = random.integers(-99, 99, (16, 8))
    a[256:] = random.integers(-99, 99, (16, 16))
    b[256:].reshape(128, 128)[np.arange(128), np.arange(128)] = 1
    d = random.integers(-99, 99, (384, 16, 8)).astype(float)
    np.testing.assert_array_equal(products(launch, kind, a, b, d), d + a @ b)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mma_is_a_matrix_product_with_float32_sums_in_order(launch, kind):
    """On random values with all the bits that the type has: the bits of sums made one k after another in float32."""
    random = np.random.default_rng(13)
    mantissa = 11 if kind == "float16" else 8
    a, b = (
        random.integers(1 - 2**mantissa, 2**mantissa, size) * 2.0 ** random.integers(-6, 4, size)
        for size in ((32, 16, 16), (32, 16, 8))
    )
    d = random.standard_normal((32, 16, 8)).astype(np.float32)
    wanted = d.copy()
    for k in range(16):
        wanted += (a[:, :, k, None] * b[:, k, None, :]).astype(np.float32)
    np.testing.assert_array_equal(products(launch, kind, a, b, d), wanted)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_mma_keeps_special_values(launch, kind):
    """NaN, infinities and the smallest subnormal of the type pass, 0 times infinity is NaN."""
    smallest = 2.0**-24 if kind == "float16" else 2.0**-133
    a, b = np.zeros((5, 16, 16)), np.zeros((5, 16, 8))
    a[:, 3, 5] = [np.nan, np.inf, -np.inf, np.inf, smallest]
    b[:, 5, 2] = [1, 1, 1, 0, 1]
    with np.errstate(invalid="ignore"):
        wanted = (a @ b).astype(np.float32)
    np.testing.assert_array_equal(products(launch, kind, a, b, np.zeros((5, 16, 8))), wanted)
    assert np.isnan(wanted[3]).any() and wanted[4, 3, 2] == np.float32(smallest)


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 8, 16, 31])
def test_a_shuffle_gives_the_value_of_the_lane_across(launch, distance):
    values = np.arange(96, dtype=np.float32)
    ran = launch("exchange", values, np.zeros_like(values), count=distance, block=(96,))
    assert ran.error == NO_ERROR
    np.testing.assert_array_equal(ran.out, np.arange(96) ^ distance)


def test_every_thread_has_its_own_indices(launch):
    grid, block = (3, 4, 2), (5, 3, 7)
    out = np.full((*reversed(grid), *reversed(block), 7), -1, np.int64)
    ran = launch("indices", np.zeros(1), out, grid=grid, block=block)
    assert ran.error == NO_ERROR
    for axis, index in enumerate((2, 1, 0, 5, 4, 3)):
        shape = [1] * 6
        shape[index] = -1
        wanted = np.broadcast_to(np.arange(out.shape[index]).reshape(shape), out.shape[:6])
        np.testing.assert_array_equal(ran.out[..., axis], wanted)
    assert (ran.out[..., 6] == 5 * 3 * 7).all()


def test_a_seed_gives_an_order_of_blocks_and_another_seed_another(launch):
    orders = [
        launch("order", np.zeros(1, np.int64), np.zeros(50, np.int64), grid=(50,), seed=seed).out.tolist()
        for seed in (1, 1, 2)
    ]
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[1] != orders[2]


# ---- faults: each kernel is right without its fault under every seed, and noticed with it ----------------------------

VALUES = np.random.default_rng(3).permutation(256).astype(np.float32)  # sums of them are exact
FIRST, SECOND = VALUES[:128], VALUES[128:]
THREADS, SHARED = 128, 128 * 4


class Fault(NamedTuple):
    """A kernel and how it is launched, what it makes of VALUES without its fault, and what is said of it with it."""

    kernel: str
    says: str = ""
    count: int = 0
    wanted: np.ndarray = FIRST


RACES = {
    "with the next warp": Fault("missing_barrier", count=32, wanted=np.roll(FIRST, -32)),
    "with the first warp": Fault("missing_barrier", count=-1, wanted=np.tile(FIRST[:32], 4)),
    "with the next lane": Fault("missing_barrier", count=1, wanted=np.roll(FIRST, -1)),
    "with the first lane of its warp": Fault("missing_barrier", count=0, wanted=np.repeat(FIRST[::32], 32)),
    "with the next round": Fault(
        "missing_second_barrier", wanted=np.concatenate([np.roll(FIRST, -32), np.roll(SECOND, -32)])
    ),
    "in turns": Fault("shared_scratch"),
    "far ahead": Fault("overwritten_tile", wanted=np.roll(FIRST, -32) + np.roll(SECOND, -32)),
}
REPORTED = [
    Fault("read_past_shared_memory", "read or write past its 512 bytes of shared memory"),
    Fault("write_past_the_output", "nobody's memory", count=96, wanted=FIRST[:96]),
    Fault("write_through_null", "nobody's memory"),
    Fault("divergent_barrier", "waits at __syncthreads"),
    Fault("return_before_barrier", "has returned"),
    Fault("divergent_shuffle", "waits at __shfl_xor_sync"),
    Fault("different_collectives", "all threads of a warp must come to the same place"),
    Fault("partial_mask", "a mask that leaves lanes out"),
    Fault("misaligned_matrix_row", "lane 9 is not a multiple of 16"),
    Fault("matrix_row_elsewhere", "is not in shared memory"),
    Fault("misaligned_load", "a misaligned access"),
    Fault("overflowing_offset", "an integer overflow", count=2**25),
    Fault("division_by_zero", "a division by zero"),
]
LOST_COPIES = {
    "without a wait": 1,
    "without a barrier": 2,
    "without a group": 3,
}
OTHERS = [Fault("uninitialised_shared_memory"), Fault("write_past_shared_memory")]


def run_fault(launch, fault: Fault, planted: int, seed: int = 0, **options) -> Outcome:
    arguments = {"count": fault.count, "shared_memory": SHARED, "block": (THREADS,), "seed": seed} | options
    return launch(fault.kernel, VALUES, np.zeros_like(fault.wanted), planted=planted, **arguments)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", [*RACES.values(), *REPORTED, *OTHERS], ids=lambda fault: fault.kernel)
def test_the_clean_twin_is_right_in_every_order(launch, fault, seed):
    ran = run_fault(launch, fault, 0, seed)
    assert ran.error == NO_ERROR
    np.testing.assert_array_equal(ran.out, fault.wanted)


@pytest.mark.parametrize("name", RACES)
def test_a_race_gives_other_results_under_most_seeds(launch, name):
    fault = RACES[name]
    wrong = [not np.array_equal(run_fault(launch, fault, 1, seed).out, fault.wanted) for seed in SEEDS]
    assert sum(wrong) > len(SEEDS) / 2


@pytest.mark.parametrize("fault", REPORTED, ids=lambda fault: fault.kernel)
def test_a_fault_is_reported_with_its_kernel_and_place(launch, fault):
    ran = run_fault(launch, fault, 1)
    assert fault.says in ran.error
    assert f"{fault.kernel}(Task): block (0, 0, 0)" in ran.error
    assert ran.calls[-1].status != 0 and fault.kernel in ran.calls[-1].kernel


ONE_COPY = Fault("asynchronous_copy", wanted=np.roll(FIRST, -4))
TILES_OF_COPIES = 8


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_are_there_after_a_wait_and_a_barrier(launch, seed):
    ran = run_fault(launch, ONE_COPY, 0, seed)
    assert ran.error == NO_ERROR
    np.testing.assert_array_equal(ran.out, ONE_COPY.wanted)
    ran = run_fault(launch, Fault("copy_of_nothing"), 0, seed)
    assert ran.error == NO_ERROR and (ran.out == 0).all()


@pytest.mark.parametrize("name", LOST_COPIES)
def test_a_copy_that_nobody_waited_for_is_poison(launch, name):
    wrong = [np.isnan(run_fault(launch, ONE_COPY, LOST_COPIES[name], seed).out).any() for seed in SEEDS]
    assert sum(wrong) > len(SEEDS) / 2


def pipelined(launch, planted: int, seed: int) -> np.ndarray:
    tiles = np.random.default_rng(5).permutation(TILES_OF_COPIES * THREADS).astype(np.float32)
    ran = launch(
        "pipelined_copies",
        tiles,
        np.zeros(THREADS, np.float32),
        count=TILES_OF_COPIES,
        planted=planted,
        shared_memory=3 * SHARED,
        block=(THREADS,),
        seed=seed,
    )
    assert ran.error == NO_ERROR
    return ran.out == np.roll(tiles.reshape(TILES_OF_COPIES, THREADS), -32, axis=1).sum(0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_pipeline_of_copies_is_right_in_every_order(launch, seed):
    assert pipelined(launch, 0, seed).all()


def test_a_copy_into_a_stage_that_is_still_read_is_noticed(launch):
    assert not any(pipelined(launch, 1, seed).all() for seed in SEEDS)


@pytest.mark.parametrize(
    ("planted", "says"), [(1, "not a multiple of 16"), (2, "not a multiple of 16"), (3, "not in shared memory")]
)
def test_a_copy_from_or_to_a_wrong_place_is_reported(launch, planted, says):
    ran = run_fault(launch, Fault("copy_of_nothing"), planted)
    assert f"cp.async: {'the destination is' if planted == 3 else 'an address is'} {says}" in ran.error


def test_shared_memory_that_nobody_wrote_is_nan(launch):
    ran = run_fault(launch, Fault("uninitialised_shared_memory"), 1)
    assert ran.error == NO_ERROR
    assert np.isnan(ran.out).tolist() == [i == 5 for i in range(THREADS)]


@pytest.mark.parametrize(
    ("shared_memory", "past", "text"), [(SHARED, 1, "read or write past its 512"), (508, 0, "wrote past its 508")]
)
def test_a_write_past_shared_memory_is_noticed_at_once_or_after_the_block(launch, shared_memory, past, text):
    """Shared memory begins on 128 bytes, so up to 127 bytes behind its end exist: they are looked at after a block."""
    assert text in run_fault(launch, Fault("write_past_shared_memory"), past, shared_memory=shared_memory).error


def test_a_warp_of_fewer_lanes_has_no_collectives(launch):
    assert "__shfl_xor_sync in a warp of 8 threads" in launch("exchange", VALUES, VALUES, count=1, block=(40,)).error


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shared_memory": 48 * 1024 + 1}, "cudaErrorInvalidValue"),
        ({"grid": (0, 1, 1)}, "cudaErrorInvalidConfiguration"),
        ({"grid": (1, 65536, 1)}, "cudaErrorInvalidConfiguration"),
        ({"block": (1025, 1, 1)}, "cudaErrorInvalidConfiguration"),
    ],
)
def test_what_the_runtime_refuses_does_not_run(launch, options, name):
    ran = run_fault(launch, RACES["with the next warp"], 0, **options)
    assert ran.error == name
    assert (ran.out == 0).all()


def test_a_launch_after_a_fault_is_sound(launch):
    assert run_fault(launch, Fault("write_through_null"), 1).error != NO_ERROR
    test_the_clean_twin_is_right_in_every_order(launch, RACES["with the next warp"], 0)
