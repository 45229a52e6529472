"""Lightning: a LightningModule around an adapted model, interrupted and resumed."""

import warnings

import lightning
import peftops
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from .common import adapted, assert_equal, sequences, values

EPOCHS, STEPS = 2, 4


@pytest.fixture(autouse=True)
def no_advice():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Finetuning(lightning.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        self.model, self.tuning = adapted(seed)
        self.losses = []

    def training_step(self, batch, _index):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.tuning.optimizer(lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    # Lightning leaves torch's generator to the user: dropout goes on from here.
    def on_save_checkpoint(self, checkpoint):
        checkpoint["generator"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint):
        self.generator = checkpoint["generator"]

    def on_train_batch_start(self, _batch, _index):
        if (generator := self.__dict__.pop("generator", None)) is not None:
            torch.set_rng_state(generator)


def fit(module, folder, epochs, resume=None, **options):
    callback = ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    # Two steps are an epoch; a generator of its own, so that starting an epoch draws no number that dropout would get.
    batches = torch.utils.data.DataLoader(sequences(4), batch_size=2, generator=torch.Generator())
    trainer.fit(module, batches, ckpt_path=resume)
    return trainer


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path):
    whole = Finetuning()
    before = values(whole.tuning)
    fit(whole, tmp_path / "whole", EPOCHS)
    trained = values(whole.tuning)
    assert len(whole.losses) == STEPS
    assert all(not torch.equal(before[name], value) for name, value in trained.items())

    fit(Finetuning(), tmp_path / "cut", EPOCHS // 2)
    resumed = Finetuning(seed=7)  # base and factors come from the checkpoint
    fit(resumed, tmp_path / "cut", EPOCHS, resume=tmp_path / "cut" / f"step={STEPS // 2}.ckpt")
    assert resumed.losses == whole.losses[STEPS // 2 :]
    assert_equal(values(resumed.tuning), trained)

    resumed.tuning.save(tmp_path / "adapter")
    bare = adapted()[1].detach()
    assert_equal(values(peftops.load(bare, tmp_path / "adapter", trainable=True)), trained)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(tmp_path, precision):
    module = Finetuning()
    fit(module, tmp_path, 4, precision=precision)
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {value.dtype for value in values(module.tuning).values()} == {wanted}
    assert module.losses[-1] < module.losses[0]
