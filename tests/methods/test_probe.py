"""A step or a forward to look at a model leaves it as it was, also after an error."""

import random

import numpy as np
import peft
import pytest
import torch
from peftops.methods.check_trainable import check_trainable
from peftops.methods.probe import arguments_of, preserved, tensors_in
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from .models import llama, tokens


class Stateful(nn.Module):
    """Dropout, BatchNorm, a counter that is replaced on every call, and all three random number generators."""

    def __init__(self, fails=False):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("cache", None)
        self.fails = fails

    def forward(self, x):
        self.calls = self.calls + random.random() + np.random.rand()
        self.cache = x
        x = self.last(self.dropout(self.norm(self.first(x))))
        if self.fails:
            raise KeyError("planned")
        return x


def everything(model):
    """All that the check must leave alone, as plain values."""
    hooks = [
        list(getattr(module, name))
        for module in model.modules()
        for name in vars(module)
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    ]
    numpy_state = np.random.get_state()
    return {
        "values": {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())},
        "objects": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "gradients": [(id(p.grad), [] if p.grad is None else [p.grad.clone()]) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": hooks,
        "generators": (torch.get_rng_state(), hash(random.getstate()), numpy_state[1].tolist(), numpy_state[2]),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen norm"])
def test_nothing_is_left_behind(fails, mode):
    model = Stateful(fails).train(mode != "eval")
    if mode == "frozen norm":
        model.norm.eval()
    model.last.weight.grad = torch.ones(2, 4)
    stepped = []
    model.first.weight.register_post_accumulate_grad_hook(lambda parameter: stepped.append(parameter))
    x = torch.randn(3, 4, requires_grad=True)
    before = everything(model)
    if fails:
        with pytest.raises(KeyError, match="planned"):
            check_trainable(model, x)
    else:
        with torch.no_grad():
            report = check_trainable(model, x)
        assert report.ok
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)
    assert x.grad is None and not stepped and model.cache is None
    model.fails = False
    model(x).sum().backward()
    assert len(stepped) == 1 and x.grad is not None


def test_runs_in_training_mode():
    seen = []
    model = Stateful().eval()
    model.norm.register_forward_hook(lambda module, *_: seen.append(module.training))
    check_trainable(model, torch.randn(3, 4))
    model.train().norm.eval()
    check_trainable(model, torch.randn(3, 4))
    assert seen == [True, False]


def test_transformer_keeps_its_state():
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(llama(), config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    before, data = everything(model), {"input_ids": tokens(), "labels": tokens()}
    state = torch.get_rng_state()
    before["generators"] = (state, *before["generators"][1:])
    assert check_trainable(model, data).ok
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)


def test_arguments():
    x, y = torch.ones(1), torch.zeros(1)
    assert arguments_of(x) == ((x,), {}) and arguments_of([x, y]) == arguments_of((x, y)) == ((x, y), {})
    assert arguments_of({"x": x}) == ((), {"x": x})


def test_tensors_are_found_in_outputs():
    x, y, z = torch.ones(1), torch.zeros(1), torch.ones(2)
    found = list(tensors_in((CausalLMOutput(logits=x), {"a": [y, None, "text"]}, z)))
    assert len(found) == 3 and all(one is other for one, other in zip(found, (x, y, z), strict=True))


def test_preserved_restores_without_a_backward():
    model = Stateful()
    before = everything(model)
    with preserved(model, (), {}):
        model.eval()(torch.randn(3, 4))
        model.norm.running_mean.add_(1)
        model.register_buffer("new", torch.ones(1))
    torch.testing.assert_close(everything(model), before, rtol=0, atol=0)
