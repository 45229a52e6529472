"""The course of training: resume, early stopping, accumulation, and the options that shape a step."""

import io
import json
import math
import re

import peftops
import pytest
import torch
from peftops.cli import finetune as command
from peftops.cli import job, training
from peftops.cli.callbacks import Progress
from peftops.cli.model import Loaded
from peftops.cli.settings import Settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from .test_finetune import RESULTS, fails, finetune, read_steps

pytestmark = pytest.mark.usefixtures("no_plot")
TENSORS = "adapter/adapter_model.safetensors"


def adapter(output) -> dict[str, torch.Tensor]:
    return load_file(output / TENSORS)


def metrics(output) -> dict:
    return json.loads((output / "metrics.json").read_text())


def interrupt(monkeypatch, after):
    """Let the training end as by Ctrl-C after so many forward passes."""
    original = training.AdapterTrainer.training_step
    calls = []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(training.AdapterTrainer, "training_step", interrupted)


def same_results(a, b):
    assert read_steps(a) == read_steps(b)
    assert (a / TENSORS).read_bytes() == (b / TENSORS).read_bytes()
    names = ("accuracy", "perplexity", "evaluation_loss", "steps", "saved_step")
    assert all(metrics(a).get(name) == metrics(b).get(name) for name in names)


@pytest.mark.parametrize("stop", [2, 5, 6])
def test_an_interrupted_run_resumes_bit_for_bit(bert, labelled, tmp_path, monkeypatch, capsys, stop):
    options = ("--epochs", 3, "--lr", 1e-2, "--save-steps", 2, "--dropout", 0.1, "--batch-size", 10)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(bert, labelled, whole, *options) == 0

    interrupt(monkeypatch, stop)
    assert finetune(bert, labelled, parts, *options) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert not parts.exists()
    checkpoint = max((tmp_path / "parts.partial" / "checkpoints").iterdir())
    assert not list(checkpoint.glob("model*"))  # the frozen weights are not in it
    assert (checkpoint / training.WEIGHTS_FILE).stat().st_size < 60_000

    same = ("finetune", "--model", bert, "--data", labelled, "--output", parts, *options)
    assert "unfinished run" in fails(capsys, *same)
    assert "--resume: seed was 0 and is now 1" in fails(capsys, *same, "--resume", "--seed", 1)

    assert finetune(bert, labelled, parts, *options, "--resume") == 0
    same_results(parts, whole)
    assert sorted(path.name for path in parts.iterdir()) == RESULTS
    assert not (tmp_path / "parts.partial").exists()


