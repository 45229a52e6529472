"""LoRA on linear layers, on the operator :func:`peftops.ops.lora_linear`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import lora_linear
from . import inits
from .adapter import Adapter, factor_dtype
from .lora import LoRALayer
from .packed import PackedWeight
from .sharing import Member, Operands


class LinearLike(LoRALayer):
    """LoRA on a layer whose base product is a linear one, on the operator :func:`peftops.ops.lora_linear`."""

    packed: PackedWeight | None = None

    # The operator's view of the base weight, [out_features, in_features].
    def _weight(self) -> Tensor:
        return self.weight

    @classmethod
    def _factor_shapes(cls, layer, rank):
        out_features, in_features = cls._weight(layer).shape
        return (rank, in_features), (out_features, rank)

    @classmethod
    def _start(cls, layer, adapter):
        dtype = factor_dtype(layer.weight.dtype, adapter.adapter_dtype)
        start = inits.start(adapter.init, cls._weight(layer).detach(), adapter.rank, adapter.scaling, dtype)
        return start if start.residual is None else start._replace(residual=cls._stored(start.residual))

    @staticmethod
    def _stored(matrix: Tensor) -> Tensor:
        """A matrix [out_features, in_features] in the layout that `weight` has."""
        return matrix

    def _product(self, a, b):
        return self._stored(b @ a)

    def prepack_(self) -> int:
        """Hold a packed copy of the base weight for calls of few rows (:data:`peftops.nn.packed.MOST_ROWS`) without
        gradients on the CPU; its bytes. It follows the weight, is in no state_dict, and copies of the layer make their
        own. The base product then is the packed kernel's, whose last bits differ.

        Raises RuntimeError where the weight is not on the CPU or was made in inference mode.
        """
        weight = self._weight()
        if weight.device.type != "cpu" or weight.is_inference():
            what = "was made in inference mode" if weight.device.type == "cpu" else f"is on {weight.device}"
            raise RuntimeError(f"prepack: the weight {what}; packed weights are for inference on the CPU")
        self.packed = PackedWeight()
        return self.packed(weight).nbytes

    def unpack_(self) -> None:
        """Free the packed copy."""
        self.packed = None

    def _apply(self, fn, recurse=True):
        if self.packed is not None:
            self.packed.drop()
        return super()._apply(fn, recurse)

    def _adapted(self, x, names):
        bias = self._bias_with(names)
        if len(names) == 1:
            return self._fused(x, bias, names[0])
        if any(self._dropout(name) > 0 for name in names):
            y = self._fused(x, bias, names[0])
            for name in names[1:]:
                y = y + self._low_rank(x, name)
            return y
        a = torch.cat([self._acting(name, self.lora_a[name]) for name in names])
        b = torch.cat([self._scale(name) * self._acting(name, self.lora_b[name]) for name in names], dim=1)
        # 0, and with it the base layer's own path, where every scale is.
        acting = torch.stack([self._scale(name) for name in names]).abs().amax().sign()
        return lora_linear(x, self._weight(), bias, a, b, acting)

    def _fused(self, x: Tensor, bias: Tensor | None, name: str) -> Tensor:
        p, seed = self._dropout(name), None
        if self.packed is not None and p == 0 and not torch.compiler.is_compiling():
            operands = self._weight(), bias, self.lora_a[name], self.lora_b[name], self._scale(name)
            y = self.packed.output(x, *operands)
            if y is not None:
                return y
        if p > 0:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        return lora_linear(x, self._weight(), bias, self.lora_a[name], self.lora_b[name], self._scale(name), p, seed)

    def _dropout(self, name: str) -> float:
        return self.adapters[name].dropout if self.training else 0.0

    def _low_rank(self, x: Tensor, name: str) -> Tensor:
        """s drop(x) A^T B^T composed of torch's operators, for an adapter beside another one under dropout: each draws
        a mask of its own.
        """
        a, b = self._acting(name, self.lora_a[name]), self._acting(name, self.lora_b[name])
        dropped = nn.functional.dropout(x, self._dropout(name)).to(a.dtype)
        low = nn.functional.linear(nn.functional.linear(dropped, a), b)
        return (self._scale(name) * low).to(x.dtype)


class LoRALinear(Member, LinearLike, nn.Linear):
    """`nn.Linear` with LoRA adapters on the operator :func:`peftops.ops.lora_linear`; made by :meth:`from_linear`.

    weight [out_features, in_features] and bias [out_features] are frozen; lora_a [rank, in_features] and lora_b
    [out_features, rank] are trained. Input [..., in_features], output [..., out_features].
    """

    _base_class = nn.Linear

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        init: str | Callable = "kaiming",
        use_rslora: bool = False,
        lora_bias: bool = False,
    ) -> LoRALinear:
        """A new layer on the parameters of `linear` (the same objects, now frozen); `linear` itself keeps its class.

        rank: rank r of the adapter; above min(in_features, out_features) is legal.
        alpha: s = alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, 2023); None = rank.
        dropout: p of the dropout on the adapter's input, in training mode only.
        adapter_dtype: None = the base weight's, or `torch.float32`.
        init: one of :mod:`peftops.nn.inits`; "kaiming" draws A as `nn.Linear` does and sets B to 0.
        lora_bias: whether B has a bias, which is scaled by s as well.

        Raises TypeError for a layer that cannot carry LoRA, ValueError for a hyperparameter out of range.
        """
        alpha = rank if alpha is None else alpha
        adapter = Adapter(rank, alpha, dropout, use_rslora, init, adapter_dtype, lora_bias)
        return cls._around(linear, adapter, "from_linear")

    def _adapted(self, x, names):
        y = self.shared_output(x) if len(names) == 1 and self.packed is None else None
        return super()._adapted(x, names) if y is None else y

    def operands(self, x):
        names = () if self.merged else self._computed()
        if len(names) != 1 or self.adapters[names[0]].lora_bias:
            return None
        (name,) = names
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None:
            return None
        return Operands(weight, bias, self.lora_a[name], self.lora_b[name], self._scale(name), self._dropout(name))
