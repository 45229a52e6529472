"""The stand-in for the CUDA runtime (cudart.cpp): what it is told and what it has recorded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ARGUMENT_BYTES = 4096
TASK_BYTES = 512  # of the argument, enough for the struct of any kernel without tensor maps
STREAM, OTHER_STREAM = 0x77, 0x99  # of the device of a call, of other devices
LAUNCHES = ("<<<>>>", "cudaLaunchKernel", "cudaLaunchKernelExC")
ALLOWED = (*LAUNCHES, "cudaSetDevice", "cudaFuncSetAttribute")


class _Record(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("device", ctypes.c_int32),
        ("status", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("programmatic", ctypes.c_int32),
        ("shared_memory", ctypes.c_uint64),
        ("argument", ctypes.c_ubyte * ARGUMENT_BYTES),
    ]


@dataclass(frozen=True)
class Call:
    """One call of the runtime. `device` is the one that was current; `argument` starts with the kernel's struct."""

    name: str
    kernel: str
    device: int
    status: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    programmatic: bool
    shared_memory: int
    argument: bytes


class TensorMap(ctypes.Structure):
    """What the stand-in for the driver writes into a tensor map of 128 bytes."""

    _fields_ = [
        ("magic", ctypes.c_char * 4),
        ("type", ctypes.c_uint8),
        ("rank", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8),
        ("fill", ctypes.c_uint8),
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint32 * 5),
    ]


def tensor_maps(argument: bytes) -> list[tuple[int, TensorMap]]:
    """The tensor maps in a kernel's struct, each with its place."""
    places = [place for place in range(0, len(argument) - 127, 64) if argument[place : place + 4] == b"TMA\0"]
    return [(place, TensorMap.from_buffer_copy(argument, place)) for place in places]


@dataclass(frozen=True)
class Gpu:
    """What a device says of itself; `shared_memory` is what a block may have with opt-in."""

    sm: int
    sm_count: int
    shared_memory: int


# CUDA programming guide, "Compute capabilities", technical specifications; SM counts of one product each.
GPUS = {
    "A100": Gpu(80, 108, 163 * 1024),
    "RTX 3090": Gpu(86, 82, 99 * 1024),
    "RTX 4090": Gpu(89, 128, 99 * 1024),
    "H100": Gpu(90, 132, 227 * 1024),
    "RTX 5090": Gpu(120, 170, 99 * 1024),
}


class Runtime:
    """The stand-in, loaded in this process."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        self.library.cudart_record.restype = ctypes.POINTER(_Record)
        self.library.cudart_record.argtypes = [ctypes.c_size_t]
        self.library.cudart_record_count.restype = ctypes.c_size_t
        self.library.cudart_record_bytes.restype = ctypes.c_size_t
        self.library.cudart_set_emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.cudaGetErrorString.restype = ctypes.c_char_p
        if self.library.cudart_record_bytes() != ctypes.sizeof(_Record):
            raise TypeError("cudart.cpp and recording.py have another layout of Record")

    def set_devices(self, gpu: Gpu, count: int = 2) -> None:
        self.library.cudart_set_devices(count, gpu.sm, gpu.sm_count, gpu.shared_memory)

    def set_old_driver(self, old: bool) -> None:
        """Whether the driver is one that makes no tensor maps."""
        self.library.cudart_set_old_driver(int(old))

    def set_seed(self, seed: int) -> None:
        """Of the orders in which the emulator runs blocks, warps and lanes."""
        self.library.cudart_set_emulator_seed(seed)

    def error_text(self, status: int) -> str:
        return self.library.cudaGetErrorString(status).decode()

    def device(self) -> int:
        device = ctypes.c_int(-1)
        self.library.cudaGetDevice(ctypes.byref(device))
        return device.value

    @contextmanager
    def recorded(self) -> Iterator[list[Call]]:
        """A list that holds, after the block, the calls made in it."""
        calls: list[Call] = []
        self.library.cudart_clear_records()
        yield calls
        for index in range(self.library.cudart_record_count()):
            record = self.library.cudart_record(index).contents
            calls.append(
                Call(
                    name=record.call.decode(),
                    kernel=(record.kernel or b"").decode(),
                    device=record.device,
                    status=record.status,
                    stream=record.stream or 0,
                    grid=tuple(record.grid),
                    block=tuple(record.block),
                    cluster=tuple(record.cluster),
                    programmatic=bool(record.programmatic),
                    shared_memory=record.shared_memory,
                    argument=bytes(record.argument),
                )
            )
