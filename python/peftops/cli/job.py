"""One training run from settings to measured results; the command line and the demo both go through here."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import data
from .errors import InputError
from .model import Loaded, first_line, load, training_device

DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """What a run is a function of, beside the contents of its files; the fields are options of `peftops finetune`."""

    model: str
    data: str
    task: str = "auto"
    text_column: str = "text"
    label_column: str | None = None
    eval_data: str | None = None
    eval_fraction: float = 0.2
    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    epochs: int = 3
    batch_size: int = 16
    lr: float = 2e-4
    max_length: int | None = None
    save_steps: int = 500
    seed: int = 0

    @property
    def lora_alpha(self) -> float:
        """Numerator of the scale alpha / rank; the rank if none is set."""
        return self.rank if self.alpha is None else self.alpha

    def as_json(self) -> dict:
        values = dataclasses.asdict(self)
        values["target_modules"] = None if self.target_modules is None else list(self.target_modules)
        return values


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
    """The texts as token ids (`input_ids`, for classification also `label`), ready for the collator."""

    train: list[dict]
    evaluation: list[dict]
    collator: data.Collator
    metric: str


@dataclass(frozen=True)
class Tuned:
    """A model prepared for training: which method, its optimizer and how its trained part is written to a directory."""

    model: torch.nn.Module
    description: str
    optimizer: torch.optim.Optimizer
    save: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """`history`: Trainer's log entries; `numbers`: what was measured, ready for metrics.json."""

    history: list[dict]
    numbers: dict


def read_texts(settings: Settings) -> Texts:
    """Read and split the data of a run.

    Raises:
        InputError: as `data.read`; fewer than two classes; an empty side; an evaluation label unknown to training.
    """
    path = Path(settings.data)
    rows = data.read(path, settings.task, settings.text_column, settings.label_column)
    labels = None if rows[0].label is None else data.label_names(rows, path)
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
    for row in evaluation:
        if labels is not None and row.label not in labels:
            raise InputError(f"{eval_path} line {row.line}: label {row.label!r} does not occur in {path}")
    return Texts(rows, evaluation, labels)


def prepare(settings: Settings, texts: Texts) -> Loaded:
    """Seed torch's generator and load the model.

    Raises:
        InputError: as `model.load`.
    """
    from transformers import set_seed

    set_seed(settings.seed)
    return load(settings.model, texts.labels, training_device())


