"""Which layers are chosen: Hugging Face PEFT's rules."""

import peft
import pytest
import torch
from peftops.methods.targets import find_modules, find_targets
from torch import nn

from .models import MODELS, Block, llama

LAYERS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up", "down")]

CHOICES = [
    (None, [*LAYERS, "head"]),
    ("all-linear", [*LAYERS, "head"]),
    ("All-Linear", [*LAYERS, "head"]),
    (["up"], ["layers.0.up", "layers.1.up"]),
    (["1.up", "head"], ["layers.1.up", "head"]),
    (["layers.0.down"], ["layers.0.down"]),
    (r"layers\.\d+\.(q_proj|up)", [name for name in LAYERS if "down" not in name]),
    (r".*\.1\..*", LAYERS[3:]),
]


@pytest.mark.parametrize("target_modules, names", CHOICES)
def test_names_suffixes_and_patterns(target_modules, names):
    assert list(find_targets(Block(), target_modules).layers) == names


@pytest.mark.parametrize("target_modules", [["p"], ["q_pro"], ["proj"], "up", "layers", [], [""]])
def test_parts_of_a_name_do_not_match(target_modules):
    with pytest.raises((ValueError, TypeError), match="chooses"):
        find_targets(Block(), target_modules)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_what_peft_takes(name):
    task = "CAUSAL_LM" if name in ("llama", "gpt2") else "SEQ_CLS"
    theirs = peft.get_peft_model(MODELS[name](), peft.LoraConfig(target_modules="all-linear", task_type=task))
    found = find_targets(MODELS[name](), None)
    adapted = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert list(found.layers) == adapted
    left = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier", "roberta": "classifier.dense"}
    assert left[name] in found.skipped


def test_a_module_with_two_names_is_adapted_once():
    model = Block()
    model.layers[1]["up"] = model.layers[0]["up"]
    assert list(find_targets(model, ["up"]).layers) == ["layers.0.up"]


def test_layers_that_cannot_be_adapted_are_skipped_with_a_reason_or_named_in_an_error():
    model = nn.ModuleDict(
        {
            "good": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        }
    )
    found = find_targets(model, None)
    assert list(found.layers) == ["good"]
    skipped = ["attention.out_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "normed"]
    assert list(found.skipped) == skipped
    for name in skipped:
        with pytest.raises(TypeError, match=rf"{name}: "):
            find_targets(model, ["good", name])


def test_the_encoder_layer_is_refused_for_a_reason():
    """Its fast path takes the weight of linear1 and never calls the layer; should that change, the refusal can go."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    called = []
    layer.linear1.forward = lambda x: called.append(1)
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
    assert not called


def test_modules_to_save_names_whole_modules():
    model = llama()
    assert list(find_modules(model, ["lm_head"])) == ["lm_head"]
    assert list(find_modules(model, ["mlp", "gate_proj"])) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert find_modules(model, ["score"], strict=False) == {}
    inside = find_targets(model, None, ["model.layers.0.mlp"])
    assert "model.layers.1.mlp.up_proj" in inside.layers and "model.layers.0.mlp.up_proj" not in inside.layers
