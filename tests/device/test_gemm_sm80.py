"""The segmented GEMM for sm_80 under the emulator, on tasks of any kind; sums of small integers are exact."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.device import recording, standin

GPU = recording.GPUS["A100"]
MAX_SEGMENTS = 4


class _Segment(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("w", ctypes.c_void_p),
        ("w_stride", ctypes.c_int64),
        ("down", ctypes.c_bool),
        ("depth", ctypes.c_int64),
        ("adapter", ctypes.c_bool),
    ]


class _Task(ctypes.Structure):
    """GemmTask of gemm.h."""

    _fields_ = [
        ("segments", _Segment * MAX_SEGMENTS),
        ("count", ctypes.c_int),
        ("d", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("d_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("host_scale", ctypes.c_float),
        ("device_scale", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Case:
    """D [rows, columns] of segments with these depths; `adapters` are segments left out where `scale` is 0."""

    rows: int
    columns: int
    depths: tuple[int, ...]
    adapters: tuple[int, ...] = ()
    scale: float = 1.0
    bias: bool = False
    column_scale: bool = False
    masked: bool = False
    gap: int = 0  # between rows, in elements


# ---- in the process of the emulator ----------------------------------------------------------------------------------


def _start(runtime: Path, kernels: Path) -> None:
    global _runtime, _kernels
    _runtime = recording.Runtime(ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL))
    _kernels = ctypes.CDLL(str(kernels))
    _kernels.gemm_memory.restype = ctypes.c_void_p
    _kernels.gemm_memory.argtypes = [ctypes.c_size_t]
    _kernels.gemm_task_bytes.restype = ctypes.c_size_t
    if _kernels.gemm_task_bytes() != ctypes.sizeof(_Task):
        raise TypeError("gemm.h and test_gemm_sm80.py have another layout of GemmTask")
    _runtime.set_devices(GPU)


def _memory(array: np.ndarray) -> int:
    """The address of a copy that ends where memory ends."""
    address = _kernels.gemm_memory(array.nbytes)
    ctypes.memmove(address, array.ctypes.data, array.nbytes)
    return address


def _bits(values: np.ndarray, kind: str) -> np.ndarray:
    """16-bit patterns, rounded to nearest, ties to even."""
    if kind == "float16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.astype(np.float32).view(np.uint32)
    rounded = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _matrix(values: np.ndarray, kind: str, gap: int) -> tuple[int, int]:
    """Address and stride of a matrix in whole chunks: zeros to the next multiple of eight columns, NaN in the gap."""
    rows, columns = values.shape
    whole = -(-columns // 8) * 8
    memory = np.full((rows, whole + gap), np.nan)
    memory[:, :whole] = 0
    memory[:, :columns] = values
    return _memory(_bits(memory, kind).ravel()[: rows * (whole + gap) - gap]), whole + gap


def _run(kind: str, down: bool, case: Case, seed: int) -> tuple[str, np.ndarray, np.ndarray]:
    """The error, D and what it must be, as bits."""
    random = np.random.default_rng(seed)
    task = _Task(count=len(case.depths), rows=case.rows, columns=case.columns, d_stride=case.columns + case.gap)
    wanted = np.zeros((case.rows, case.columns))
    for index, depth in enumerate(case.depths):
        x, w = random.integers(-2, 3, (case.rows, depth)), random.integers(-2, 3, (case.columns, depth))
        left_out = index in case.adapters and case.scale == 0
        segment = task.segments[index]
        segment.x, segment.x_stride = _matrix(np.full(x.shape, np.nan) if left_out else x, kind, case.gap)
        segment.w, segment.w_stride = _matrix(w.T if down else w, kind, case.gap)
        segment.depth, segment.down, segment.adapter = depth, down, index in case.adapters
        product = (x @ w.T).astype(float) * (not left_out)
        if case.masked and index == 0:
            kept = random.integers(0, 2, (case.rows, -(-case.columns // 8) * 8)).astype(np.uint8)
            task.mask = _memory(np.packbits(kept, axis=1, bitorder="little"))
            task.mask_stride = kept.shape[1] // 8
            product *= kept[:, : case.columns]
        wanted += product
    if case.column_scale:
        factors = random.choice([0.5, 1.0, -2.0], case.columns).astype(np.float32)
        task.column_scale, wanted = _memory(factors), wanted * factors
    if case.bias:
        bias = random.integers(-9, 9, case.columns)
        task.bias, wanted = _memory(_bits(bias, kind)), wanted + bias
    task.host_scale, task.device_scale = 1.0, _memory(np.array([case.scale], np.float32))

    stride = case.columns + case.gap
    before = np.full((case.rows, stride), 0x1234, np.uint16)
    task.d = _memory(before.ravel()[: case.rows * stride - case.gap])
    _runtime.set_seed(seed)
    status = _kernels.gemm_direct(kind.encode(), int(down), ctypes.byref(task))
    size = case.rows * stride - case.gap
    found = before.copy().ravel()
    found[:size] = np.frombuffer((ctypes.c_uint16 * size).from_address(task.d), np.uint16)
    expected = before.copy()
    expected[:, : case.columns] = _bits(wanted + 0.0, kind)  # no negative zero
    return _runtime.error_text(status) if status else "", found.reshape(before.shape), expected


# ---- in the process of the test --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemm() -> Iterator[Callable[..., None]]:
    """Runs a case and compares all of its memory."""
    room = standin.CSRC / "lora"
    kernels = standin.emulated_library(
        "libgemm_direct.so",
        [standin.HERE / "gemm_direct.cu", *(room / f"gemm_sm80_{kind}.cu" for kind in ("bfloat16", "float16"))],
        [*standin.CSRC.rglob("*.h"), *standin.CSRC.rglob("*.cuh"), standin.HERE / "prelude.h"],
    )
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_start, initargs=(standin.runtime(), kernels)
    ) as pool:

        def run(kind: str, down: bool, case: Case, seed: int) -> None:
            error, found, wanted = pool.submit(_run, kind, down, case, seed).result(timeout=300)
            assert error == ""
            np.testing.assert_array_equal(found, wanted)

        yield run


CASES = {
    "one tile": Case(128, 128, (32,)),
    "one element": Case(1, 1, (1,)),
    "fewer tiles than stages": Case(5, 9, (40,)),
    "more tiles than stages": Case(70, 130, (300,)),
    "several blocks": Case(300, 270, (48,)),
    "forward": Case(65, 77, (100, 16), adapters=(1,), bias=True),
    "four segments of odd depths": Case(33, 40, (7, 33, 1, 64), column_scale=True, bias=True),
    "segments without depth": Case(20, 24, (0, 40, 0, 9)),
    "nothing to add": Case(20, 24, (0,), bias=True),
    "adapter off": Case(20, 30, (16, 70), adapters=(0,), scale=0.0),
    "adapters off": Case(20, 30, (70, 8, 16, 8), adapters=(1, 2, 3), scale=0.0, bias=True),
    "masked": Case(150, 141, (24, 70), adapters=(0,), masked=True),
    "masked over several tiles": Case(40, 264, (200, 33), masked=True),
    "masked and off": Case(40, 70, (24, 70), adapters=(0,), scale=0.0, masked=True),
    "masked alone": Case(40, 70, (24,), masked=True),
    "gaps": Case(140, 72, (50, 16), gap=8),
    "unaligned result": Case(140, 67, (50, 16), gap=0),
}


@pytest.mark.parametrize("down", [False, True], ids=["rows", "down"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_the_sums_are_exact_on_integers(gemm, case, kind, down, seed):
    gemm(kind, down, CASES[case], seed)


@pytest.mark.parametrize("down", [False, True], ids=["rows", "down"])
def test_the_order_of_warps_and_of_copies_does_not_matter(gemm, down, seed):
    for shuffle in range(6):
        gemm("bfloat16", down, Case(130, 136, (170, 24), masked=True, bias=True), seed + shuffle)


def test_random_tasks(gemm, seed):
    random = np.random.default_rng(seed)
    for index in range(24):
        depths = tuple(int(depth) for depth in random.integers(0, 90, random.integers(1, 5)))
        adapters = tuple(int(i) for i in np.flatnonzero(random.integers(0, 2, len(depths))))
        flags = random.integers(0, 2, 5).astype(bool)
        case = Case(
            *(int(size) for size in random.integers(1, 200, 2)),
            depths,
            adapters,
            scale=float(flags[0]),
            bias=bool(flags[1]),
            column_scale=bool(flags[2]),
            masked=bool(flags[3]),
            gap=8 * int(random.integers(0, 3)),
        )
        gemm("bfloat16" if index % 2 else "float16", bool(flags[4]), case, seed + index)
