"""Several LoRA projections of one input in one operator call, for authors of models."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..ops import lora_linear_multi
from .linear import LoRALinear
from .sharing import Operands, fits, go_together, intercepted


class LoRAFusedLinear(nn.Module):
    """Linear projections that read the same x, as q, k and v or gate and up do: x [..., in_features] -> a list of
    outputs [..., out_features].

        self.qkv = LoRAFusedLinear([nn.Linear(512, 512), nn.Linear(512, 128), nn.Linear(512, 128)])
        q, k, v = self.qkv(x)

    projections: the layers, as `projections.0` and so on in the model's names. They are `nn.Linear` or, once an adapter
    is in them (:func:`peftops.attach`, :meth:`from_linears`), :class:`LoRALinear` with ranks, scales and masks of their
    own. Where all are and each has one acting adapter, with the same dropout and dtypes and without hooks, the call is
    one of :func:`peftops.ops.lora_linear_multi`; else each layer is called.

    Raises TypeError for something else than linear layers, ValueError for none and for different in_features.
    """

    def __init__(self, projections: Iterable[nn.Linear]):
        super().__init__()
        layers = list(projections)
        for index, layer in enumerate(layers):
            if not isinstance(layer, nn.Linear):
                raise TypeError(f"projections[{index}] is a {type(layer).__name__}, but it must be an nn.Linear")
        widths = [layer.in_features for layer in layers]
        if len(set(widths)) != 1:
            raise ValueError(f"projections have in_features {widths}, but these must be equal, of at least one layer")
        self.projections = nn.ModuleList(layers)

    @classmethod
    def from_linears(cls, linears: Iterable[nn.Linear], *, rank: int, **options) -> LoRAFusedLinear:
        """New LoRA layers on the parameters of these; arguments and errors as those of
        :meth:`LoRALinear.from_linear`.
        """
        return cls([LoRALinear.from_linear(linear, rank=rank, **options) for linear in linears])

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs in the order of the projections; masks are drawn in this order."""
        operands = [_operands(layer, x) for layer in self.projections]
        if any(each is None or not go_together(operands[0], each) for each in operands):
            return [layer(x) for layer in self.projections]
        p, seeds = operands[0].dropout_p, None
        if p > 0:
            seeds = torch.cat([torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device) for _ in operands])
        *lists, scales, _ = map(list, zip(*operands, strict=True))
        return lora_linear_multi(x, *lists, torch.stack(scales), p, seeds)


def _operands(layer: nn.Module, x: Tensor) -> Operands | None:
    if type(layer) is not LoRALinear or intercepted(layer):
        return None
    operands = layer.operands(x)
    return operands if operands is not None and fits(operands, x) else None
