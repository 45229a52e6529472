"""LoRA on transformers' `Conv1D`, the linear layer of GPT-2 with its weight stored as [in_features, out_features].

Imported only where such a layer exists, so that transformers stays optional.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .grouped import GroupedLike
from .linear import LinearLike


class LoRAConv1D(LinearLike, Conv1D):
    """`Conv1D` with LoRA adapters; the factors have the shapes of :class:`LoRALinear`'s and s B A is transposed when
    merged.
    """

    _base_class = Conv1D
    __repr__ = nn.Module.__repr__

    def _weight(self) -> Tensor:
        return self.weight.t()

    @staticmethod
    def _stored(matrix: Tensor) -> Tensor:
        return matrix.t()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}{super().extra_repr()}"


class GroupedLoRAConv1D(GroupedLike, Conv1D):
    """`Conv1D` with stacked adapters, one for each row of a batch."""

    _base_class = Conv1D
    __repr__ = nn.Module.__repr__

    def _weight(self) -> Tensor:
        return self.weight.t()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}{super().extra_repr()}"
