"""`peftops finetune` from the command line to the adapter on disk."""

import copy
import importlib.util
import json
import math
import subprocess
import sys

import peftops
import pytest
import torch
from peft import PeftModel
from peftops.cli import main, training
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .conftest import sentences, write_jsonl

RESULTS = ["adapter", "metrics.json", "plot.png", "steps.jsonl", "table.txt"]


def finetune(model, data, output, *options):
    return main(["finetune", "--model", str(model), "--data", str(data), "--output", str(output), *map(str, options)])


def read_steps(output):
    steps = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in step.items() if k not in timing(step)} for step in steps]


def timing(step):
    return {
        "seconds",
        "tokens_per_second",
        "memory_bytes",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    }


def fails(capsys, *arguments):
    capsys.readouterr()
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("peftops: error: ")
    return lines[0]


def test_classification_learns_and_its_adapter_loads_in_hugging_face_peft(llama, tmp_path, capsys):
    data = write_jsonl(tmp_path / "d.jsonl", sentences(120))
    output = tmp_path / "run"
    assert finetune(llama, data, output, "--epochs", 5, "--lr", 1e-2, "--rank", 4, "--alpha", 8) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == RESULTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "run"]
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9
    assert (metrics["training_texts"], metrics["evaluation_texts"]) == (96, 24)
    assert metrics["labels"] == ["animal", "metal"]
    assert metrics["peak_memory_bytes"] > 2**20 and 0 < metrics["seconds_per_step"] < 10
    # rank * (in + out) of the seven projections of two layers, and the head [2, 32].
    layer = 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert metrics["trainable_parameters"] == 2 * layer + 64
    for text in ("trainable parameters", "peak memory", "time per step", f"{metrics['accuracy']:.2%}"):
        assert text in printed
    steps = read_steps(output)
    assert [step["step"] for step in steps if "loss" in step] == list(range(1, 31))
    assert [step["step"] for step in steps if "eval_loss" in step] == [0, 6, 12, 18, 24, 30]
    assert steps[-1]["eval_accuracy"] == metrics["accuracy"]

    config = json.loads((output / "adapter" / "config.json").read_text())
    assert config["id2label"] == {"0": "animal", "1": "metal"}
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2, pad_token_id=3)
    model = PeftModel.from_pretrained(copy.deepcopy(base), output / "adapter").eval()
    peftops.load(base.eval(), output / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = sentences(200)[120:]
    correct = 0
    for row in rows:
        with torch.no_grad():
            inputs = tokenizer(row["text"], return_tensors="pt")
            logits = model(**inputs).logits
            torch.testing.assert_close(base(**inputs).logits, logits)
        correct += config["id2label"][str(logits.argmax(-1).item())] == row["label"]
    assert correct / len(rows) >= 0.8


def test_modules_without_pretrained_weights_are_trained_and_saved_whole(bert, labelled, tmp_path):
    # The checkpoint is a masked LM: it has neither the pooler nor the classifier.
    output = tmp_path / "run"
    assert finetune(bert, labelled, output, "--epochs", 1, "--target-modules", "query", "dense") == 0
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == ["bert.pooler.dense", "classifier"]
    assert config["task_type"] == "SEQ_CLS"
    tokenizer = AutoTokenizer.from_pretrained(bert)
    inputs = tokenizer("the old cat", return_tensors="pt")
    logits = []
    for seed in (1, 2):  # what the file does not bring would differ
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        logits.append(PeftModel.from_pretrained(base, output / "adapter").eval()(**inputs).logits)
    assert torch.equal(*logits)


def test_causal_lm_perplexity_is_that_of_the_saved_adapter(llama, unlabelled, tmp_path):
    evaluation = write_jsonl(tmp_path / "e.jsonl", sentences(10, seed=9))
    output = tmp_path / "run"
    options = ("--eval-data", evaluation, "--epochs", 2, "--lr", 1e-2, "--target-modules", "q_proj", "v_proj")
    assert finetune(llama, unlabelled, output, *options) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["labels"] is None
    first = next(step for step in read_steps(output) if "eval_perplexity" in step)
    assert metrics["perplexity"] < first["eval_perplexity"]

    base = AutoModelForCausalLM.from_pretrained(llama)
    model = PeftModel.from_pretrained(base, output / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    loss = tokens = 0
    for row in sentences(10, seed=9):
        ids = tokenizer(row["text"] + " [SEP]", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert metrics["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert metrics["evaluation_loss"] == pytest.approx(loss / tokens, rel=1e-4)


def test_bad_arguments_are_one_line(bert, labelled, tmp_path, capsys):
    def run(*options, model=bert, data=labelled):
        return fails(capsys, "finetune", "--model", model, "--data", data, "--output", tmp_path / "run", *options)

    assert "the following arguments are required: --model" in fails(capsys, "finetune")
    assert "invalid choice: 'finetun'" in fails(capsys, "finetun")
    positive = ("rank", "alpha", "epochs", "batch-size", "lr", "max-length", "save-steps", "max-steps", "eval-steps")
    for option in (*positive, "early-stopping", "logging-steps", "gradient-accumulation-steps"):
        for value in ("0", "-1", "many", "nan"):
            assert f"argument --{option}: got '{value}', wanted a positive" in run(f"--{option}={value}")
    for option in ("weight-decay", "max-grad-norm"):
        assert f"argument --{option}: got '-1', wanted a number from 0" in run(f"--{option}=-1")
    assert "--warmup-ratio: got '1'" in run("--warmup-ratio", "1")
    assert "invalid choice: 'sine'" in run("--lr-scheduler", "sine")
    assert "invalid choice: 'int8'" in run("--adapter-dtype", "int8")
    assert "--init: init is 'magic'" in run("--init", "magic")
    assert "with exclude" in run("--target-modules", "query", "--exclude-modules", "query")
    assert "with layers_to_transform" in run("--layers-to-transform", "7")
    assert "--modules-to-save: " in run("--modules-to-save", "nose")
    assert "unrecognized arguments: --ran" in run("--ran", "8")
    assert "--dropout: got '1'" in run("--dropout", "1")
    assert "--eval-fraction: got '1'" in run("--eval-fraction", "1")
    assert "--seed: got '-1'" in run("--seed=-1")
    assert "invalid choice: 'dora'" in run("--method", "dora")
    assert f"--model {tmp_path}/none: no such directory" in run(model=tmp_path / "none")
    assert "the directory has no config.json" in run(model=tmp_path)
    assert "is a file, wanted a model directory" in run(model=labelled)
    assert "--target-modules: target_modules ('nose',) chooses no layer" in run("--target-modules", "nose")
    assert "--max-length 64: the model takes at most 32 tokens" in run("--max-length", "64")
    assert "no column 'topic'" in run("--label-column", "topic")
    assert "leaves none to evaluate on" in run("--eval-fraction", "0.001")
    one_class = write_jsonl(tmp_path / "one.jsonl", [{"text": f"cat {i}", "label": "animal"} for i in range(9)])
    assert "one.jsonl: every row has the label 'animal'" in run(data=one_class)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "a cat", "label": "plant"}])
    assert "other.jsonl line 1: label 'plant' does not occur in" in run("--eval-data", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labelled.jsonl", "one.jsonl", "other.jsonl"]


def test_a_broken_model_directory_is_one_line(bert, labelled, tmp_path, capsys):
    def run(model):
        return fails(capsys, "finetune", "--model", model, "--data", labelled, "--output", tmp_path / "run")

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    assert "no usable configuration" in run(broken)
    (broken / "config.json").write_text('{"model_type": "perceptron"}')
    assert "no usable configuration" in run(broken)
    (broken / "config.json").write_bytes((bert / "config.json").read_bytes())
    assert "no usable tokenizer" in run(broken)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (broken / name).write_bytes((bert / name).read_bytes())
    assert "no usable model" in run(broken)
    (broken / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:-100])
    assert "no usable model" in run(broken)
    assert not (tmp_path / "run.partial").exists()


def test_a_hub_name_without_a_hub_is_one_line(labelled, tmp_path, capsys, monkeypatch):
    from peftops.cli import model

    monkeypatch.setattr(model, "hub_unreachable", lambda: True)
    arguments = ("finetune", "--model", "nobody/nothing", "--data", labelled, "--output", tmp_path / "run")
    assert "--model nobody/nothing: no such directory, and no configuration of that name" in fails(capsys, *arguments)


def test_a_diverging_run_stops_with_one_line(bert, labelled, tmp_path, capsys, monkeypatch):
    original = training.AdapterTrainer.training_step
    monkeypatch.setattr(training.AdapterTrainer, "training_step", lambda *a, **k: original(*a, **k) * float("nan"))
    capsys.readouterr()
    assert finetune(bert, labelled, tmp_path / "run") == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "peftops: error: the loss is nan at step 1: try a lower --lr"
    )
    assert not (tmp_path / "run").exists()


def test_a_text_without_tokens_is_named_by_its_line(llama, tmp_path, capsys):
    rows = [{"text": row["text"]} for row in sentences(9)]
    data = write_jsonl(tmp_path / "d.jsonl", [*rows, {"text": "\u200b"}])
    arguments = ("finetune", "--model", llama, "--data", data, "--output", tmp_path / "run", "--max-length", 1)
    assert "d.jsonl line " in fails(capsys, *arguments)


def test_a_missing_package_is_one_line(bert, labelled, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    arguments = ("finetune", "--model", bert, "--data", labelled, "--output", tmp_path / "run")
    assert fails(capsys, *arguments) == (
        "peftops: error: the package 'matplotlib' is not installed: pip install 'peftops[hf]'"
    )


def test_the_module_is_the_command(tmp_path):
    command = [sys.executable, "-m", "peftops", "finetune", "--model", "./none", "--data", "d.csv", "--output", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "peftops: error: d.csv: cannot be read (No such file or directory)\n"