@pytest.mark.parametrize("stop", [3, 9])
def test_packing_and_early_stopping_resume_bit_for_bit(llama, unlabelled, tmp_path, monkeypatch, stop):
    options = ("--max-steps", 12, "--lr", 5e-2, "--save-steps", 2, "--dropout", 0.1, "--batch-size", 2, "--packing")
    options += ("--max-length", 20, "--early-stopping", 4, "--eval-steps", 1, "--gradient-accumulation-steps", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(llama, unlabelled, whole, *options) == 0
    interrupt(monkeypatch, stop)
    assert finetune(llama, unlabelled, parts, *options) == 130
    monkeypatch.undo()
    assert finetune(llama, unlabelled, parts, *options, "--resume") == 0
    same_results(parts, whole)


def test_early_stopping_keeps_the_best_state(llama, unlabelled, tmp_path, monkeypatch):
    options = ("--lr", 0.2, "--lr-scheduler", "constant", "--warmup-ratio", 0, "--eval-steps", 1, "--batch-size", 4)
    stopped = tmp_path / "stopped"
    assert finetune(llama, unlabelled, stopped, *options, "--max-steps", 40, "--early-stopping", 3) == 0
    losses = [step["eval_loss"] for step in read_steps(stopped) if "eval_loss" in step][1:]
    best = losses.index(min(losses)) + 1
    numbers = metrics(stopped)
    assert len(losses) == best + 3 == numbers["steps"] < 40
    assert numbers["saved_step"] == best and numbers["evaluation_loss"] == min(losses)
    short = tmp_path / "short"  # a run that ends at the best state
    assert finetune(llama, unlabelled, short, *options, "--max-steps", best) == 0
    assert (short / TENSORS).read_bytes() == (stopped / TENSORS).read_bytes()

    # A run that came to its early end, but not to its results, ends where it was.
    again = tmp_path / "again"
    many = (*options, "--max-steps", 40, "--early-stopping", 3)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_results", interrupted)
    assert finetune(llama, unlabelled, again, *many) == 130
    monkeypatch.undo()
    assert finetune(llama, unlabelled, again, *many, "--resume") == 0
    same_results(again, stopped)


@pytest.mark.parametrize("ends", ["before the last evaluation", "before the results"])
def test_a_complete_training_is_not_continued(llama, unlabelled, tmp_path, monkeypatch, ends):
    options = ("--max-steps", 5, "--eval-steps", 3, "--save-steps", 1, "--batch-size", 16, "--lr", 1e-2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(llama, unlabelled, whole, *options) == 0
    assert [step["step"] for step in read_steps(whole) if "eval_loss" in step] == [0, 3, 5]

    def interrupted(*_):
        raise KeyboardInterrupt

    if ends == "before the results":
        monkeypatch.setattr(command, "write_results", interrupted)
    else:
        evaluate = training.AdapterTrainer.evaluate
        monkeypatch.setattr(
            training.AdapterTrainer,
            "evaluate",
            lambda self, *a, **k: interrupted() if self.state.global_step == 5 else evaluate(self, *a, **k),
        )
    assert finetune(llama, unlabelled, parts, *options) == 130
    monkeypatch.undo()
    assert finetune(llama, unlabelled, parts, *options, "--resume") == 0
    same_results(parts, whole)


def without_dropout(model, folder):
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_accumulated_batches_are_the_large_batch(bert, llama, labelled, tmp_path, task):
    """Also where the last ones are incomplete: 48 texts, 14 in a step."""
    model = without_dropout(bert if task == "classification" else llama, tmp_path / "model")
    options = ("--task", task, "--epochs", 2, "--lr", 1e-2)
    large, small = tmp_path / "large", tmp_path / "small"
    assert finetune(model, labelled, large, *options, "--batch-size", 14) == 0
    assert finetune(model, labelled, small, *options, "--batch-size", 7, "--gradient-accumulation-steps", 2) == 0
    torch.testing.assert_close(adapter(small), adapter(large), rtol=1e-3, atol=1e-5)
    for one, other in zip(read_steps(large), read_steps(small), strict=True):
        for name in one.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_gradient_checkpointing_changes_no_bit(llama, unlabelled, tmp_path):
    options = ("--epochs", 1, "--lr", 1e-2, "--dropout", 0.1)
    assert finetune(llama, unlabelled, tmp_path / "a", *options) == 0
    assert finetune(llama, unlabelled, tmp_path / "b", *options, "--gradient-checkpointing") == 0
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    assert metrics(tmp_path / "b")["saved_for_backward_bytes"] < metrics(tmp_path / "a")["saved_for_backward_bytes"] / 2


def test_the_log_tells_speed_memory_rate_and_norm(llama, unlabelled, tmp_path):
    options = ("--max-steps", 9, "--lr", 1e-2, "--warmup-ratio", 0.3, "--lr-scheduler", "cosine", "--logging-steps", 2)
    assert finetune(llama, unlabelled, tmp_path / "run", *options, "--batch-size", 8, "--max-grad-norm", 1e-3) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [step["step"] for step in steps] == [2, 4, 6, 8, 9]
    texts = 8 * 2  # per line of the log; a text has 3 to 10 tokens
    for step in steps:
        assert 0 < step["seconds"] < 5 and step["memory_bytes"] > 2**20 and step["grad_norm"] > 0
        if step["step"] != 6:  # the last batch of an epoch
            assert 3 * texts / 2 < step["tokens_per_second"] * step["seconds"] * 1.01 < 10 * texts
    rates = [step["learning_rate"] for step in steps]
    # Steps 1 to 3 rise; then a cosine, which reaches 0 after the last step.
    assert rates[0] == pytest.approx(1e-2 / 3) and rates[1] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-2 * (1 + math.cos(math.pi * 5 / 6)) / 2)


def test_the_bar_tells_speed_memory_and_the_end(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    progress, state = Progress("lora", "perplexity"), TrainerState(max_steps=10)
    progress.on_train_begin(None, state, None)
    state.log_history = [{"loss": 1.5, "tokens_per_second": 1234.4, "memory_bytes": 3 * 2**20}]
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None)
    state.log_history = [{"eval_loss": 1.0, "eval_perplexity": 2.71828}]
    progress.on_log(None, state, None)
    progress.on_train_end(None, state, None)
    shown = screen.getvalue().splitlines()[-1].rpartition("\r")[2]
    for text in ("lora:", "1/10", "loss=1.500", "perplexity=2.718", "tokens/s=1,234", "memory=3 MiB"):
        assert text in shown
    assert re.search(r"\[\d\d:\d\d<", shown)  # elapsed < left


def test_weight_decay_and_clipping_reach_the_optimizer(llama, unlabelled, tmp_path):
    options = ("--epochs", 1, "--lr", 1e-2)
    sizes = {}
    for name, more in {"plain": (), "decay": ("--weight-decay", 50), "clip": ("--max-grad-norm", 1e-9)}.items():
        assert finetune(llama, unlabelled, tmp_path / name, *options, *more) == 0
        sizes[name] = {key: tensor.norm().item() for key, tensor in adapter(tmp_path / name).items()}
    key = next(key for key in sizes["plain"] if "lora_A" in key)
    assert sizes["decay"][key] < 0.8 * sizes["plain"][key]
    b = next(key for key in sizes["plain"] if "lora_B" in key)
    assert sizes["clip"][b] < 0.5 * sizes["plain"][b]  # gradients near AdamW's epsilon


def test_the_methods_options_reach_the_adapter(llama, unlabelled, tmp_path):
    options = (
        "--use-rslora",
        "--init",
        "pissa",
        "--layers-to-transform",
        1,
        "--exclude-modules",
        "up_proj",
        "down_proj",
    )
    options += ("--modules-to-save", "lm_head", "--rank", 4, "--alpha", 4, "--adapter-dtype", "float32")
    assert finetune(llama, unlabelled, tmp_path / "run", *options, "--epochs", 2, "--lr", 1e-2) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["modules_to_save"] == ["lm_head"]
    layers = {key.split(".lora_")[0].rpartition("layers.")[2] for key in adapter(tmp_path / "run") if "lora_" in key}
    attention = {f"1.self_attn.{name}_proj" for name in "qkvo"}
    assert layers == {*attention, "1.mlp.gate_proj"}
    model = AutoModelForCausalLM.from_pretrained(llama)
    before = model.lm_head.weight.detach().clone()
    peftops.load(model, tmp_path / "run" / "adapter")
    assert not torch.equal(model.lm_head.weight, before)
    # A random model's start: the residual base and the first factors add up to the base.
    first = [step for step in read_steps(tmp_path / "run") if "eval_loss" in step][0]
    assert finetune(llama, unlabelled, tmp_path / "plain", "--epochs", 1) == 0
    plain = [step for step in read_steps(tmp_path / "plain") if "eval_loss" in step][0]
    assert first["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


def test_a_16_bit_model_is_trained_in_float32(llama, unlabelled, tmp_path, capsys):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    options = ("--packing", "--max-length", 24, "--modules-to-save", "lm_head", "--epochs", 3, "--lr", 1e-2)
    assert finetune(base, unlabelled, tmp_path / "run", *options, "--batch-size", 2) == 0
    assert {tensor.dtype for tensor in adapter(tmp_path / "run").values()} == {torch.float32}
    evaluations = [step["eval_loss"] for step in read_steps(tmp_path / "run") if "eval_loss" in step]
    assert evaluations[-1] < evaluations[0] - 0.05
    arguments = ("finetune", "--model", base, "--data", unlabelled, "--output", tmp_path / "no", "--bias", "all")
    assert "--bias all: the model's biases are bfloat16, too coarse" in fails(capsys, *arguments)


def test_a_model_that_cannot_checkpoint_is_named(llama, unlabelled, tmp_path, capsys, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    arguments = ("finetune", "--model", llama, "--data", unlabelled, "--output", tmp_path / "run")
    assert "--gradient-checkpointing: LlamaForCausalLM" in fails(capsys, *arguments, "--gradient-checkpointing")


def test_everything_that_is_trained_over_a_16_bit_model_is_float32(llama):
    """Also where a name of --modules-to-save is the end of others: "norm" means "input_layernorm" as well."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    settings = Settings(model=str(llama), data="", modules_to_save=("norm",))
    job.lora(settings, Loaded(model, None, ()))
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "model.layers.0.input_layernorm.weight" in trained and set(trained.values()) == {torch.float32}
