"""`peftops finetune`: tune a Hugging Face model on a file of texts."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import sys
from pathlib import Path

from peftops._load import cuda_error

from .errors import InputError
from .job import Settings, encode, fit, lora, prepare, read_texts
from .model import training_device
from .output import OutputDirectory, write_json, write_text

DESCRIPTION = """Fine-tune a Hugging Face model on a JSONL or CSV file: classification if the rows have a label, else
causal language modelling. Writes adapter/ (Hugging Face PEFT's files), metrics.json, steps.jsonl, plot.png and
table.txt."""


def _number(kind, wanted: str, accept):
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
_seed = _number(int, "an integer from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32)
_positive = _number(float, "a positive number", lambda value: 0 < value < math.inf)
_fraction = _number(float, "a number above 0 and below 1", lambda value: 0 < value < 1)
_probability = _number(float, "a number from 0 to below 1", lambda value: 0 <= value < 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = Settings(model="", data="")
    add = parser.add_argument
    add("--model", required=True, help="directory of a Hugging Face model, or its name on the hub")
    add("--data", required=True, help="training file, .jsonl or .csv")
    add("--output", required=True, type=Path, help="directory for the results; it appears when they are complete")
    add("--task", choices=["auto", "classification", "causal-lm"], default=default.task,
        help="auto (default): classification if the data has a label column")  # fmt: skip
    add("--text-column", default=default.text_column, help="default: %(default)s")
    add("--label-column", help="default: label")
    add("--eval-data", help="evaluation file; default: a part of --data, drawn with --seed, equal in every class")
    add("--eval-fraction", type=_fraction, default=default.eval_fraction, help="that part; default: %(default)s")
    add("--method", choices=["lora"], default=default.method)
    add("--rank", type=_count, default=default.rank, help="default: %(default)s")
    add("--alpha", type=_positive, help="the update is scaled by alpha / rank; default: the rank")
    add("--dropout", type=_probability, default=default.dropout, help="on the adapters' input; default: %(default)s")
    add("--target-modules", nargs="+", metavar="NAME", help="last parts of layer names; default: every linear layer")
    add("--epochs", type=_count, default=default.epochs, help="default: %(default)s")
    add("--batch-size", type=_count, default=default.batch_size, help="default: %(default)s")
    add("--lr", type=_positive, default=default.lr, help="learning rate after warm-up; default: %(default)s")
    add("--max-length", type=_count, help="longer texts are cut; default: 256 tokens, less if the model takes less")
    add("--save-steps", type=_count, default=default.save_steps,
        help="steps between checkpoints, beside one per epoch; default: %(default)s")  # fmt: skip
    add("--seed", type=_seed, default=default.seed, help="default: %(default)s")
    add("--resume", action="store_true", help="continue the interrupted run of the same --output and settings")
    add("--overwrite", action="store_true", help="replace the results of an earlier run in --output")


def require_packages(*more: str) -> None:
    """Raise InputError naming the first package that is not installed, of the `hf` extra and `more`."""
    for package in ("transformers", "accelerate", "safetensors", "matplotlib", *more):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the package {package!r} is not installed: pip install 'peftops[hf]'")


def quiet() -> None:
    """Silence transformers' own progress lines and hints: the bar, the table and our errors say it."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="mtime may not be reliable")  # checkpoints are then told apart by number
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _digest(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run(settings: Settings, output: OutputDirectory) -> dict:
    """Do the run and publish its results; returns what metrics.json holds.

    Raises:
        InputError: something in the settings or their files cannot work.
        DivergedError: the loss became NaN or infinite.
    """
    import torch

    require_packages()
    texts = read_texts(settings)
    quiet()
    loaded = prepare(settings, texts)
    if torch.cuda.is_available() and training_device().type == "cpu":
        print(f"peftops: note: training on the CPU, because {cuda_error()}", file=sys.stderr)
    examples = encode(settings, texts, loaded)
    tuned = lora(settings, loaded)
    described = {
        **settings.as_json(),
        "data_sha256": _digest(settings.data),
        "eval_sha256": _digest(settings.eval_data),
    }
    output.begin(described)
    outcome = fit(settings, examples, tuned, output.work, output.last_checkpoint())
    return write_results(output, described, texts, tuned, outcome)


def write_results(output: OutputDirectory, described: dict, texts, tuned, outcome) -> dict:
    """Adapter, metrics, plot and table into the work directory, then all of it into its place."""
    import torch
    import transformers

    from .report import plot, table

    tuned.save(output.work / "adapter")
    metrics = {
        **outcome.numbers,
        "labels": texts.labels,
        "settings": described,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_json(output.work / "metrics.json", metrics)
    plot(output.work / "plot.png", {tuned.description: outcome.history}, texts.metric)
    write_text(output.work / "table.txt", table([metrics], texts.metric))
    output.publish()
    return metrics


def main(arguments: argparse.Namespace) -> int:
    from .report import table

    values = vars(arguments)
    fields = Settings.__dataclass_fields__
    settings = Settings(**{name: values[name] for name in fields})
    if settings.target_modules is not None:
        settings = Settings(**{**settings.__dict__, "target_modules": tuple(settings.target_modules)})
    output = OutputDirectory(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    try:
        metrics = run(settings, output)
    except KeyboardInterrupt:
        print(f"\npeftops finetune: interrupted, continue with --resume (state in {output.work})", file=sys.stderr)
        return 130
    print(table([metrics], "accuracy" if metrics["labels"] else "perplexity"), end="")
    print(f"results in {output.path}")
    return 0
