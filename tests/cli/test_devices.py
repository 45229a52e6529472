"""Where a run trains: on one GPU where the CUDA kernels are loaded, else on the CPU, and never on several."""

import json

import pytest
import torch
from peftops.cli import finetune, main, model
from transformers import TrainingArguments

MISSING = "peftops was built without nvcc"


@pytest.mark.parametrize(
    ("visible", "error", "device"),
    [(False, MISSING, "cpu"), (False, None, "cpu"), (True, MISSING, "cpu"), (True, None, "cuda:0")],
)
def test_a_gpu_is_used_where_there_is_one_and_the_kernels_are_loaded(monkeypatch, visible, error, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(model, "cuda_error", lambda: error)
    assert model.training_device() == torch.device(device)


def run(llama, labelled, output) -> dict:
    command = ["finetune", "--model", str(llama), "--data", str(labelled), "--output", str(output), "--epochs", "1"]
    assert main(command) == 0
    return json.loads((output / "metrics.json").read_text())


def test_several_gpus_change_neither_steps_nor_batch(llama, labelled, tmp_path, monkeypatch):
    one = run(llama, labelled, tmp_path / "one")
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    several = run(llama, labelled, tmp_path / "several")
    assert several["steps"] == one["steps"] > 1
    assert several["evaluation_loss"] == one["evaluation_loss"]


def test_a_gpu_that_stays_idle_is_explained(llama, labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune, "cuda_error", lambda: MISSING)
    monkeypatch.setattr(finetune, "training_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def stop(*_):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "encode", stop)
    command = ["finetune", "--model", str(llama), "--data", str(labelled), "--output", str(tmp_path / "run")]
    assert main(command) == 130
    assert f"note: training on the CPU, because {MISSING}" in capsys.readouterr().err
