"""What the checks ask of a device. On the CPU it is a rehearsal: the checks themselves are tested without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gpu
import torch

#: GPU cycles for which a delayed stream does nothing: about 10 ms, far more than preparing a call takes.
DELAY = 20_000_000
#: Bytes of the buffer whose copies fill the memory bus.
PRESSURE = 1 << 30


class Cuda:
    """One GPU."""

    real = True

    def __init__(self, index: int = 0):
        self.device = torch.device("cuda", index)
        self._bus: tuple[torch.cuda.Stream, torch.Tensor, torch.Tensor] | None = None

    def synchronize(self) -> None:
        """Wait for everything; raises what a kernel left behind."""
        torch.cuda.synchronize(self.device)

    @contextmanager
    def delayed_stream(self) -> Iterator[None]:
        """A stream of its own becomes current, busy for a while: work that goes to another stream runs too early."""
        self.synchronize()
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY)
            yield
        stream.synchronize()

    def capture(self, call: Callable[[], tuple]) -> tuple[tuple, Callable[[], None]]:
        """A CUDA graph of `call`: (the tensors that every replay writes, replay)."""
        return gpu.captured(call)

    def press(self) -> None:
        """Queue a copy of a large buffer on a stream of its own, so that other work has to share the memory bus."""
        if self._bus is None:
            size = min(PRESSURE, self.free() // 8)
            source = torch.zeros(size, dtype=torch.uint8, device=self.device)
            self._bus = torch.cuda.Stream(self.device), source, torch.empty_like(source)
            self.synchronize()
        stream, source, target = self._bus
        with torch.cuda.stream(stream):
            target.copy_(source)

    def relieve(self) -> None:
        """Give the buffers of `press` back."""
        self.synchronize()
        self._bus = None
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes that live tensors hold."""
        return torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """Bytes that can still be allocated."""
        return torch.cuda.mem_get_info(self.device)[0]

    def launched(self, call: Callable[[], object]) -> list[str]:
        """Names of the kernels that ran on the device during `call`."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.synchronize()
        return sorted({event.name for event in profiler.events() if event.device_type.name == "CUDA"})


class Rehearsal:
    """The CPU in the place of a GPU: no streams, and a replayed graph is the call made again."""

    real = False
    device = torch.device("cpu")

    def synchronize(self) -> None:
        pass

    @contextmanager
    def delayed_stream(self) -> Iterator[None]:
        yield

    def capture(self, call: Callable[[], tuple]) -> tuple[tuple, Callable[[], None]]:
        results = call()

        def replay() -> None:
            for kept, new in zip(results, call(), strict=True):
                if kept is not None:
                    kept.detach().copy_(new)

        return results, replay

    def press(self) -> None:
        pass

    def relieve(self) -> None:
        pass

    def allocated(self) -> int:
        return 0

    def free(self) -> int:
        return 0

    def launched(self, call: Callable[[], object]) -> list[str]:
        call()
        return []


def open_device(kind: str) -> Cuda | Rehearsal:
    return Cuda() if kind == "cuda" else Rehearsal()
