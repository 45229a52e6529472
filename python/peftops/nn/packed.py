"""A second copy of a frozen weight, in the order in which the CPU reads it for few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import lora_linear_packed, pack_weight

# Above so many rows the weight itself is as fast.
MOST_ROWS = 64


class PackedWeight:
    """What :func:`peftops.ops.pack_weight` makes of a weight, made anew once the weight is another one. Copies and
    files of it are empty and fill themselves when they are used.
    """

    def __init__(self) -> None:
        self.drop()

    def __reduce__(self):
        return PackedWeight, ()

    def drop(self) -> None:
        """Free the copy."""
        self._packed: Tensor | None = None
        self._source: Tensor | None = None  # holds the memory that was packed, so that no other can have its address
        self._version = 0

    def __call__(self, weight: Tensor) -> Tensor:
        """The packed values of this weight as they are now."""
        if not self._is_of(weight):
            self.drop()
            with torch.inference_mode(False), torch.no_grad():
                self._packed, self._source, self._version = pack_weight(weight), weight.detach(), weight._version
        return self._packed

    def _is_of(self, weight: Tensor) -> bool:
        source = self._source
        return (
            source is not None
            and source.data_ptr() == weight.data_ptr()
            and self._version == weight._version
            and (source.dtype, source.shape, source.stride()) == (weight.dtype, weight.shape, weight.stride())
        )

    def output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: Tensor
    ) -> Tensor | None:
        """y = x W^T + bias + scale x A^T B^T for few rows on the CPU without gradients; None for another call."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
            return None
        tensors = [t for t in (x, weight, bias, lora_a, lora_b) if t is not None]
        if any(t.device.type != "cpu" for t in tensors) or weight.is_inference() or x.dtype != weight.dtype:
            return None
        width = x.shape[-1] if x.dim() else 0
        if width != weight.shape[1] or x.numel() > MOST_ROWS * width:
            return None
        return lora_linear_packed(x, self(weight), bias, lora_a, lora_b, scale, weight.shape[0])
