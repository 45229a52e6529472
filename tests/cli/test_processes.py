"""Two processes on the CPU compute what one does with the same global batch, and speak with one voice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peftops.cli import main, processes
from safetensors.torch import load_file

from .conftest import sentences, write_jsonl
from .test_finetune import finetune, read_steps

ROOT = Path(__file__).resolve().parents[2]

# Runs under torchrun: a whole run, an interrupted one, and its continuation.
SCRIPT = """
import sys
from peftops.cli import main, training

model, data, folder, *options = sys.argv[1:]

def run(name, *more):
    return main(["finetune", "--model", model, "--data", data, "--output", f"{folder}/{name}", *options, *more])

assert run("whole") == 0
original, calls = training.AdapterTrainer.training_step, []

def interrupted(self, *args, **kwargs):
    calls.append(1)
    if len(calls) > 5:
        raise KeyboardInterrupt
    return original(self, *args, **kwargs)

training.AdapterTrainer.training_step = interrupted
assert run("parts") == 130
training.AdapterTrainer.training_step = original
assert run("parts", "--resume") == 0
"""


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # unset, torchrun sets it and says so
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=one_thread,
    )


def test_two_processes_train_like_one_and_resume_bit_for_bit(llama, tmp_path):
    """37 texts for training, 12 in a step: in the last step one process has one text and the other none."""
    data = write_jsonl(tmp_path / "d.jsonl", sentences(46))
    options = ("--task", "causal-lm", "--max-steps", 6, "--lr", 1e-2, "--save-steps", 1, "--batch-size")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    accumulated = ("--gradient-accumulation-steps", 2, "--early-stopping", 9)
    done = torchrun(script, llama, data, tmp_path, *options, 3, *accumulated)
    assert done.returncode == 0, done.stderr
    assert finetune(llama, data, tmp_path / "one", *options, 12) == 0

    one, whole, parts = (tmp_path / name for name in ("one", "whole", "parts"))
    numbers, expected = (json.loads((path / "metrics.json").read_text()) for path in (whole, one))
    assert (numbers["processes"], numbers["training_texts"], numbers["evaluation_texts"]) == (2, 37, 9)
    assert numbers["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    steps = read_steps(one)
    assert [step["step"] for step in steps if "loss" in step] == [1, 2, 3, 4, 5, 6]
    for single, double in zip(steps, read_steps(whole), strict=True):
        assert single["step"] == double["step"]
        for name in single.keys() & {"loss", "grad_norm", "learning_rate", "eval_loss", "eval_perplexity"}:
            assert double[name] == pytest.approx(single[name], rel=2e-3)
    adapters = [path / "adapter" / "adapter_model.safetensors" for path in (one, whole, parts)]
    torch.testing.assert_close(load_file(adapters[1]), load_file(adapters[0]), rtol=1e-3, atol=1e-5)
    assert adapters[2].read_bytes() == adapters[1].read_bytes() and read_steps(parts) == read_steps(whole)

    # One process speaks: a table per run, a line per evaluation, nothing of the launcher's or torch's.
    assert done.stdout.count("results in") == 2 and done.stdout.count("trainable parameters") == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert sum("interrupted, continue with --resume" in line for line in lines) == 1
    assert all(line.startswith(("lora: step", "peftops finetune: interrupted")) for line in lines), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "one", "parts", "script.py", "whole"]


def test_an_error_is_one_line_and_stops_both(llama, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [*sentences(9), {"text": "a cat"}])
    done = torchrun("-m", "peftops", "finetune", "--model", llama, "--data", data, "--output", tmp_path / "run")
    assert done.returncode != 0 and done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if line.startswith("peftops")]
    assert ours[0] == f"peftops: error: {data} line 10: no column 'label', only 'text'"
    assert [line for line in ours[1:] if "error" in line] == []
    assert 'File "' + str(ROOT / "python") not in done.stderr  # no traceback of ours
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_other_commands_run_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "begin", lambda: None)
    assert processes.count() == 1  # a name that other programs use
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes.count() == 2
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "peftops: error: only finetune runs in several processes\n"
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", str(tmp_path)]) == 2 and capsys.readouterr().err == ""  # the first one has said it


def test_accelerate_launch_starts_the_same_processes(llama, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", sentences(20))
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command = [*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "peftops", "finetune"]
    options = ["--model", llama, "--data", data, "--task", "causal-lm", "--max-steps", 2, "--batch-size"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, options), "2", "--output", tmp_path / "two"],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert finetune(*options[1:4:2], tmp_path / "one", *options[4:], 4) == 0
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
