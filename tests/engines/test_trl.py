"""TRL's SFTTrainer as it is, with its own defaults (gradient checkpointing among them), on a model with an adapter."""

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from .common import VOCABULARY, adapted, assert_equal, state, values

STEPS, INTERRUPTED = 6, 3


@pytest.fixture(autouse=True)
def no_bars():
    disable_progress_bars()


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= INTERRUPTED


def tokenizer():
    """Whole words w0, w1, ..., as many as the model knows."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    whole = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def texts():
    rows = [" ".join(f"w{2 + (start * 7 + step * 3) % 58}" for step in range(8 + start)) for start in range(8)]
    return Dataset.from_dict({"text": rows})


def trainer(model, folder, callbacks=(), **options):
    config = SFTConfig(
        str(folder),
        max_steps=STEPS,
        save_steps=INTERRUPTED,
        logging_steps=1,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(model, config, train_dataset=texts(), processing_class=tokenizer(), callbacks=list(callbacks))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["defaults", "packing"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path, options):
    model, tuning = adapted()
    before = state(model)
    whole = trainer(model, tmp_path / "whole", **options)
    assert whole.args.gradient_checkpointing
    whole.train()
    trained = values(tuning)
    assert all(not torch.equal(before[name], value) for name, value in trained.items())
    assert losses(whole)[-1] < losses(whole)[0]

    model, _ = adapted()
    trainer(model, tmp_path / "cut", [StopAt()], **options).train()
    model, tuning = adapted()
    resumed = trainer(model, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole) and len(losses(whole)) == STEPS
    assert_equal(values(tuning), trained)

    resumed.save_model(tmp_path / "model")
    assert_equal(load_file(tmp_path / "model" / "model.safetensors"), state(model))


@pytest.mark.parametrize(("loss", "reached"), [("nll", True), ("chunked_nll", False)])
def test_the_chunked_loss_never_calls_the_head_so_an_adapter_there_needs_nll(tmp_path, loss, reached):
    """It multiplies by `lm_head.weight` itself: the head's factors get no gradient then, those of the layers do."""
    model, tuning = adapted(lora={"target_modules": ["q_proj", "lm_head"]})
    before = values(tuning)
    trainer(model, tmp_path, loss_type=loss).train()
    moved = {name for name, value in values(tuning).items() if not torch.equal(before[name], value)}
    head = {name for name in before if name.startswith("lm_head.")}
    assert len(head) == 2 and moved == (set(before) if reached else set(before) - head)
