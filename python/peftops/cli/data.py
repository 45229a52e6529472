"""Reading, splitting and batching of training texts: JSONL or CSV in, padded batches out."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import InputError

ENDINGS = (".jsonl", ".csv")


@dataclass(frozen=True)
class Row:
    """One example: its text, its label (None for causal LM) and the line of the file that it came from."""

    text: str
    label: str | None
    line: int


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} line {number}: not valid JSON ({error.msg} at column {error.colno})"
                ) from None
            if not isinstance(record, dict):
                raise InputError(
                    f"{path} line {number}: got a JSON {type(record).__name__}, wanted an object with columns"
                )
            yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    previous = csv.field_size_limit(2**31 - 1)  # the default of 131072 characters refuses long documents
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise InputError(f"{path}: column {doubled[0]!r} appears more than once in the header")
            for record in reader:
                if None in record or None in record.values():
                    extra = len(record.get(None) or ())
                    got = len(names) + extra if extra else sum(value is not None for value in record.values())
                    raise InputError(f"{path} line {reader.line_num}: {got} fields, but the header has {len(names)}")
                yield reader.line_num, record
    except csv.Error as error:
        raise InputError(f"{path} line {reader.reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(previous)


def _records(path: Path) -> list[tuple[int, dict]]:
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{path}: unknown file ending {path.suffix!r}, wanted one of {', '.join(ENDINGS)}")
    try:
        records = list(_jsonl(path) if path.suffix.lower() == ".jsonl" else _csv(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not records:
        raise InputError(f"{path}: holds no examples")
    return records


def _label(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{where} is {json.dumps(value)}, wanted a non-empty string or an integer")
    return str(value)


def read(path: Path, task: str, text: str, label: str | None) -> list[Row]:
    """The rows of a JSONL or CSV file (UTF-8, blank JSONL lines skipped).

    `task` is "classification", "causal-lm" (labels are not read) or "auto": classification if a label column is named
    or the first row has one called "label". `text` and `label` are column names; None for `label` means "label".

    Raises:
        InputError: unreadable, empty or malformed file, missing column, empty text, or a label that is no string or
            integer; the message names the file and the line.
    """
    records = _records(path)
    if task == "auto" and label is None and "label" not in records[0][1]:
        task = "causal-lm"
    columns = (text,) if task == "causal-lm" else (text, label or "label")
    rows = []
    for line, record in records:
        where = f"{path} line {line}"
        for column in columns:
            if column not in record:
                raise InputError(f"{where}: no column {column!r}, only {', '.join(map(repr, record)) or 'none'}")
        value = record[text]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: column {text!r} is {json.dumps(value)}, wanted a non-empty string")
        name = None if task == "causal-lm" else _label(record[columns[1]], f"{where}: column {columns[1]!r}")
        rows.append(Row(value, name, line))
    return rows


def label_names(rows: list[Row], path: Path) -> list[str]:
    """The labels in order of their ids: numerically if all are integers, else alphabetically."""
    labels = {row.label for row in rows if row.label is not None}
    if len(labels) < 2:
        raise InputError(f"{path}: every row has the label {next(iter(labels))!r}, wanted at least two classes")
    try:
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)


def split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, evaluation): `fraction` of each class to the evaluation part, drawn with `seed`.

    Equal texts stay on one side. A class whose share rounds to nothing goes to the training part whole.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.text, []).append(row)
    classes: dict[str | None, list[list[Row]]] = {}
    for group in groups.values():
        classes.setdefault(group[0].label, []).append(group)
    generator = random.Random(seed)
    train: list[Row] = []
    held_out: list[Row] = []
    for members in classes.values():
        generator.shuffle(members)
        count = min(round(fraction * len(members)), len(members) - 1)
        held_out.extend(row for group in members[:count] for row in group)
        train.extend(row for group in members[count:] for row in group)
    return train, held_out


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
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


@dataclass(frozen=True)
class Collator:
    """Pads token ids to the longest example of the batch; labels are class ids, or for causal LM the tokens."""

    pad_id: int
    causal: bool

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), width), self.pad_id)
        mask = torch.zeros((len(examples), width), dtype=torch.int64)
        for i, example in enumerate(examples):
            tokens = torch.tensor(example["input_ids"])
            ids[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.causal:
            # By the mask, not by the pad id: many models pad with their end-of-text token, which has to be learned.
            labels = ids.masked_fill(mask == 0, -100)
            # Nothing predicts the first token, yet Trainer would count it when it averages the loss.
            labels[:, 0] = -100
            batch["labels"] = labels
        else:
            batch["labels"] = torch.tensor([example["label"] for example in examples])
        return batch
