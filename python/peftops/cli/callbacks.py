"""What happens beside the training steps: the history on disk, checkpoints, early stopping, the progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerCallback

from .output import replace_file
from .report import size
from .training import save_trained


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
        if "loss" in entry or "eval_loss" in entry:  # Trainer's closing summary is no step
            self._append(entry)


class EpochEnd(TrainerCallback):
    """At the end of each epoch, after its evaluation: a line of the log and a checkpoint, beside those every so many
    steps.

    No checkpoint between an epoch's last step and the evaluation, which a run that resumed there would miss.
    """

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        control.should_save = control.should_log = True


def best_evaluation(history: list[dict]) -> dict:
    """The evaluation of a trained state with the lowest loss, the first one of several."""
    return min((entry for entry in history if "eval_loss" in entry and entry["step"]), key=lambda e: e["eval_loss"])


def is_stale(history: list[dict], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than one before them."""
    steps = [entry["step"] for entry in history if "eval_loss" in entry and entry["step"]]
    return bool(steps) and len(steps) - 1 - steps.index(best_evaluation(history)["step"]) >= patience


class EarlyStopping(TrainerCallback):
    """Keeps what the best evaluation saw in a file, and stops after `patience` evaluations that were no better.

    Both follow from the history, which every checkpoint holds: a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, patience: int, path: Path) -> None:
        self.patience = patience
        self.path = path

    def on_evaluate(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 0:
            return
        if best_evaluation(state.log_history)["step"] == state.global_step and state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, lambda temporary: save_trained(model, temporary))
        if is_stale(state.log_history, self.patience):
            control.should_training_stop = True


class Progress(TrainerCallback):
    """A progress bar with the loss, the latest evaluation, the speed and the memory; where stderr is no terminal, one
    line per evaluation.
    """

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
            self.shown["tokens/s"] = f"{entry['tokens_per_second']:,.0f}"
            self.shown["memory"] = size(entry["memory_bytes"])
        if f"eval_{self.metric}" in entry:
            self.shown[self.metric] = f"{entry[f'eval_{self.metric}']:.4g}"
            if self.bar is None or self.bar.disable:
                where = f"step {state.global_step}/{state.max_steps}"
                print(f"{self.name}: {where} {' '.join(f'{k} {v}' for k, v in self.shown.items())}", file=sys.stderr)
        if self.bar is not None:
            self.bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.close()
