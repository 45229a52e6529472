"""The arithmetic of combining LoRA adapters: one layer at a time, from factors to factors.

An adapter changes the weight of a layer by delta_i = s_i B_i A_i (and its bias by s_i beta_i with `lora_bias`); its
task vector here is w_i delta_i. Kinds:

- "linear": sum_i w_i delta_i, exactly; as the concatenation [.. w_i s_i B_i ..] [.. A_i ..], refactored where a smaller
  rank holds it. With `rank` the best approximation of that rank.
- "cat": the same sum, always as the concatenation: the rank is the sum of the ranks.
- "svd": the best approximation of the same sum at `rank`, or at the largest rank of the inputs (Eckart, Young, 1936).
- "ties" (Yadav et al., "TIES-Merging", NeurIPS 2023, section 4, algorithm 1): of each task vector the share `density`
  of the largest entries is kept, each entry elects the sign of the sum, and the entries of that sign are averaged.
- "dare" (Yu et al., "Language Models are Super Mario", ICML 2024, section 3): each entry is dropped with probability
  1 - density, the rest is divided by `density`; then they are summed. "dare_ties": and then elected and averaged.

TIES and DARE act on the deltas, as in the papers, and not on the factors; on one layer at a time, where TIES trims the
whole model at once; their result has full rank and is stored as its best approximation at `rank`, or at the largest
rank of the inputs. What that loses is measured. With equal weights w, "ties" is the paper's merge with lambda = w.

Hugging Face PEFT 0.21's `add_weighted_adapter` differs: its "linear" multiplies sums of factors, sum_i sqrt(w_i s_i)
B_i times sum_j sqrt(w_j s_j) A_j, which adds the cross terms B_i A_j; its "ties" and "dare_linear" act on the factors;
with `use_rslora` "cat" and "svd" come out sqrt(rank) times too large; `lora_bias` is left out; an adapter of weight 0
counts in the mean of "ties".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("linear", "cat", "svd", "ties", "dare", "dare_ties")
# What the papers keep: TIES the top 20%, DARE 10%.
DENSITY = {"ties": 0.2, "dare": 0.1, "dare_ties": 0.1}
# Above so many rows and columns the SVD of a dense delta is a randomised one.
_FULL_SVD = 1024


class Layer(NamedTuple):
    """Factors of one layer, as stored: A [rank, ...], B [out, rank, ...], B's bias; s, or w s in a term."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    scale: float
    embedding: bool

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [rank, in] and scale B [out, rank]."""
        return self.a.flatten(1).to(dtype), self.b.flatten(1).to(dtype) * self.scale


def combined(
    terms: list[Layer], kind: str, rank: int | None, density: float | None, generator: torch.Generator
) -> tuple[Layer, float]:
    """The layer to store, and its relative error: norm of (stored - wanted delta) / norm of the wanted one.

    terms: the task vectors, with w s as their scale; kind: one of KINDS; density: None for the kinds that drop nothing.
    """
    limit = rank
    if limit is None and kind not in ("linear", "cat"):
        limit = max(term.a.shape[0] for term in terms)
    if density is None:
        stored = _cat(terms) if kind == "cat" else _low_rank(terms, limit)
        a, b = _joined(terms)
        mine, theirs = stored.matrices(torch.float64)
        error, norm = _norm(torch.cat([a, mine]), torch.cat([b, -theirs], dim=1)), _norm(a, b)
        # Task vectors that cancel leave rounding noise; an error is then measured by their own size.
        return stored, _ratio(error, norm if norm > _noise(a, b) else (a.norm() * b.norm()).item())
    matrices = [term.matrices(torch.float32) for term in terms]
    wanted = _merged([b @ a for a, b in matrices], kind, density, generator)
    del matrices
    stored = _stored(terms, *_truncated(wanted, limit))
    biases = [term.bias.float() * term.scale for term in terms if term.bias is not None]
    if biases:
        stored = stored._replace(bias=_merged(biases, kind, density, generator).to(stored.a.dtype))
    norm = wanted.norm().item()
    a, b = stored.matrices(torch.float32)
    return stored, _ratio(wanted.addmm_(b, a, alpha=-1).norm().item(), norm)


def _cat(terms: list[Layer]) -> Layer:
    """The sum as a concatenation. The largest |w s| becomes the layer's s, so that its factors keep their bits."""
    scale = max(abs(term.scale) for term in terms) or 1.0
    dtype = _widest(terms)
    a = torch.cat([term.a.to(dtype) for term in terms])
    b = torch.cat([(term.b.double() * (term.scale / scale)).to(dtype) for term in terms], dim=1)
    return Layer(a, b, _bias_sum(terms, scale, dtype), scale, terms[0].embedding)