def lora(settings: Settings, loaded: Loaded) -> Tuned:
    """Attach LoRA to the chosen layers; a new classification head is trained and saved beside it (`modules_to_save`).

    Raises:
        InputError: `--target-modules` matches nothing, or the method refuses the model.
    """
    import peftops

    model = loaded.model
    half = model.dtype in (torch.bfloat16, torch.float16)
    for name in loaded.head:
        model.get_submodule(name).to(torch.float32)  # what is trained is float32; autocast makes the products
    method = peftops.LoRA(
        rank=settings.rank,
        alpha=settings.lora_alpha,
        dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=loaded.head,
        adapter_dtype=torch.float32 if half else None,
    )
    try:
        tuning = peftops.attach(model, method)
    except (ValueError, TypeError) as error:
        option = "--model" if settings.target_modules is None else "--target-modules"
        raise InputError(f"{option}: {first_line(error)}") from None

    def save(folder: Path) -> None:
        tuning.save(folder)
        if loaded.head:
            model.config.save_pretrained(folder)  # the number of labels and their names

    dropout = f", dropout {settings.dropout:g}" if settings.dropout else ""
    description = f"LoRA, rank {settings.rank}, alpha {settings.lora_alpha:g}{dropout}"
    return Tuned(model, description, tuning.optimizer(lr=settings.lr), save)


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
    causal = texts.labels is None
    number = {label: i for i, label in enumerate(texts.labels or ())}
    end = loaded.tokenizer.eos_token_id

    def tokenize(strings: list[str]) -> list[list[int]]:
        return loaded.tokenizer(strings, truncation=True, max_length=length)["input_ids"]

    def side(rows: list[data.Row], path: str) -> list[dict]:
        examples = []
        for row, ids in zip(rows, tokenize([row.text for row in rows]), strict=True):
            # The model is to learn where a text ends; a text that was cut has no end.
            if causal and end is not None and len(ids) < length and ids[-1:] != [end]:
                ids = [*ids, end]
            if len(ids) < (2 if causal else 1):
                raise InputError(f"{path} line {row.line}: {row.text!r} gives the tokens {ids}, too few to learn from")
            examples.append({"input_ids": ids} if causal else {"input_ids": ids, "label": number[row.label]})
        return examples

    evaluation = side(texts.evaluation, settings.eval_data or settings.data)
    evaluation.sort(key=lambda example: len(example["input_ids"]))
    collator = data.Collator(loaded.tokenizer.pad_token_id, causal)
    return Examples(side(texts.train, settings.data), evaluation, collator, texts.metric)


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[rows, 2]: summed negative log likelihood and count of predicted tokens: perplexity weighs tokens equally."""
    shifted = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), shifted, ignore_index=-100, reduction="none"
    )
    return torch.stack([losses.sum(1), (shifted != -100).sum(1).float()], dim=1)


def _metric_functions(causal: bool):
    def reduce(logits, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return _token_losses(logits, labels) if causal else logits.argmax(-1)

    def compute(prediction) -> dict[str, float]:
        if causal:
            loss, tokens = prediction.predictions.astype("float64").sum(0)
            return {"perplexity": math.exp(min(loss / tokens, 700.0))}
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    return reduce, compute


def fit(settings: Settings, examples: Examples, tuned: Tuned, work: Path, checkpoint: Path | None) -> Outcome:
    """Train and evaluate; writes `steps.jsonl` and the checkpoints under `work`.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    from transformers import PrinterCallback

    from .training import AdapterTrainer, EpochCheckpoint, OneDevice, PeakMemory, Progress, StepLog, saved_for_backward

    device = training_device()
    arguments = OneDevice(
        output_dir=str(work / "checkpoints"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="linear",
        warmup_ratio=0.06,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        eval_on_start=checkpoint is None,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        bf16=tuned.model.dtype == torch.bfloat16,
        fp16=tuned.model.dtype == torch.float16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    reduce, compute = _metric_functions(examples.collator.causal)
    trainer = AdapterTrainer(
        model=tuned.model,
        args=arguments,
        data_collator=examples.collator,
        train_dataset=examples.train,
        eval_dataset=examples.evaluation,
        sampler=data.LengthGroupedSampler(
            [len(example["input_ids"]) for example in examples.train], settings.batch_size, settings.seed
        ),
        optimizers=(tuned.optimizer, None),
        compute_metrics=compute,
        preprocess_logits_for_metrics=reduce,
        callbacks=[StepLog(work / "steps.jsonl"), EpochCheckpoint(), Progress(settings.method, examples.metric)],
    )
    trainer.remove_callback(PrinterCallback)
    memory = PeakMemory(device)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    peak = memory.read()
    longest = sorted(examples.train, key=lambda example: -len(example["input_ids"]))[: settings.batch_size]
    batch = {name: tensor.to(device) for name, tensor in examples.collator(longest).items()}
    with trainer.compute_loss_context_manager():
        saved = saved_for_backward(tuned.model, batch)
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    last = [entry for entry in history if "eval_loss" in entry][-1]
    trainable = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in tuned.model.parameters())
    numbers = {
        "method": tuned.description,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
        "peak_memory_bytes": peak,
        "saved_for_backward_bytes": saved,
        "seconds_per_step": statistics.median(entry["seconds"] for entry in history if "loss" in entry),
        "steps": trainer.state.global_step,
        examples.metric: last[f"eval_{examples.metric}"],
        "evaluation_loss": last["eval_loss"],
        "training_texts": len(examples.train),
        "evaluation_texts": len(examples.evaluation),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return Outcome(history, numbers)
