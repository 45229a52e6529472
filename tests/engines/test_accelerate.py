"""accelerate: prepare, accumulation, save_state and load_state."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .common import adapted, assert_close, assert_equal, sequences, values

STEPS, INTERRUPTED = 4, 2


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps the settings of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(accelerator, model, optimizer, batches, steps):
    history = []
    for batch in batches[: steps[1]][steps[0] :]:
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        history.append(loss.item())
    return history


def prepared(seed=0, **options):
    accelerator = Accelerator(cpu=True, **options)
    model, tuning = adapted(seed)
    prepared_model, optimizer = accelerator.prepare(model, tuning.optimizer(lr=1e-2))
    return accelerator, prepared_model, optimizer, tuning


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path):
    batches = sequences(2 * STEPS).view(STEPS, 2, -1)
    accelerator, model, optimizer, tuning = prepared()
    before = values(tuning)
    history = run(accelerator, model, optimizer, batches, (0, INTERRUPTED))
    accelerator.save_state(tmp_path)
    history += run(accelerator, model, optimizer, batches, (INTERRUPTED, STEPS))
    trained = values(tuning)
    assert all(not torch.equal(before[name], value) for name, value in trained.items())

    accelerator, model, optimizer, tuning = prepared(seed=7)  # base and factors come from the files
    accelerator.load_state(tmp_path)
    assert run(accelerator, model, optimizer, batches, (INTERRUPTED, STEPS)) == history[INTERRUPTED:]
    assert_equal(values(tuning), trained)
    assert accelerator.unwrap_model(model) is tuning.model


def test_accumulated_steps_are_those_of_the_larger_batch():
    batches = sequences(2 * STEPS).view(STEPS, 2, -1)
    no_dropout = {"lora": {"dropout": 0.0}, "attention_dropout": 0.0}
    model, tuning = adapted(**no_dropout)
    optimizer = tuning.optimizer(lr=1e-2)
    for batch in sequences(2 * STEPS).view(STEPS // 2, 4, -1):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, again = adapted(**no_dropout)
    model, optimizer = accelerator.prepare(model, again.optimizer(lr=1e-2))
    run(accelerator, model, optimizer, batches, (0, STEPS))
    assert_close(values(again), values(tuning))


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_mixed_precision_keeps_the_factors_in_float32(precision):
    accelerator, model, optimizer, tuning = prepared(mixed_precision=precision)
    batches = sequences(2).expand(8, 2, -1)
    history = run(accelerator, model, optimizer, batches, (0, 8))
    assert history[-1] < history[0]
    assert {parameter.dtype for parameter in tuning.parameters()} == {torch.float32}
    assert {parameter.grad is None for parameter in tuning.parameters()} == {True}
