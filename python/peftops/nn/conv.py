"""LoRA on torch's convolutions: y = conv(x; W) + s conv1(conv(drop(x); A); B) (loralib's and PEFT's `Conv2d`).

W is [out, in / groups, *kernel], A [rank, in, *kernel] with W's stride, padding and dilation, B [out, rank / groups, 1,
...]: a convolution with kernel 1 in W's groups. These are the shapes of PEFT's files. PEFT 0.21 gives A neither W's
`dilation` nor its `padding_mode`; for those two it computes something else than the layer that its own merging makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from . import inits
from .adapter import Adapter, factor_dtype
from .lora import LoRALayer


class ConvLike(LoRALayer):
    """LoRA on a convolution, composed of torch's own. A mixin before the layer's own class.

    weight and bias are frozen; lora_a [rank, in_channels, *kernel_size] and lora_b [out_channels, rank / groups, 1,
    ...] are trained. Input and output are those of the convolution, with or without a batch dimension.

    Dropout is torch's. Over a 16-bit base all products are 16-bit convolutions, for which float32 factors are rounded
    as under autocast; so x is kept for backward once, without a copy.

    With groups above 1 the rank must be a multiple of them, A and B must start at random, and the sum cannot be merged:
    A reads all channels, each group of the weight only its own.
    """

    # The function: F.conv1d, F.conv2d or F.conv3d.
    _convolve: Callable[..., Tensor]

    @classmethod
    def from_conv(cls, conv: nn.Module, *, rank: int, alpha: float | None = None, **options) -> ConvLike:
        """A new layer on the parameters of `conv` (the same objects, now frozen); `conv` itself keeps its class.

        alpha: s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`; None = rank.
        options: other fields of :class:`Adapter`.

        Raises TypeError for a layer that cannot carry LoRA, ValueError for an adapter that does not fit.
        """
        adapter = Adapter(rank=rank, alpha=rank if alpha is None else alpha, **options)
        return cls._around(conv, adapter, "from_conv")

    @classmethod
    def _factor_shapes(cls, layer, rank):
        kernel = layer.kernel_size
        return (rank, layer.in_channels, *kernel), (layer.out_channels, rank // layer.groups, *(1 for _ in kernel))

    @classmethod
    def _why_not(cls, layer, adapter):
        if adapter.rank % layer.groups:
            return f"rank is {adapter.rank}, but it must be a multiple of the convolution's groups, {layer.groups}"
        if layer.groups > 1 and inits.reads_weight(adapter.init):
            return f"init is {adapter.init!r}, which a convolution with {layer.groups} groups cannot have"
        return None

    @classmethod
    def _ready(cls, layer, adapter, factors, capacity=None):
        # The ranks of a grouped convolution are spread over its groups, so that none can be held ready at the end.
        return super()._ready(layer, adapter, factors, capacity if layer.groups == 1 else None)

    @classmethod
    def _start(cls, layer, adapter):
        weight, dtype = layer.weight.detach(), factor_dtype(layer.weight.dtype, adapter.adapter_dtype)
        if layer.groups == 1:
            matrix = weight.flatten(1)
        else:
            # A reads all channels. Only the shape matters, so that no memory is needed.
            matrix = weight.new_empty(1, 1).expand(layer.out_channels, layer.in_channels * math.prod(layer.kernel_size))
        a, b, residual = inits.start(adapter.init, matrix, adapter.rank, adapter.scaling, dtype)
        shape_a, shape_b = cls._factor_shapes(layer, adapter.rank)
        b = b[:, : shape_b[1]].reshape(shape_b)
        return inits.Start(a.view(shape_a), b, None if residual is None else residual.view(weight.shape))

    def _product(self, a, b):
        if reason := self.why_not_merge():
            raise RuntimeError(f"merge: {reason}")
        return (b.flatten(1) @ a.flatten(1)).view(self.weight.shape)

    def why_not_merge(self) -> str | None:
        """The reason why the adapters cannot be merged into the weight; None where they can."""
        if self.groups == 1:
            return None
        return f"a convolution with {self.groups} groups cannot hold the sum, in which each output reads all channels"

    def _adapted(self, x, names):
        y = self._conv_forward(x, self.weight, self._bias_with(names))
        for name in names:
            y = y + self._low_rank(x, name)
        return y

    def _low_rank(self, x: Tensor, name: str) -> Tensor:
        a, b = (self._acting(name, held[name]).to(x.dtype) for held in (self.lora_a, self.lora_b))
        x = F.dropout(x, self.adapters[name].dropout, self.training)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        low = self._convolve(x, a, None, self.stride, padding, self.dilation)
        return self._convolve(self._scale(name) * low, b, groups=self.groups)


class LoRAConv1d(ConvLike, nn.Conv1d):
    """`nn.Conv1d` with LoRA adapters; see :class:`ConvLike`. Made by :meth:`from_conv`."""

    _base_class = nn.Conv1d
    _convolve = staticmethod(F.conv1d)


class LoRAConv2d(ConvLike, nn.Conv2d):
    """`nn.Conv2d` with LoRA adapters; see :class:`ConvLike`. Made by :meth:`from_conv`."""

    _base_class = nn.Conv2d
    _convolve = staticmethod(F.conv2d)


class LoRAConv3d(ConvLike, nn.Conv3d):
    """`nn.Conv3d` with LoRA adapters; see :class:`ConvLike`. Made by :meth:`from_conv`."""

    _base_class = nn.Conv3d
    _convolve = staticmethod(F.conv3d)
