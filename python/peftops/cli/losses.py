"""The loss that is trained, and the loss and metric of an evaluation: sums over tokens or texts, no means of means."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from .batches import IGNORED


def loss_function(causal: bool) -> Callable:
    """Trainer's `compute_loss_func`: the sum over what is learned, divided by how much that is.

    Trainer passes `num_items_in_batch`, the number over all accumulated batches and all processes; so every token (for
    classification every text) weighs the same, however the global batch is cut.
    """

    def loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        logits = outputs.logits
        if causal:
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # token t is predicted at t - 1
        total = cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / items

    return loss


def row_sums(causal: bool) -> Callable:
    """Trainer's `preprocess_logits_for_metrics`: [rows, 3] with summed negative log likelihood, count of what was
    predicted and how much of it was right.
    """

    def sums(logits, labels: torch.Tensor) -> torch.Tensor:
        logits = (logits[0] if isinstance(logits, tuple) else logits).float()
        if causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        else:
            logits, labels = logits[:, None], labels[:, None]
        losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        right = (logits.argmax(-1) == labels).sum(1)
        return torch.stack([losses.sum(1), (labels != IGNORED).sum(1).float(), right.float()], dim=1)

    return sums


def metrics(causal: bool) -> Callable:
    """Trainer's `compute_metrics` over `row_sums`: the loss, with perplexity or accuracy. `loss` replaces Trainer's own
    mean of batch means.
    """

    def compute(prediction) -> dict[str, float]:
        loss, count, right = prediction.predictions.astype("float64").sum(0)
        if causal:
            return {"loss": float(loss / count), "perplexity": math.exp(min(loss / count, 700.0))}
        return {"loss": float(loss / count), "accuracy": float(right / count)}

    return compute
