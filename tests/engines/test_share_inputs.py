"""Layers that share their input under FSDP2 and tensor parallelism: shared where whole weights lie, else each alone."""

import pytest
import torch
from peftops.methods import LoRA, attach
from peftops.nn import LoRALinear
from peftops.nn.sharing import share_inputs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ..methods.models import llama
from ..nn.sharing import counted, groups, nothing_waits
from .common import adapted, assert_close, values
from .ranks import WORLD
from .test_fsdp import PLAIN, STEPS, batches, by_linear, sharded, train, whole


def like_one_process(rank, shard, calls):
    model, tuning = adapted(**PLAIN)
    assert share_inputs(model, LoRALinear) == 4
    shard(model)
    with counted() as found:
        train(model.train(), tuning.optimizer(lr=1e-2), batches()[:, rank : rank + 1])
    assert found == STEPS * calls and nothing_waits()
    actual = whole(values(tuning))
    model, tuning = adapted(**PLAIN)
    train(model.train(), tuning.optimizer(lr=1e-2), batches())
    assert_close(actual, values(tuning))


@pytest.mark.parametrize(("shard", "calls"), [(sharded, [3, 2, 3, 2]), (by_linear, [])])
def test_fully_sharded_models_train_like_one_process(ranks, shard, calls):
    """A unit of FSDP that holds the whole group has its weights together; layers that are units are called alone."""
    ranks(like_one_process, shard, calls)


def tensor_parallel(rank):
    torch.manual_seed(0)
    model = llama()
    mesh = init_device_mesh("cpu", (WORLD,))
    parallelize_module(model.model.layers[0].mlp, mesh, {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()})
    attach(model, LoRA(rank=2, target_modules=["gate_proj", "up_proj"]), share_inputs=True)
    assert len(groups(model)) == 1  # that of the other layer
    with counted() as calls:
        model.model.layers[0].mlp.gate_proj(torch.randn(3, 16)), model.model.layers[0].mlp.up_proj(torch.randn(3, 16))
    assert not calls


def test_layers_of_dtensors_are_no_group(ranks):
    ranks(tensor_parallel)
