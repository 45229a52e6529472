"""The processes of one run (`torchrun`, `accelerate launch`): who writes, who waits, who reports an error."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys

import torch.distributed

_SAID = "peftops/said"


def count() -> int:
    # Other programs set WORLD_SIZE alone.
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process writes the files and speaks."""
    return rank() == 0


def begin() -> None:
    """Connect the processes, if there are several."""
    if count() > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState

        from .model import training_device

        PartialState(cpu=training_device().type == "cpu")
        atexit.register(torch.distributed.destroy_process_group)


def wait() -> None:
    """Return once every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def say_once(line: str) -> None:
    """Print `line` on stderr in the first process that comes here; the others wait until it is there.

    All of them meet the same bad input, and the launcher ends them all as soon as the first one leaves.
    """
    store = _store()
    if store is None:
        if is_main():
            print(line, file=sys.stderr)
        return
    if store.add(_SAID, 1) == 1:
        print(line, file=sys.stderr, flush=True)
        store.set(_SAID + "/done", "1")
    else:
        with contextlib.suppress(RuntimeError):  # the first one died
            store.wait([_SAID + "/done"], datetime.timedelta(seconds=10))


def _store():
    if not torch.distributed.is_initialized():
        return None
    return torch.distributed.distributed_c10d._get_default_store()