def _low_rank(terms: list[Layer], limit: int | None) -> Layer:
    """The sum, or its best approximation of rank `limit`, by the QR of the thin factors and the SVD of their core."""
    ranks = sum(term.a.shape[0] for term in terms)
    fits = limit is None or ranks <= limit
    if fits and len(terms) == 1:
        return _cat(terms)
    a, b = _joined(terms)
    (left, core_b), (right, core_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    needed = max(int((s > _noise(a, b)).sum()), 1)
    if fits and needed == ranks:
        return _cat(terms)
    kept = needed if limit is None else min(needed, limit)
    stored = _stored(terms, left @ u[:, :kept], s[:kept], vh[:kept] @ right.T)
    return stored._replace(bias=_bias_sum(terms, 1.0, stored.a.dtype))


def _merged(deltas: list[Tensor], kind: str, density: float, generator: torch.Generator) -> Tensor:
    """TIES or DARE of task vectors, in place."""
    if kind == "ties":
        for delta in deltas:
            kept = max(round(density * delta.numel()), 1)
            magnitude = delta.abs()
            smallest = magnitude.flatten().kthvalue(delta.numel() - kept + 1).values
            delta[magnitude < smallest] = 0
    else:
        for delta in deltas:
            dropped = torch.rand(delta.shape, generator=generator) >= density
            delta.masked_fill_(dropped, 0).div_(density)
    total = sum(deltas[1:], deltas[0].clone())
    if kind == "dare":
        return total
    elected = torch.where(total >= 0, 1.0, -1.0)
    count = torch.zeros_like(total)
    total.zero_()
    for delta in deltas:
        agrees = delta.sign() == elected
        total += delta.where(agrees, 0.0)
        count += agrees
    return total.div_(count.clamp_(min=1))


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of the best approximation of this rank, or one close to it."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _FULL_SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # Subspace iteration from a random start (Halko et al., 2011, algorithm 4.4).
        start = torch.randn(matrix.shape[1], min(rank + 32, *matrix.shape), generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(matrix @ start).Q
        for _ in range(8):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    return u[:, :rank], s[:rank], vh[:rank]


def _stored(terms: list[Layer], u: Tensor, s: Tensor, vh: Tensor) -> Layer:
    """U S V^T shared out evenly between A and B, in the shapes of the files; s = 1 and no bias yet."""
    root, dtype = s.sqrt(), _widest(terms)
    shape_a, shape_b = terms[0].a.shape, terms[0].b.shape
    # Where nothing is left, A stays as a direction, so that the adapter can still be trained.
    a = torch.where(root > 0, root, 1.0)[:, None] * vh
    a = a.to(dtype).reshape(len(s), *shape_a[1:])
    b = (u * root).to(dtype).reshape(shape_b[0], len(s), *shape_b[2:])
    return Layer(a, b, None, 1.0, terms[0].embedding)


def _joined(terms: list[Layer]) -> tuple[Tensor, Tensor]:
    """The concatenation in float64, B with its scales."""
    matrices = [term.matrices(torch.float64) for term in terms]
    return torch.cat([a for a, _ in matrices]), torch.cat([b for _, b in matrices], dim=1)


def _bias_sum(terms: list[Layer], scale: float, dtype: torch.dtype) -> Tensor | None:
    biases = [term.bias.double() * (term.scale / scale) for term in terms if term.bias is not None]
    return sum(biases[1:], biases[0]).to(dtype) if biases else None


def _norm(a: Tensor, b: Tensor) -> float:
    """Euclidean norm of B A, without forming it."""
    return (torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T).norm().item()


def _noise(a: Tensor, b: Tensor) -> float:
    """What rounding alone can leave in B A."""
    return max(len(b), a.shape[1]) * torch.finfo(a.dtype).eps * (a.norm() * b.norm()).item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


def _widest(layers: Sequence[Layer]) -> torch.dtype:
    dtype = layers[0].a.dtype
    for layer in layers:
        for factor in (layer.a, layer.b):
            dtype = torch.promote_types(dtype, factor.dtype)
    return dtype
