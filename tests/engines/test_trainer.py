"""transformers.Trainer as it is, on a model with an adapter: training, checkpoints, resuming."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from .common import adapted, assert_equal, examples, state, values

STEPS, INTERRUPTED = 6, 3
CHECKPOINTING = {
    "no checkpointing": {},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True},
}


class StopAt(TrainerCallback):
    """An interruption: training ends after `step` steps, when a checkpoint was written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainer(model, folder, callbacks=(), **options):
    settings = {
        "max_steps": STEPS,
        "save_steps": INTERRUPTED,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        **options,
    }
    arguments = TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True, **settings)
    return Trainer(model, arguments, train_dataset=examples(8), eval_dataset=examples(2), callbacks=list(callbacks))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def prepared(mode="no checkpointing", **options):
    model, tuning = adapted(**options)
    if (
        mode == "reentrant"
    ):  # as always with frozen embeddings: the reentrant kind needs an input that asks for gradients
        model.enable_input_require_grads()
    return model, tuning


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, mode):
    model, tuning = prepared(mode)
    before = state(model)
    whole = trainer(model, tmp_path / "whole", **CHECKPOINTING[mode])
    whole.train()
    trained = values(tuning)
    assert all(not torch.equal(before[name], value) for name, value in trained.items())
    base = before.keys() - trained.keys()
    assert_equal({name: state(model)[name] for name in base}, {name: before[name] for name in base})

    model, _ = prepared(mode)
    trainer(model, tmp_path / "cut", [StopAt(INTERRUPTED)], **CHECKPOINTING[mode]).train()
    model, tuning = prepared(mode)
    resumed = trainer(model, tmp_path / "cut", **CHECKPOINTING[mode])
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS
    assert_equal(values(tuning), trained)


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_checkpointing_changes_no_bit_of_the_training(tmp_path, mode):
    """The recomputation draws the masks of the forward pass anew, those of attention and those of the adapters."""
    model, tuning = prepared()
    trainer(model, tmp_path / "plain").train()
    model, again = prepared(mode)
    trainer(model, tmp_path / "checkpointed", **CHECKPOINTING[mode]).train()
    assert_equal(values(again), values(tuning))


def test_reentrant_checkpointing_of_frozen_inputs_is_an_error_and_not_silent(tmp_path):
    model, _ = prepared()
    with (
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
        pytest.raises(RuntimeError, match="does not require grad"),
    ):
        trainer(model, tmp_path, **CHECKPOINTING["reentrant"]).train()


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_base_and_factors_under_the_model_s_names(tmp_path, tied):
    model, tuning = prepared(tie_word_embeddings=tied)
    trainer(model, tmp_path, max_steps=INTERRUPTED).train()
    folder = tmp_path / f"checkpoint-{INTERRUPTED}"
    expected = state(model)
    if tied:  # stored once, by save_pretrained
        del expected["lm_head.weight"]
    assert_equal(load_file(folder / "model.safetensors"), expected)

    fresh, again = prepared(seed=5, tie_word_embeddings=tied)
    fresh.load_state_dict(load_file(folder / "model.safetensors"), strict=not tied)
    assert_equal(values(again), values(tuning))
    assert_equal(state(fresh), state(model))

    # Without the adapter it is the base model; transformers names the factors as what it does not know.
    base, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(values(tuning)) and not info["missing_keys"]
    assert_equal(state(base), state(tuning.detach()))


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path):
    model, tuning = prepared()
    run = trainer(
        model,
        tmp_path,
        learning_rate=0.5,  # so that the loss rises again
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert not best.endswith(f"-{STEPS}")
    saved = load_file(f"{best}/model.safetensors")
    assert_equal(values(tuning), {name: saved[name] for name in values(tuning)})


def test_accumulation_mixed_precision_and_saving_the_adapter(tmp_path):
    model, tuning = prepared()
    run = trainer(model, tmp_path, bf16=True, gradient_accumulation_steps=2, max_steps=4, max_grad_norm=0.5)
    run.train()
    history = losses(run)
    assert history[-1] < history[0] and all(map(torch.isfinite, map(torch.tensor, history)))
    assert {parameter.dtype for parameter in tuning.parameters()} == {torch.float32}
    tuning.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
