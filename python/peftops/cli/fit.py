"""Training and evaluation of a prepared model, and the numbers that are measured on the way."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from . import losses, processes
from .batches import LengthGroupedSampler, RankBatches, TrainingSet
from .job import Examples, Tuned
from .model import training_device
from .settings import Settings

BEST_FILE = "best.safetensors"
SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Outcome:
    """`history`: Trainer's log entries; `numbers`: what was measured, ready for metrics.json."""

    history: list[dict]
    numbers: dict


def fit(settings: Settings, examples: Examples, tuned: Tuned, work: Path, checkpoint: Path | None) -> Outcome:
    """Train and evaluate; writes `steps.jsonl` and the checkpoints under `work`. With early stopping the model is then
    as the best evaluation saw it.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    from .callbacks import best_evaluation
    from .training import load_trained

    trainer = _trainer(settings, examples, tuned, work, evaluate_first=checkpoint is None)
    if checkpoint is None or not _restored_at_its_end(settings, trainer, checkpoint):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = trainer.state.log_history
    if not any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in history):
        trainer.evaluate()
    peak = trainer.memory.read()
    history = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    chosen = [entry for entry in history if "eval_loss" in entry][-1]
    if settings.early_stopping is not None:
        chosen = best_evaluation(history)
    if settings.early_stopping is not None and processes.is_main():
        load_trained(tuned.model, work / "checkpoints" / BEST_FILE)
    return Outcome(history, _numbers(settings, examples, tuned, trainer, history, chosen, peak))


def _trainer(settings: Settings, examples: Examples, tuned: Tuned, work: Path, evaluate_first: bool):
    from transformers import PrinterCallback

    from .callbacks import EarlyStopping, EpochEnd, Progress, StepLog
    from .training import AdapterTrainer, OneDevice

    device = training_device()
    arguments = OneDevice(
        output_dir=str(work / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        average_tokens_across_devices=True,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULERS[settings.lr_scheduler],
        warmup_ratio=settings.warmup_ratio,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_steps else "epoch",
        eval_steps=settings.eval_steps,
        eval_on_start=evaluate_first,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=settings.seed,
        bf16=tuned.model.dtype == torch.bfloat16,
        fp16=tuned.model.dtype == torch.float16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    causal = "labels" in examples.train[0]
    lengths = [len(example["input_ids"]) for example in examples.train]
    together = settings.batch_size * settings.gradient_accumulation_steps * processes.count()
    order = LengthGroupedSampler(lengths, together, settings.seed)
    callbacks = [EpochEnd()]
    if processes.is_main():
        callbacks += [StepLog(work / "steps.jsonl"), Progress(settings.method, examples.metric)]
    if settings.early_stopping is not None:
        callbacks.append(EarlyStopping(settings.early_stopping, work / "checkpoints" / BEST_FILE))
    trainer = AdapterTrainer(
        model=tuned.model,
        args=arguments,
        train_dataset=TrainingSet(examples.train),
        eval_dataset=examples.evaluation,
        batches=RankBatches(order, settings.batch_size, processes.rank(), processes.count()),
        collator=examples.collator,
        optimizers=(tuned.optimizer, None),
        compute_loss_func=losses.loss_function(causal),
        compute_metrics=losses.metrics(causal),
        preprocess_logits_for_metrics=losses.row_sums(causal),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if processes.count() > 1:
        arguments.ddp_find_unused_parameters = _has_unused(tuned.model, _longest(settings, examples, trainer))
        torch.manual_seed(settings.seed + processes.rank())  # or every process would drop the same places
    return trainer


def _longest(settings: Settings, examples: Examples, trainer) -> dict[str, torch.Tensor]:
    """The batch that takes most memory, on the training device."""
    longest = sorted(examples.train, key=lambda example: -len(example["input_ids"]))[: settings.batch_size]
    return {name: tensor.to(trainer.args.device) for name, tensor in examples.collator(longest).items()}


def _has_unused(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether a trained parameter has no part in the output, such as one of a vision tower for texts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def _restored_at_its_end(settings: Settings, trainer, checkpoint: Path) -> bool:
    """Whether the interrupted run had made its last step; `trainer` then has its state. Trainer would make one more."""
    from transformers import TrainerState

    from .callbacks import StepLog, is_stale
    from .training import WEIGHTS_FILE, load_trained

    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopped = settings.early_stopping is not None and is_stale(state.log_history, settings.early_stopping)
    if not stopped and state.global_step < state.max_steps:
        return False
    trainer.state = state
    load_trained(trainer.model, checkpoint / WEIGHTS_FILE)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, StepLog):
            callback.on_train_begin(trainer.args, state, trainer.control)
    return True


def _numbers(settings: Settings, examples: Examples, tuned: Tuned, trainer, history, chosen: dict, peak: int) -> dict:
    from .memory import saved_for_backward

    batch = _longest(settings, examples, trainer)
    with trainer.compute_loss_context_manager():
        saved = saved_for_backward(tuned.model, batch)
    trainable = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in tuned.model.parameters())
    steps = [entry for entry in history if "loss" in entry]
    return {
        "method": tuned.description,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
        "peak_memory_bytes": peak,
        "saved_for_backward_bytes": saved,
        "seconds_per_step": statistics.median(entry["seconds"] for entry in steps),
        "tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in steps),
        "steps": trainer.state.global_step,
        "saved_step": chosen["step"],
        examples.metric: chosen[f"eval_{examples.metric}"],
        "evaluation_loss": chosen["eval_loss"],
        "training_texts": examples.texts,
        "evaluation_texts": len(examples.evaluation),
        "processes": processes.count(),
        "device": str(trainer.args.device),
        "threads": torch.get_num_threads(),
    }
