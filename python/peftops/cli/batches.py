"""Batches of token ids: in which order the examples come, which process gets which, and how they become tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

IGNORED = -100  # the label of what is not learned, as in torch's cross_entropy
BLANK = -1


class LengthGroupedSampler(Sampler[int]):
    """Random order in which the examples of a batch have similar lengths, so that little is spent on padding.

    The order is a function of (seed, epoch) alone and takes nothing from the global generators: a resumed run meets the
    same batches as an uninterrupted one. Shuffled examples are cut into pools of up to 50 batches, each pool is sorted
    by length, and the batches are visited in random order; an incomplete batch comes last.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        whole = len(order) - len(order) % self.batch_size
        # At least four pools, or a small set would be sorted as a whole and meet much the same batches in every epoch.
        pool = self.batch_size * min(50, max(1, whole // (4 * self.batch_size)))
        batches = []
        for start in range(0, whole, pool):
            members = sorted(order[start : min(start + pool, whole)], key=lambda index: self.lengths[index])
            batches.extend(members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size))
        generator.shuffle(batches)
        for batch in batches:
            yield from batch
        yield from order[whole:]


class TrainingSet(Dataset):
    """Examples as a dataset; the index BLANK gives one in which there is nothing to learn."""

    def __init__(self, examples: list[dict]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        if index != BLANK:
            return self.examples[index]
        example = min(self.examples, key=lambda example: len(example["input_ids"]))
        if "label" in example:
            return {**example, "label": IGNORED}
        return {**example, "labels": [IGNORED] * len(example["labels"])}


class RankBatches(Sampler[list[int]]):
    """The batches of one process: every process takes `batch_size` rows of the next `batch_size * processes`.

    Of the last, incomplete ones each process gets its share; one that has none gets a blank row, so that all make
    the same number of steps.
    """

    def __init__(self, order: LengthGroupedSampler, batch_size: int, rank: int, processes: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        rows = list(self.order)
        together = self.batch_size * self.processes
        for start in range(0, len(rows), together):
            yield rows[start : start + together][self.rank :: self.processes] or [BLANK]


class EpochLoader(DataLoader):
    """A data loader whose order follows the epoch that Trainer announces."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.order.set_epoch(epoch)


@dataclass(frozen=True)
class Collator:
    """Pads to the longest example of the batch. For causal LM an example has `labels`, its tokens or IGNORED, for
    classification `label`, a class id; with `position_ids` it is a row of packed texts, which goes without a mask.
    """

    pad_id: int

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"input_ids": self._padded(examples, "input_ids", self.pad_id)}
        if "position_ids" in examples[0]:
            batch["position_ids"] = self._padded(examples, "position_ids", 0)
        else:
            # By length, not by the pad id: many models pad with their end-of-text token.
            ones = [{"mask": [1] * len(example["input_ids"])} for example in examples]
            batch["attention_mask"] = self._padded(ones, "mask", 0)
        if "label" in examples[0]:
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        else:
            batch["labels"] = self._padded(examples, "labels", IGNORED)
        return batch

    @staticmethod
    def _padded(examples: list[dict], name: str, filler: int) -> torch.Tensor:
        width = max(len(example[name]) for example in examples)
        return torch.tensor([[*example[name], *[filler] * (width - len(example[name]))] for example in examples])

    def counted(self, examples: list[dict]) -> dict:
        """The batch with `tokens`, the number of tokens without padding."""
        return {**self(examples), "tokens": sum(len(example["input_ids"]) for example in examples)}
