"""What measuring on a GPU takes beside the harness: its clock, its ceilings, its memory, CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from harness import Contender, Unavailable


class Moment:
    """A point in the current stream's work; the difference of two is the seconds that the device took between them."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def peak_bytes(step: Callable[[], object]) -> int:
    """Highest number of bytes that one call holds in PyTorch's CUDA allocator beyond what was held before it."""
    step()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def empty() -> None:
    """Give everything that no tensor holds back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- ceilings --------------------------------------------------------------------------------------------------------


def _best_time(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = Moment()
        call()
        times.append(Moment() - start)
    return min(times)


def copy_bandwidth(nbytes: int, repeats: int = 20) -> float:
    """Bytes per second, read and written ones counted, of the fastest copy of `nbytes` within the device's memory."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / _best_time(lambda: target.copy_(source), repeats)


def matmul_rate(dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Operations per second of the fastest square torch.matmul; a multiply-add is two operations."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / _best_time(lambda: torch.matmul(a, b.t()), repeats)


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def captured(call: Callable[[], object], pool: object = None) -> tuple[object, Callable[[], None]]:
    """A CUDA graph of `call`: (its results, which every replay writes anew, replay). Its memory comes from `pool`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries allocate what they keep
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        results = call()
    return results, graph.replay


def graphed(contenders: list[Contender], sets: int, ours: Callable[[str], bool]) -> list[Contender]:
    """The same contenders, each input set's call captured once its result was checked and replayed when timed.

    A contender that is not `ours` and cannot be captured is left out.
    """
    pool = torch.cuda.graph_pool_handle()

    def contender(c: Contender) -> Contender:
        replays: list[Callable[[], None]] = []

        def check() -> float:
            error = c.check()
            try:
                replays.extend(captured(lambda i=i: c.step(i), pool)[1] for i in range(sets))
            except Exception as reason:
                if ours(c.name):
                    raise
                raise Unavailable(f"CUDA graph: {str(reason).strip().splitlines()[0]}") from reason
            return error

        return Contender(c.name, lambda i: replays[i](), check, c.facts)

    return [contender(c) for c in contenders]
