"""transformers.Trainer for small trainable parts: exact resume, checkpoints without frozen weights, quiet progress."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from .data import LengthGroupedSampler
from .errors import DivergedError

WEIGHTS_FILE = "trainable.safetensors"


class OneDevice(TrainingArguments):
    """TrainingArguments for one device. With several GPUs in sight Trainer would take DataParallel, which does not copy
    what a ParameterDict holds: LoRA's factors.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class AdapterTrainer(Trainer):
    """Trainer that saves and restores only the parameters that are trained.

    The sampler is a function of seed and epoch, and everything else that is random (dropout of the model and of the
    adapters) draws from torch's generator, whose state Trainer keeps in the checkpoint: a resumed run continues bit for
    bit.
    """

    def __init__(self, *args, sampler: LengthGroupedSampler, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._sampler = sampler
        self._step_began = 0.0

    def _get_train_sampler(self, train_dataset=None) -> LengthGroupedSampler:
        return self._sampler

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        self._step_began = time.perf_counter()
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # Reading the loss has waited for the device, so this is the step with its optimizer update.
            logs["seconds"] = round(time.perf_counter() - self._step_began, 6)
        if "eval_perplexity" in logs:
            # Trainer's mean of batch means weighs short texts more; this is the mean over tokens.
            logs["eval_loss"] = math.log(logs["eval_perplexity"])
        super().log(logs, start_time)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained().items()}, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        trained = self._trained()
        if saved.keys() != trained.keys():
            odd = sorted(saved.keys() ^ trained.keys())[0]
            raise RuntimeError(f"{resume_from_checkpoint} does not belong to this model: {odd} is on one side only")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


class StepLog(TrainerCallback):
    """Writes the training history to a JSONL file as it comes; on resume, first what the checkpoint holds of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _append(self, entry: dict, mode: str = "a") -> None:
        with self.path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.path.write_text("", encoding="utf-8")
        for entry in state.log_history:
            self._append(entry)

    def on_log(self, args, state, control, **kwargs) -> None:
        entry = state.log_history[-1]
        loss = entry.get("loss", entry.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {state.global_step}: try a lower --lr")
        if "loss" in entry or "eval_loss" in entry:  # Trainer's closing summary is no step
            self._append(entry)


class EpochCheckpoint(TrainerCallback):
    """A checkpoint at the end of each epoch, beside those every `save_steps` steps."""

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        control.should_save = True


class Progress(TrainerCallback):
    """A progress bar with the loss and the latest evaluation; where stderr is no terminal, one line per evaluation."""

    def __init__(self, name: str, metric: str) -> None:
        self.name = name
        self.metric = metric
        self.shown = {"loss": "-", metric: "-"}
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=not sys.stderr.isatty(),
        )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(1)

    def on_log(self, args, state, control, **kwargs) -> None:
        entry = state.log_history[-1]
        if "loss" in entry:
            self.shown["loss"] = f"{entry['loss']:.3f}"
        if f"eval_{self.metric}" in entry:
            self.shown[self.metric] = f"{entry[f'eval_{self.metric}']:.4g}"
            if self.bar.disable:
                where = f"step {state.global_step}/{state.max_steps}"
                print(f"{self.name}: {where} {' '.join(f'{k} {v}' for k, v in self.shown.items())}", file=sys.stderr)
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()


class PeakMemory:
    """Highest memory use since construction, in bytes: of torch's allocator on CUDA, of the whole process elsewhere.

    Linux can restart its high-water mark; where it cannot, the mark is that of the process's life so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            import resource  # not on every platform

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024


def saved_for_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward of one training step, parameters and buffers not counted.

    Every storage counts once and whole, however many tensors view it.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    # The loss keeps the graph, and the graph keeps every storage: no address is handed out twice while we count.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    model.train(was_training)
    return sum(kept.values())
