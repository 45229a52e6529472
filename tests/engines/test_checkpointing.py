"""torch.utils.checkpoint around adapted layers: the masks of the first pass again, and nothing kept."""

import gc

import peftops
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from .common import adapted, assert_equal, sequences


def step(model, tuning, ids, mode=None):
    """Loss and gradients of one training step; mode: None, or use_reentrant."""
    if mode is not None:
        model.gradient_checkpointing_enable({"use_reentrant": mode})
    model.train()
    torch.manual_seed(3)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in tuning.named_parameters()}
    return {"loss": loss.detach(), "next number": torch.rand(1), **gradients}


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_recomputation_draws_the_same_masks(reentrant):
    ids = sequences(2)
    model, tuning = adapted()
    expected = step(model, tuning, ids)
    model, tuning = adapted()
    model.enable_input_require_grads()
    assert_equal(step(model, tuning, ids, reentrant), expected)


def test_without_the_generator_s_state_the_masks_differ():
    """So the test above can fail."""
    ids = sequences(2)
    model, tuning = adapted()
    expected = step(model, tuning, ids)
    model, tuning = adapted()
    careless = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(careless)
    actual = step(model, tuning, ids)
    assert torch.equal(actual["loss"], expected["loss"])
    assert not torch.equal(
        *(gradients["model.layers.0.self_attn.q_proj.lora_a.default"] for gradients in (actual, expected))
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_layer_by_hand(reentrant, autocast):
    """Also under autocast, whose state the recomputation takes over."""
    model, tuning = adapted()
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 24, requires_grad=True)

    def gradients(call):
        inputs = [x, layer.lora_a["default"], layer.lora_b["default"]]
        for tensor in inputs:
            tensor.grad = None
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call(x)
        y.float().square().sum().backward()  # the reentrant kind knows no torch.autograd.grad
        return dict(zip("yxab", [y, *(tensor.grad for tensor in inputs)], strict=True))

    assert_equal(gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant)), gradients(layer))


def live():
    """Objects that the garbage collector knows, and tensors among them."""
    gc.collect()
    known = gc.get_objects()
    return len(known), sum(issubclass(type(thing), torch.Tensor) for thing in known)


@pytest.mark.parametrize("reentrant", [True, False])
def test_200_steps_leave_nothing_behind(reentrant):
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    tuning = peftops.attach(layers, peftops.LoRA(rank=2, dropout=0.3))
    optimizer, x = tuning.optimizer(lr=1e-3), torch.randn(3, 8, requires_grad=True)

    def steps(count):
        for _ in range(count):
            y = x
            for layer in layers:
                y = checkpoint(layer, y, use_reentrant=reentrant)
            y.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(3)
    objects, tensors = live()
    steps(200)
    objects_after, tensors_after = live()
    assert tensors_after <= tensors  # fewer where other tests left some that went meanwhile
    assert objects_after - objects < 50  # caches of the interpreter and of torch; one object per step would be 200
