"""Ways in which a model gets its adapters: transformers' own, and `register` for fused layers from the start."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peftops.integrations import hf_peft
from peftops.integrations.hf_peft_linear import FusedLinear
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from .models import assert_close, base, batch, both, config, fill, fused_calls, gradients, logits, with_adapter
from .test_hf_peft_coverage import Subclass

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_own_adapters(kind, tmp_path):
    models = [base(kind) for _ in range(2)]
    for model in models:
        model.add_adapter(config(kind), "one")
        fill(model, "one")
    assert hf_peft.accelerate(models[1]) == hf_peft.coverage(models[1]).fused > 0
    assert isinstance(models[1], (LlamaForCausalLM, GPT2LMHeadModel))
    with fused_calls() as calls:
        wanted, got = both(models, lambda model: gradients(model, batch(kind)))
    assert calls
    assert_close(got, wanted)
    models[1].save_pretrained(tmp_path)
    for model in models:
        model.load_adapter(str(tmp_path), "two")
        model.set_adapter("two")
    assert_close({"y": logits(models[1], kind)}, {"y": logits(models[0], kind)})
    models[1].disable_adapters()
    assert torch.equal(logits(models[1], kind), logits(base(kind), kind))
    models[1].enable_adapters()
    assert_close({"y": logits(models[1], kind)}, {"y": logits(models[0], kind)})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_register_makes_fused_layers_at_injection(kind):
    given = config(kind, fan_in_fan_out=False)
    hf_peft.register(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT corrects fan_in_fan_out for Conv1D with a warning
        model = peft.get_peft_model(base(kind), given)
    fill(model)
    found = hf_peft.coverage(model)
    assert found.left == 0 and found.fused > 0 and hf_peft.accelerate(model) == 0
    oracle = with_adapter(kind)
    assert_close(gradients(model, batch(kind)), gradients(oracle, batch(kind)))
    wanted, got = both((oracle, model), lambda m: m.merge_and_unload().state_dict())
    assert_close(got, wanted)


def test_register_leaves_subclasses_of_linear_to_pefts_dispatchers():
    given = peft.LoraConfig(target_modules=["0", "1", "2"])
    hf_peft.register(given)
    special = Subclass(8, 8)
    model = peft.inject_adapter_in_model(given, nn.Sequential(nn.Linear(8, 8), special, Conv1D(8, 8)))
    assert [type(layer) for layer in model] == [FusedLinear, Linear, FusedLinear]
    assert model[1].base_layer is special
    x = torch.randn(2, 8)
    assert torch.equal(model[1](x), special(x))


def test_register_wants_a_lora_config():
    for wrong in (peft.IA3Config(), peft.AdaLoraConfig(total_step=10)):
        name = type(wrong).__name__
        with pytest.raises(TypeError, match=f"register: config is a {name}, but it must be a peft.LoraConfig"):
            hf_peft.register(wrong)


def test_register_keeps_out_of_target_parameters():
    given = peft.LoraConfig(target_modules=[], target_parameters=["0.weight"])
    hf_peft.register(given)
    model = peft.inject_adapter_in_model(given, nn.Sequential(nn.Linear(8, 8)))
    assert "target_parameters: the adapter is on a bare parameter" in str(hf_peft.coverage(model))
