"""What a run is a function of, and the options of `peftops finetune` that set it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """A run's settings, beside the contents of its files; the fields are options of `peftops finetune`."""

    model: str
    data: str
    task: str = "auto"
    text_column: str = "text"
    label_column: str | None = None
    completion_only: bool = False
    eval_data: str | None = None
    eval_fraction: float = 0.2
    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    use_rslora: bool = False
    init: str = "kaiming"
    bias: str = "none"
    adapter_dtype: str | None = None
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    lr: float = 2e-4
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    max_length: int | None = None
    packing: bool = False
    eval_steps: int | None = None
    early_stopping: int | None = None
    logging_steps: int = 1
    save_steps: int = 500
    seed: int = 0

    @property
    def lora_alpha(self) -> float:
        """Numerator of the scale alpha / rank; the rank if none is set."""
        return self.rank if self.alpha is None else self.alpha

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Settings:
        """The settings that a parsed command line gives."""
        values = {name: getattr(arguments, name) for name in cls.__dataclass_fields__}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def as_json(self) -> dict:
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def as_words(self) -> list[str]:
        """The options that set what differs from the defaults."""
        default = Settings(model="", data="").as_json()
        words = []
        for name, value in self.as_json().items():
            if value == default[name]:
                continue
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return words


def _number(kind: Callable, wanted: str, accept: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accept(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted {wanted}")
        return value

    return parse


_count = _number(int, "a positive integer", lambda value: value > 0)
_index = _number(int, "an integer from 0", lambda value: value >= 0)
_seed = _number(int, "an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
_positive = _number(float, "a positive number", lambda value: 0 < value < math.inf)
_not_negative = _number(float, "a number from 0", lambda value: 0 <= value < math.inf)
_fraction = _number(float, "a number above 0 and below 1", lambda value: 0 < value < 1)
_probability = _number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings(model="", data="")

    def option(group, name: str, text: str | None = None, **how) -> None:
        value = getattr(default, name)
        shown = "default: %(default)s" if value is not None else ""
        how.setdefault("help", "; ".join(filter(None, (text, shown))))
        group.add_argument("--" + name.replace("_", "-"), default=value, **how)

    def flag(group, name: str, text: str) -> None:
        group.add_argument(
            "--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, default=False, help=text
        )

    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML file with these options; the command line wins over it")
    add("--model", required=True, help="directory of a Hugging Face model, or its name on the hub")
    add("--data", required=True, help="training file: .jsonl, .csv or .parquet")
    add("--output", required=True, type=Path, help="directory for the results; it appears when they are complete")
    flag(parser, "resume", "continue the interrupted run of the same --output and settings")
    flag(parser, "overwrite", "replace the results of an earlier run in --output")

    data = parser.add_argument_group("data")
    option(data, "task", "auto: classification if the data has a label column",
           choices=["auto", "classification", "causal-lm"])  # fmt: skip
    option(data, "text_column", "rows without it may have 'messages', which the tokenizer's chat template renders")
    option(data, "label_column", "default: label")
    flag(data, "completion_only", "learn the assistant's messages only, not the whole conversation")
    option(data, "eval_data", "evaluation file; default: a part of --data, drawn with --seed, equal in every class")
    option(data, "eval_fraction", "that part", type=_fraction)
    option(data, "max_length", "longer texts are cut; default: 256 tokens, less if the model takes less", type=_count)
    flag(data, "packing", "several texts in one row of --max-length tokens, none attends to another")

    method = parser.add_argument_group("method")
    option(method, "method", choices=["lora"])
    option(method, "rank", type=_count)
    option(method, "alpha", "the update is scaled by alpha / rank; default: the rank", type=_positive)
    option(method, "dropout", "on the adapters' input", type=_probability)
    names = {"nargs": "+", "metavar": "NAME"}
    option(method, "target_modules", "last parts of layer names; default: every linear layer", **names)
    option(method, "exclude_modules", "last parts of the names of layers to leave alone", **names)
    option(method, "layers_to_transform", "numbers of the model's layers to adapt; default: all",
           type=_index, nargs="+", metavar="N")  # fmt: skip
    option(method, "modules_to_save", "modules that are trained whole and saved with the adapter", **names)
    flag(method, "use_rslora", "scale by alpha / sqrt(rank)")
    option(method, "init", "how the factors start: kaiming, gaussian, orthogonal, pissa, pissa_niter_<k>, olora")
    option(method, "bias", "which biases are trained", choices=["none", "all", "lora_only"])
    option(method, "adapter_dtype", "of the factors; default: float32", choices=["float32", "bfloat16"])

    training = parser.add_argument_group("training")
    option(training, "epochs", type=_count)
    option(training, "max_steps", "optimizer steps, instead of --epochs", type=_count)
    option(training, "batch_size", "rows per process and forward pass", type=_count)
    option(training, "gradient_accumulation_steps", "forward passes per optimizer step", type=_count)
    option(training, "lr", "learning rate after warm-up", type=_positive)
    option(training, "lr_scheduler", "the learning rate after warm-up", choices=["linear", "cosine", "constant"])
    option(training, "warmup_ratio", "part of the steps in which the learning rate rises", type=_probability)
    option(training, "weight_decay", "of AdamW", type=_not_negative)
    option(training, "max_grad_norm", "larger gradients are scaled down to it; 0: never", type=_not_negative)
    flag(training, "gradient_checkpointing", "compute activations again in backward: less memory, more time")
    option(training, "eval_steps", "steps between evaluations; default: one per epoch", type=_count)
    option(training, "early_stopping", "stop after this many evaluations without a lower loss, and keep the best state",
           type=_count, metavar="N")  # fmt: skip
    option(training, "logging_steps", "steps between lines of steps.jsonl", type=_count)
    option(training, "save_steps", "steps between checkpoints, beside one per epoch", type=_count)
    option(training, "seed", type=_seed)
