"""LoRA on an `nn.Linear` whose weight is a DTensor, sharded over a device mesh of one dimension (tensor parallelism).

Column-wise, weight Shard(0): x and A are whole on every rank, B, the bias and y have the rank's rows; the gradient of A
is summed over the ranks. Row-wise, weight Shard(1): x and A have the rank's columns, B is whole and y is a summand; the
gradient of B is summed, the biases are added on the first rank. ColwiseParallel and RowwiseParallel of
`torch.distributed.tensor.parallel` make these layouts. They come first and the adapter second: a style cannot shard
factors.

The operator runs on each rank's own part. Dropout: the generators of the ranks have to be in the same state, as for
every dropout on a replicated activation. Column-wise the mask is the one of a single process; row-wise each rank's
columns get a mask of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from ..ops import lora_dropout_mask, lora_linear
from . import inits
from .adapter import Factors
from .linear import LoRALinear

COLUMN, ROW = Shard(0), Shard(1)


def why_not(layer: nn.Module) -> str | None:
    """The reason why a layer with a DTensor as weight cannot carry LoRA; None where it can."""
    weight = layer.weight
    if not isinstance(layer, nn.Linear):
        return "its weight is a DTensor; of sharded layers only nn.Linear can be adapted"
    if weight.device_mesh.ndim != 1 or weight.placements[0] not in (COLUMN, ROW):
        mesh = list(weight.device_mesh.shape)
        return (
            f"its weight is a DTensor with placements {list(weight.placements)} on a mesh {mesh}, but it must have "
            "Shard(0) or Shard(1) on a mesh of one dimension"
        )
    return None


class ShardedLoRALinear(LoRALinear):
    """:class:`LoRALinear` whose weight, bias and factors are DTensors; takes and returns DTensors, as `nn.Linear` does
    there.
    """

    @classmethod
    def _why_not(cls, layer, adapter):
        if inits.reads_weight(adapter.init):
            return f"init {adapter.init!r} decomposes the weight, but that is sharded; use it before sharding"
        return super()._why_not(layer, adapter)

    @classmethod
    def _ready(cls, layer, adapter, factors, capacity=None):
        # Made whole on each rank; the first one's values count.
        values, start = super()._ready(layer, adapter, factors, capacity)
        weight = layer.weight
        column = weight.placements[0] == COLUMN
        placements = (Replicate(), COLUMN, COLUMN) if column else (ROW, Replicate(), Replicate())
        return Factors(
            *(
                None if value is None else distribute_tensor(value, weight.device_mesh, [placement])
                for value, placement in zip(values, placements, strict=True)
            )
        ), start

    def _adapted(self, x, names):
        if not isinstance(x, DTensor):
            raise TypeError(
                "x is a plain tensor, but the weight is a DTensor; ColwiseParallel and RowwiseParallel of "
                "torch.distributed.tensor.parallel hand over DTensors"
            )
        column = self.weight.placements[0] == COLUMN
        mesh = self.weight.device_mesh
        x_layout, y_layout = (Replicate(), Shard(x.ndim - 1)) if column else (Shard(x.ndim - 1), Partial())
        own = _local(x, x_layout, Partial() if column else x_layout)
        y = self._local_output(own, names, column)
        shape = torch.Size((*x.shape[:-1], self.weight.shape[0]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y, mesh, [y_layout], run_check=False, shape=shape, stride=stride)

    def _local_output(self, x: Tensor, names, column: bool) -> Tensor:
        """This rank's part of the output, or its summand."""
        first, *others = names
        bias = self._local_bias(names, column)
        y = lora_linear(
            x,
            self.weight.to_local(),
            bias,
            *self._local_factors(first, column),
            self._scale(first),
            *self._drop(x, first, column),
        )
        for name in others:
            a, b = self._local_factors(name, column)
            p, seed = self._drop(x, name, column)
            if p > 0:
                kept = lora_dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], p).view(x.shape)
                dropped = torch.where(kept, x, 0) / (1 - p)
            else:
                dropped = x
            y = y + (self._scale(name) * F.linear(F.linear(dropped.to(a.dtype), a), b)).to(y.dtype)
        return y

    def _local_factors(self, name: str, column: bool) -> tuple[Tensor, Tensor]:
        # A factor that is whole on each rank meets a part of the outputs or of the inputs: its gradient is a summand.
        a, b = self.lora_a[name], self.lora_b[name]
        if column:
            return _local(a, Replicate(), Partial()), b.to_local()
        return a.to_local(), _local(b, Replicate(), Partial())

    def _local_bias(self, names, column: bool) -> Tensor | None:
        bias = self._bias_with(names)
        if bias is None or column:
            return bias if bias is None else bias.to_local()
        first = self.weight.device_mesh.get_local_rank() == 0
        if not bias.requires_grad:
            return bias.to_local() if first else None
        # Every rank takes part in the sum of its gradient.
        return _local(bias, Replicate(), Partial()) * float(first)

    def _drop(self, x: Tensor, name: str, column: bool) -> tuple[float, Tensor | None]:
        p = self._dropout(name)
        if p == 0:
            return 0.0, None
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        return p, seed if column else seed + self.weight.device_mesh.get_local_rank()


def _local(tensor: DTensor, placement, grad_placement) -> Tensor:
    """The local part with this placement; its gradient has `grad_placement` and is brought into the tensor's own."""
    return tensor.redistribute(placements=[placement]).to_local(grad_placements=[grad_placement])
