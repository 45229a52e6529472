"""`--config`: a YAML file with the command line's own options."""

import json
import re

import pytest
from peftops.cli import config_file, main, settings

from .test_finetune import fails


def run(capsys, config, *options) -> str:
    return fails(capsys, "finetune", "--config", config, *options)


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_the_file_sets_options_and_the_command_line_wins(llama, labelled, tmp_path):
    config = write(
        tmp_path,
        f"""
        model: {llama}
        data: {labelled}
        output: {tmp_path / "run"}
        rank: 4
        lr: 2e-3  # a string, says YAML 1.1
        batch-size: 12
        epochs: 1
        alpha: null
        target_modules: [q_proj, v_proj]
        use-rslora: true
        """,
    )
    assert main(["finetune", "--rank", "2", "--config", str(config), "--no-use-rslora"]) == 0
    used = json.loads((tmp_path / "run" / "metrics.json").read_text())["settings"]
    assert (used["rank"], used["lr"], used["batch_size"], used["alpha"]) == (2, 2e-3, 12, None)
    assert used["target_modules"] == ["q_proj", "v_proj"] and used["use_rslora"] is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: many", r"c.yaml line 1: rank: got 'many', wanted a positive integer"),
        ("\nrank: 8.5", r"c.yaml line 2: rank: got '8.5', wanted a positive integer"),
        ("rank: true", r"line 1: rank: got True, wanted a number"),
        ("rank: [8]", r"line 1: rank: got \[8\], wanted a number"),
        ("lr: -1", r"line 1: lr: got '-1', wanted a positive number"),
        ("model: 7", r"line 1: model: got 7, wanted a string"),
        ("label-column: yes", r"line 1: label-column: got True, wanted a string"),
        ("task: chat", r"line 1: task: got 'chat', wanted one of auto, classification, causal-lm"),
        ("packing: 1", r"line 1: packing: got 1, wanted true or false"),
        ("target_modules: []", r"line 1: target_modules: got an empty list"),
        ("layers_to_transform: [0, -1]", r"line 1: layers_to_transform: got '-1', wanted an integer from 0"),
        ("batch_size: 4\nbatch-size: 8", r"line 2: batch-size is there twice"),
        ("rank: 4\nrank: 8", r"line 2: rank is there twice"),
        ("rnak: 8", r"line 1: unknown key 'rnak', do you mean 'rank'\?"),
        ("wandb_project: x", r"line 1: unknown key 'wandb_project' \(see peftops finetune --help\)"),
        ("config: other.yaml", r"line 1: unknown key 'config'"),
        ("1: 2", r"line 1: unknown key 1"),
        ("lora:\n  rank: 8", r"line 1: unknown key 'lora'"),
        ("- rank", r"line 1: wanted lines 'option: value'"),
        ("rank: 8\n  lr: 1: 2", r"line 2: not valid YAML"),
        ("rank: !!python/object/apply:os.system [ls]", r"line 1: not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_line_and_key(tmp_path, capsys, text, message):
    assert re.search(message, run(capsys, write(tmp_path, text)))


@pytest.mark.parametrize(
    ("other", "ours"),
    [
        ("lora_r", "rank"),
        ("lora_rank", "rank"),
        ("r", "rank"),
        ("lora_alpha", "alpha"),
        ("per_device_train_batch_size", "batch_size"),
        ("micro_batch_size", "batch_size"),
        ("num_train_epochs", "epochs"),
        ("learning_rate", "lr"),
        ("finetuning_type", "method"),
        ("lora_target", "target_modules"),
        ("additional_target", "modules_to_save"),
        ("cutoff_len", "max_length"),
        ("val_set_size", "eval_fraction"),
        ("model_name_or_path", "model"),
        ("pissa_init", "init"),
        ("train-on-inputs", "completion_only"),
    ],
)
def test_a_key_of_another_tool_names_ours(tmp_path, capsys, other, ours):
    line = run(capsys, write(tmp_path, f"{other}: 1"))
    assert line.endswith(f"line 1: {other.replace('-', '_')!r} is another tool's name for our {ours!r}")


def test_every_translation_leads_to_an_option():
    options = {*settings.Settings.__dataclass_fields__, "output", "resume", "overwrite"}
    assert set(config_file.ELSEWHERE) <= options
    assert not set(config_file.OURS) & options


def test_a_missing_file_and_a_missing_option(tmp_path, capsys):
    assert "none.yaml: cannot be read (No such file" in run(capsys, tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff")
    assert "c.yaml: not UTF-8 text" in run(capsys, tmp_path / "c.yaml")
    assert "the following arguments are required: --model, --data, --output" in run(capsys, write(tmp_path, "rank: 8"))
    assert "the following arguments are required: --data" in run(capsys, write(tmp_path, "model: m\noutput: o"))
    assert "required: --model" in run(capsys, write(tmp_path, ""))
    assert "expected one argument" in fails(capsys, "finetune", "--config")


def test_the_words_of_a_run_are_its_settings():
    from peftops.cli import _parse

    chosen = settings.Settings(
        model="m", data="d", rank=4, target_modules=("a", "b"), layers_to_transform=(0, 2), packing=True, lr=1e-3
    )
    parsed = _parse(["finetune", "--output", "o", *chosen.as_words()])
    assert settings.Settings.of(parsed) == chosen
