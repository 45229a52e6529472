"""Two processes of one gloo group on this machine, which run functions of the tests: started once, used by all."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import multiprocessing

WORLD = 2
PATIENCE = timedelta(seconds=60)


class Ranks:
    """Processes that wait for functions. Each call gets a process group of its own, so that one that failed half-way
    through its collectives harms no other.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        self.pipes, self.processes, self.calls = [], [], 0
        for rank in range(WORLD):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, function: Callable, *arguments: object) -> None:
        """Call `function(rank, *arguments)` on each rank; what one raises is raised here, with its traceback."""
        self.calls += 1
        for pipe in self.pipes:
            pipe.send((function, arguments))
        replies = [self._reply(pipe) for pipe in self.pipes]
        failures = [f"rank {rank}: {reply}" for rank, reply in enumerate(replies) if reply is not None]
        assert not failures, "\n".join(failures)

    def _reply(self, pipe) -> str | None:
        while pipe.poll(3 * PATIENCE.seconds):
            call, reply = pipe.recv()
            if call == self.calls:  # and not one that came too late
                return reply
        return "no reply"

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _work(rank: int, port: int, pipe) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    calls = 0
    while True:
        function, arguments = pipe.recv()
        calls += 1
        reply = None
        try:
            own = dist.PrefixStore(str(calls), store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=WORLD, timeout=PATIENCE)
            torch.manual_seed(0)
            function(rank, *arguments)
        except BaseException:  # pytest's own are no Exceptions
            reply = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send((calls, reply))
