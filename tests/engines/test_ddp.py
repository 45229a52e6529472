"""DistributedDataParallel on two ranks against one process on the whole batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .common import adapted, assert_close, assert_equal, sequences, values
from .ranks import WORLD

STEPS = 3
PLAIN = {"lora": {"dropout": 0.0}, "attention_dropout": 0.0}


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def on_one_process(batches, **options):
    model, tuning = adapted(**options)
    optimizer = tuning.optimizer(lr=1e-2)
    for batch in batches:
        loss_of(model.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(tuning)


def like_one_process(rank, parts, checkpointing):
    """Each rank has its share of each batch, in `parts` accumulated pieces."""
    batches = sequences(STEPS * WORLD * parts).view(STEPS, WORLD * parts, -1)
    model, tuning = adapted(**PLAIN)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = DistributedDataParallel(model).train()
    optimizer = tuning.optimizer(lr=1e-2)
    for batch in batches:
        own = batch[rank::WORLD]
        for part in range(parts):
            with wrapped.no_sync() if part < parts - 1 else contextlib.nullcontext():
                (loss_of(wrapped, own[part : part + 1]) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(values(tuning), on_one_process(batches, **PLAIN))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_it_trains_like_one_process(ranks, parts, checkpointing):
    ranks(like_one_process, parts, checkpointing)


def with_dropout(rank):
    """Ranks with seeds of their own draw masks of their own; the mean of their gradients is the gradient."""
    batch = sequences(WORLD)
    model, tuning = adapted()
    wrapped = DistributedDataParallel(model).train()
    torch.manual_seed(100 + rank)
    loss_of(wrapped, batch[rank : rank + 1]).backward()
    actual = {name: parameter.grad for name, parameter in tuning.named_parameters()}

    expected = {name: torch.zeros_like(value) for name, value in values(tuning).items()}
    for other in range(WORLD):
        model, tuning = adapted()
        torch.manual_seed(100 + other)
        loss_of(model.train(), batch[other : other + 1]).backward()
        for name, parameter in tuning.named_parameters():
            expected[name] += parameter.grad / WORLD
    assert_close(actual, expected)


def test_dropout_draws_from_each_rank_s_own_generator(ranks):
    ranks(with_dropout)


def two_forwards(rank):
    """Two graphs at once, as for preferences between two answers."""
    batch = sequences(2 * WORLD)
    model, tuning = adapted(**PLAIN)
    wrapped = DistributedDataParallel(model).train()
    first, second = loss_of(wrapped, batch[2 * rank :][:1]), loss_of(wrapped, batch[2 * rank + 1 :][:1])
    (first + second).backward()
    actual = {name: parameter.grad for name, parameter in tuning.named_parameters()}
    model, tuning = adapted(**PLAIN)
    (2 * loss_of(model.train(), batch)).backward()
    assert_close(actual, {name: parameter.grad for name, parameter in tuning.named_parameters()})


def test_two_forwards_before_one_backward(ranks):
    ranks(two_forwards)


def several(rank, folder):
    """Only the active adapter is trained; saving is one rank's work; the base stays as it was."""
    model, tuning = adapted(**PLAIN)
    tuning.add("other", tuning.method)
    wrapped = DistributedDataParallel(model).train()
    before = values(tuning)
    optimizer = tuning.optimizer(lr=1e-2)
    loss_of(wrapped, sequences(WORLD)[rank : rank + 1]).backward()
    optimizer.step()
    after = values(tuning)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, after)
    assert_equal(gathered[0], gathered[1])
    if rank == 0:
        tuning.save(folder, name="default")
        tuning.detach()


def test_several_adapters_and_saving(ranks, tmp_path):
    ranks(several, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
