"""LoRA on `nn.Embedding`: e = E[id] + s (A^T[id]) B^T (loralib's `Embedding`; PEFT's).

E is [num_embeddings, embedding_dim], A [rank, num_embeddings], B [embedding_dim, rank].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import inits
from .adapter import Adapter, factor_dtype
from .lora import LoRALayer


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """`nn.Embedding` with LoRA adapters; made by :meth:`from_embedding`.

    weight [num_embeddings, embedding_dim] is frozen; lora_a [rank, num_embeddings] and lora_b [embedding_dim, rank]
    are trained. Input: int64 or int32 of any shape; output [..., embedding_dim] in weight's dtype.

    A starts at 0 and B at N(0, 1), whether `init` is "kaiming" or "gaussian"; any other init works on the transposed
    weight. `padding_idx` and `scale_grad_by_freq` act on A as they do on the weight. There is no dropout: an adapter's
    is not used, as in loralib and PEFT. The gradient of A is dense, [rank, num_embeddings], also with `sparse`, which
    concerns the frozen weight.
    """

    _base_class = nn.Embedding

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, rank: int, alpha: float | None = None, **options
    ) -> LoRAEmbedding:
        """A new layer on the weight of `embedding` (the same object, now frozen); `embedding` itself keeps its class.

        alpha: s = alpha / rank, or alpha / sqrt(rank) with `use_rslora`; None = rank.
        options: other fields of :class:`Adapter`.

        Raises TypeError for a layer that cannot carry LoRA, ValueError for an adapter that does not fit.
        """
        adapter = Adapter(rank=rank, alpha=rank if alpha is None else alpha, **options)
        return cls._around(embedding, adapter, "from_embedding")

    @classmethod
    def _factor_shapes(cls, layer, rank):
        return (rank, layer.num_embeddings), (layer.embedding_dim, rank)

    @classmethod
    def _why_not(cls, layer, adapter):
        if layer.max_norm is not None:
            return f"its max_norm is {layer.max_norm:g}, which rewrites the weight in every forward"
        if adapter.lora_bias:
            return "lora_bias is for linear layers and convolutions; an embedding has no bias"
        return None

    @classmethod
    def _start(cls, layer, adapter):
        dtype = factor_dtype(layer.weight.dtype, adapter.adapter_dtype)
        start = inits.start(adapter.init, layer.weight.detach().t(), adapter.rank, adapter.scaling, dtype)
        if adapter.init in ("kaiming", "gaussian"):
            return inits.Start(torch.zeros_like(start.a), torch.randn_like(start.b))
        return start if start.residual is None else start._replace(residual=start.residual.t())

    def _product(self, a, b):
        return a.t() @ b.t()

    def _adapted(self, x, names):
        e = nn.Embedding.forward(self, x)
        total = e
        for name in names:
            a, b = self._acting(name, self.lora_a[name]), self._acting(name, self.lora_b[name])
            total = total + (self._scale(name) * self._columns(x, a)) @ b.t()
        return total.to(e.dtype)

    def _columns(self, ids: Tensor, a: Tensor) -> Tensor:
        """A^T[ids], [..., rank]. The backward of `F.embedding(ids, a.t())` would hold the gradient of A twice, once
        transposed.
        """
        if self.scale_grad_by_freq:
            return F.embedding(ids, a.t(), self.padding_idx, scale_grad_by_freq=True)
        if a.device.type == "cpu":
            low = a.index_select(1, ids.flatten()).t().reshape(*ids.shape, a.shape[0])
        else:
            # Unlike that of index_select, its backward adds up in the same order each time on CUDA.
            low = a[:, ids].movedim(0, -1)
        if self.padding_idx is not None:
            low = torch.where((ids == self.padding_idx).unsqueeze(-1), low.detach(), low)
        return low
