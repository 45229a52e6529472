"""Memory of a run: the highest use so far, and what one training step keeps for backward."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


class PeakMemory:
    """Highest memory use since construction, in bytes: of torch's allocator on CUDA, of the whole process elsewhere.

    Linux can restart its high-water mark; where it cannot, the mark is that of the process's life so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource  # not on every platform

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024


def saved_for_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward of one training step, parameters and buffers not counted.

    Every storage counts once and whole, however many tensors view it.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    # The loss keeps the graph, and the graph keeps every storage: no address is handed out twice while we count.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    model.train(was_training)
    return sum(kept.values())
