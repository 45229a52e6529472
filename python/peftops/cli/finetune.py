"""`peftops finetune`: tune a Hugging Face model on a file of texts."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

from peftops._load import cuda_error

from . import processes
from .errors import InputError
from .fit import fit
from .job import encode, lora, prepare, read_texts
from .model import training_device
from .output import OutputDirectory, write_json, write_text
from .settings import Settings, add_arguments

__all__ = ["DESCRIPTION", "add_arguments", "main", "quiet", "require_packages", "run"]

DESCRIPTION = """Fine-tune a Hugging Face model on a JSONL, CSV or parquet file: classification if the rows have a
label, else causal language modelling of texts or conversations. Writes adapter/ (Hugging Face PEFT's files),
metrics.json, steps.jsonl, plot.png and table.txt. Several processes: torchrun or accelerate launch."""


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


def run(settings: Settings, output: OutputDirectory) -> dict | None:
    """Do the run and publish its results; returns what metrics.json holds, in the main process.

    Raises:
        InputError: something in the settings or their files cannot work.
        DivergedError: the loss became NaN or infinite.
    """
    import torch

    require_packages()
    texts = read_texts(settings)
    quiet()
    loaded = prepare(settings, texts)
    if torch.cuda.is_available() and training_device().type == "cpu" and processes.is_main():
        print(f"peftops: note: training on the CPU, because {cuda_error()}", file=sys.stderr)
    examples = encode(settings, texts, loaded)
    tuned = lora(settings, loaded)
    described = {
        **settings.as_json(),
        "data_sha256": _digest(settings.data),
        "eval_sha256": _digest(settings.eval_data),
        "processes": processes.count(),
    }
    if processes.is_main():
        output.begin(described)
    processes.wait()
    outcome = fit(settings, examples, tuned, output.work, output.last_checkpoint())
    return write_results(output, described, texts, tuned, outcome) if processes.is_main() else None


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

    settings = Settings.of(arguments)
    output = OutputDirectory(arguments.output, resume=arguments.resume, overwrite=arguments.overwrite)
    processes.wait()  # nothing is written before every process has looked
    try:
        metrics = run(settings, output)
    except KeyboardInterrupt:
        processes.say_once(f"\npeftops finetune: interrupted, continue with --resume (state in {output.work})")
        return 130
    if metrics is not None:
        print(table([metrics], "accuracy" if metrics["labels"] else "perplexity"), end="")
        print(f"results in {output.path}")
    processes.wait()  # for the main process, which writes the results
    return 0
