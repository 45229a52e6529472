"""transformers.Trainer for small trainable parts: exact resume, checkpoints without frozen weights, exact batches."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from .batches import Collator, EpochLoader, RankBatches
from .errors import DivergedError
from .memory import PeakMemory

WEIGHTS_FILE = "trainable.safetensors"


class OneDevice(TrainingArguments):
    """TrainingArguments for one device per process. With several GPUs in sight Trainer would take DataParallel, which
    multiplies the batch by their number; several GPUs take a process each.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)

    @property
    def device(self) -> torch.device:
        device = super().device
        # With several processes accelerate says "cpu:0", where torch cannot load a checkpoint's optimizer to.
        return torch.device("cpu") if device.type == "cpu" else device


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: torch.nn.Module, path: Path) -> None:
    save_file({name: p.detach().contiguous() for name, p in trained_parameters(model).items()}, path)


def load_trained(model: torch.nn.Module, path: Path) -> None:
    """Put the values of a file into the trained parameters, of which it must hold all and nothing else."""
    saved, trained = load_file(path), trained_parameters(model)
    if saved.keys() != trained.keys():
        odd = sorted(saved.keys() ^ trained.keys())[0]
        raise RuntimeError(f"{path} does not belong to this model: {odd} is on one side only")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


class AdapterTrainer(Trainer):
    """Trainer that saves and restores only the parameters that are trained.

    The batches are a function of seed and epoch, and everything else that is random (dropout of the model and of the
    adapters) draws from torch's generator, whose state Trainer keeps in the checkpoint: a resumed run continues bit for
    bit. Each line of the log gets the seconds per step, tokens per second of all processes, and the memory peak.
    """

    def __init__(self, *args, batches: RankBatches, collator: Collator, **kwargs) -> None:
        super().__init__(*args, data_collator=collator, **kwargs)
        self._batches = batches
        self._collator = collator
        self._tokens = 0
        self._seconds = 0.0
        self._steps = 0
        self._step_began = 0.0
        self.memory = PeakMemory(self.args.device)

    def get_train_dataloader(self) -> EpochLoader:
        return EpochLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self._collator.counted,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, *args, **kwargs):
        self._end_of_step()
        self._step_began = time.perf_counter()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._tokens += sum(batch.pop("tokens") for batch in batches)
        return batches, items

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if not self.control.should_log:
            self._end_of_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._step_began = 0.0  # evaluations and checkpoints are no part of a step

    def _end_of_step(self) -> None:
        if self._step_began:
            self._seconds += time.perf_counter() - self._step_began
            self._steps += 1
            self._step_began = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {self.state.global_step}: try a lower --lr")
        if "loss" in logs:
            self._end_of_step()  # reading the loss has waited for the device
            tokens = self.accelerator.gather(torch.tensor([self._tokens], device=self.args.device)).sum().item()
            logs["seconds"] = round(self._seconds / self._steps, 6)
            logs["tokens_per_second"] = round(tokens / self._seconds, 1)
            logs["memory_bytes"] = self.memory.read()
            self._tokens, self._seconds, self._steps = 0, 0.0, 0
        logs.pop("eval_model_preparation_time", None)  # only an evaluation outside of training has it
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.model, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trained(self.model, Path(resume_from_checkpoint) / WEIGHTS_FILE)
