"""One training run up to the training: its texts, its model, its adapter, its tokens. `fit` does the rest."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from peftops.methods.targets import find_modules
from peftops.nn.adapter import name_of

from . import chat, data, packing, processes
from .batches import IGNORED, Collator
from .errors import InputError
from .model import Loaded, first_line, load, training_device
from .settings import Settings

DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class Texts:
    """The examples of a run; `labels` in order of their ids, None for causal LM."""

    train: list[data.Row]
    evaluation: list[data.Row]
    labels: list[str] | None

    @property
    def metric(self) -> str:
        return "perplexity" if self.labels is None else "accuracy"


@dataclass(frozen=True)
class Examples:
    """The texts as the collator takes them. `texts`: how many the training part holds, which packing joins to rows."""

    train: list[dict]
    evaluation: list[dict]
    collator: Collator
    metric: str
    texts: int


@dataclass(frozen=True)
class Tuned:
    """A model prepared for training: which method, its optimizer and how its trained part is written to a directory."""

    model: torch.nn.Module
    description: str
    optimizer: torch.optim.Optimizer
    save: Callable[[Path], object]


def read_texts(settings: Settings) -> Texts:
    """Read and split the data of a run.

    Raises:
        InputError: as `data.read`; fewer than two classes; an empty side; an evaluation label unknown to training.
    """
    path = Path(settings.data)
    rows = data.read(path, settings.task, settings.text_column, settings.label_column)
    labels = None if rows[0].label is None else data.label_names(rows, path)
    if labels is not None and settings.packing:
        raise InputError("--packing: for causal-lm only, but the data has labels (--task causal-lm ignores them)")
    if settings.completion_only and rows[0].messages is None:
        raise InputError(f"--completion-only: wanted rows with a column {data.MESSAGES!r} in {path}")
    if settings.eval_data is None:
        train, evaluation = data.split(rows, settings.eval_fraction, settings.seed)
        if not evaluation:
            raise InputError(
                f"{path}: --eval-fraction {settings.eval_fraction:g} of {len(rows)} examples leaves none to evaluate "
                "on, give a larger one or --eval-data"
            )
        return Texts(train, evaluation, labels)
    eval_path = Path(settings.eval_data)
    task = "causal-lm" if labels is None else "classification"
    evaluation = data.read(eval_path, task, settings.text_column, settings.label_column)
    if (rows[0].messages is None) != (evaluation[0].messages is None):
        raise InputError(f"{eval_path}: wanted rows of the same kind as in {path}, texts or conversations")
    for row in evaluation:
        if labels is not None and row.label not in labels:
            raise InputError(f"{data.place(eval_path, row.line)}: label {row.label!r} does not occur in {path}")
    return Texts(rows, evaluation, labels)


def prepare(settings: Settings, texts: Texts) -> Loaded:
    """Seed torch's generator and load the model.

    Raises:
        InputError: as `model.load`; the model cannot do what the settings ask for.
    """
    from transformers import set_seed

    set_seed(settings.seed)
    loaded = load(settings.model, texts.labels, training_device())
    if settings.gradient_checkpointing and not loaded.model.supports_gradient_checkpointing:
        raise InputError(f"--gradient-checkpointing: {type(loaded.model).__name__} does not support it")
    if texts.train[0].messages is not None:
        chat.check_template(loaded.tokenizer, settings.model)
    if settings.packing:
        packing.check(loaded.model, settings.model)
    return loaded


def lora(settings: Settings, loaded: Loaded) -> Tuned:
    """Attach LoRA to the chosen layers; a new classification head is trained and saved beside it (`modules_to_save`).

    Raises:
        InputError: a setting that the method or the model refuses.
    """
    import peftops

    model = loaded.model
    whole = (*loaded.head, *(settings.modules_to_save or ()))
    half = model.dtype in (torch.bfloat16, torch.float16)
    if half and settings.bias != "none":
        kind = name_of(model.dtype)
        raise InputError(f"--bias {settings.bias}: the model's biases are {kind}, too coarse to be trained")
    dtype = torch.float32 if half else None
    if settings.adapter_dtype is not None:
        dtype = getattr(torch, settings.adapter_dtype)
    try:
        method = peftops.LoRA(
            rank=settings.rank,
            alpha=settings.lora_alpha,
            dropout=settings.dropout,
            target_modules=settings.target_modules,
            exclude_modules=settings.exclude_modules,
            layers_to_transform=settings.layers_to_transform,
            use_rslora=settings.use_rslora,
            bias=settings.bias,
            init=settings.init,
            adapter_dtype=dtype,
            modules_to_save=whole or None,
        )
        for module in find_modules(model, whole).values():
            module.to(torch.float32)  # what is trained is float32; autocast makes the products
        tuning = peftops.attach(model, method)
    except (ValueError, TypeError) as error:
        raise InputError(f"{_option(first_line(error))}: {first_line(error)}") from None

    def save(folder: Path) -> None:
        tuning.save(folder)
        if loaded.head:
            model.config.save_pretrained(folder)  # the number of labels and their names

    dropout = f", dropout {settings.dropout:g}" if settings.dropout else ""
    description = f"LoRA, rank {settings.rank}, alpha {settings.lora_alpha:g}{dropout}"
    optimizer = tuning.optimizer(lr=settings.lr, weight_decay=settings.weight_decay)
    return Tuned(model, description, optimizer, save)


def _option(message: str) -> str:
    """The option that a refusal of the method is about: the one that it names first, else the model."""
    found = [
        (message.find(field.name), field.name)
        for field in dataclasses.fields(Settings)
        if field.name.count("_") and field.name in message
    ]
    for name in ("init", "rank"):
        if message.startswith(f"{name} "):
            found.append((0, name))
    return "--" + min(found)[1].replace("_", "-") if found else "--model"


def _text_length(settings: Settings, loaded: Loaded) -> int:
    """Longest text in tokens: `max_length`, by default 256 or what the model takes if that is less."""
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if settings.max_length is None:
        return DEFAULT_LENGTH if limit is None else min(DEFAULT_LENGTH, limit)
    if limit is not None and settings.max_length > limit:
        raise InputError(f"--max-length {settings.max_length}: the model takes at most {limit} tokens")
    return settings.max_length


def encode(settings: Settings, texts: Texts, loaded: Loaded) -> Examples:
    """Tokenize the texts, cut to `max_length`; evaluation examples in order of length, so that batches pad little.

    Raises:
        InputError: `max_length` is more than the model takes, or a text has too few tokens to learn from.
    """
    length = _text_length(settings, loaded)
    chats = texts.train[0].messages is not None
    side = _classified if texts.labels is not None else _chats if chats else _plain
    evaluation = side(settings, texts, loaded, length, texts.evaluation, settings.eval_data or settings.data)
    evaluation.sort(key=lambda example: len(example["input_ids"]))
    train = side(settings, texts, loaded, length, texts.train, settings.data)
    count = len(train)
    if settings.packing:
        train = packing.pack(train, length)
    return Examples(train, evaluation, Collator(loaded.tokenizer.pad_token_id), texts.metric, count)


def _tokens(loaded: Loaded, length: int, rows: list[data.Row]) -> list[list[int]]:
    return loaded.tokenizer([row.text for row in rows], truncation=True, max_length=length)["input_ids"]


def _classified(
    settings: Settings, texts: Texts, loaded: Loaded, length: int, rows: list[data.Row], path
) -> list[dict]:
    number = {label: i for i, label in enumerate(texts.labels)}
    examples = []
    for row, ids in zip(rows, _tokens(loaded, length, rows), strict=True):
        _check_length(ids, 1, row, path)
        examples.append({"input_ids": ids, "label": number[row.label]})
    return examples


def _plain(settings: Settings, texts: Texts, loaded: Loaded, length: int, rows: list[data.Row], path) -> list[dict]:
    end = loaded.tokenizer.eos_token_id
    examples = []
    for row, ids in zip(rows, _tokens(loaded, length, rows), strict=True):
        # The model is to learn where a text ends; a text that was cut has no end.
        if end is not None and len(ids) < length and ids[-1:] != [end]:
            ids = [*ids, end]
        _check_length(ids, 2, row, path)
        # Nothing predicts the first token, yet it would count when the loss is averaged.
        examples.append({"input_ids": ids, "labels": [IGNORED, *ids[1:]]})
    return examples


def _chats(settings: Settings, texts: Texts, loaded: Loaded, length: int, rows: list[data.Row], path) -> list[dict]:
    examples = []
    for row in rows:
        where = data.place(path, row.line)
        if settings.completion_only:
            ids, trained = chat.encode_completions(loaded.tokenizer, row.messages, where)
        else:
            ids = chat.encode(loaded.tokenizer, row.messages, where)
            trained = [True] * len(ids)
        _check_length(ids[:length], 2, row, path)
        labels = [token if learned else IGNORED for token, learned in zip(ids, trained, strict=True)]
        if any(label != IGNORED for label in labels[1:length]):
            examples.append({"input_ids": ids[:length], "labels": [IGNORED, *labels[1:length]]})
    left_out = len(rows) - len(examples)
    if not examples:
        raise InputError(f"{path}: --max-length {length} cuts off what is to be learned in every row")
    if left_out and processes.is_main():
        cut = f"{left_out} of {len(rows)} rows are left out: --max-length {length} cuts off what is to be learned"
        print(f"peftops: note: {path}: {cut}", file=sys.stderr)
    return examples


def _check_length(ids: list[int], wanted: int, row: data.Row, path) -> None:
    if len(ids) < wanted:
        where = data.place(path, row.line)
        raise InputError(f"{where}: {row.text!r} gives the tokens {ids}, too few to learn from")
