"""Hugging Face PEFT as the oracle: the same output and gradients, and files both ways."""

import json

import peft
import pytest
import torch
from peftops.methods import LoRA, attach, load
from peftops.methods.lora import _DEFAULTS
from safetensors.torch import load_file, save_file

from .models import MODELS, Block, distance, logits, randomise, tokens

# model, PEFT's config
ADAPTERS = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_rslora": True}),
    "llama pattern": ("llama", {"target_modules": r".*\.(gate|up|down)_proj", "lora_alpha": 3}),
    "llama ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.o_proj": 5},
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "lora_dropout": 0.1}),
    "bert with head": ("bert", {"target_modules": ["query", "value", "pooler.dense"], "task_type": "SEQ_CLS"}),
    "bert all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "roberta with head": ("roberta", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "gaussian": ("llama", {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def twins(name):
    """Two models with the same values."""
    one, other = MODELS[name]().eval(), MODELS[name]().eval()
    other.load_state_dict(one.state_dict())
    return one, other


def theirs_trained(model, options, **settings):
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, **options), **settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return theirs


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_directory_of_theirs_gives_the_same_output_here(case, tmp_path):
    name, options = ADAPTERS[case]
    model, other = twins(name)
    theirs, ids = theirs_trained(other, options), tokens()
    expected = logits(theirs, ids)
    theirs.save_pretrained(tmp_path)
    base = logits(model, ids)
    tuning = load(model, tmp_path)
    assert distance(logits(model, ids), expected) < 1e-5 < 1e-2 < distance(base, expected)
    assert tuning.parameters() == [] and not any(p.requires_grad for p in model.parameters())
    with tuning.disabled():
        assert torch.equal(logits(model, ids), base)
    with pytest.raises(RuntimeError, match="nothing is trained; load the adapter with trainable=True"):
        tuning.optimizer(1e-3)


@pytest.mark.parametrize("case", ADAPTERS)
def test_their_directory_saved_again_here_loads_there(case, tmp_path):
    name, options = ADAPTERS[case]
    model, other = twins(name)
    again = MODELS[name]().eval()
    again.load_state_dict(model.state_dict())
    theirs, ids = theirs_trained(other, options), tokens()
    theirs.save_pretrained(tmp_path / "theirs")
    load(model, tmp_path / "theirs").save(tmp_path / "ours")
    written = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][key]) for key, tensor in written[0].items())
    back = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    assert torch.equal(logits(back, ids), logits(theirs, ids))


METHODS = {
    "llama": ("llama", LoRA(rank=4, target_modules=["q_proj", "v_proj"], alpha=6)),
    "llama all-linear": ("llama", LoRA(rank=3, use_rslora=True)),
    "llama pattern": ("llama", LoRA(rank=3, target_modules=r".*\.mlp\..*_proj", init="gaussian")),
    "gpt2": ("gpt2", LoRA(rank=4, dropout=0.1)),
    "bert with head": ("bert", LoRA(rank=4, modules_to_save=["classifier"])),
    "roberta with head": ("roberta", LoRA(rank=4, target_modules=["query", "dense"], modules_to_save=["classifier"])),
    "plain PyTorch": ("block", LoRA(rank=4, modules_to_save=["head", "norm"])),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_directory_of_ours_gives_the_same_output_there(case, tmp_path):
    name, method = METHODS[case]
    make = MODELS.get(name, Block)
    model, other, ids = make().eval(), make().eval(), tokens()
    other.load_state_dict(model.state_dict())
    tuning = attach(model, method)
    randomise(tuning)
    tuning.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert distance(logits(theirs, ids), logits(model, ids)) < 1e-5
    if name == "bert":
        assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == {row.name for row in tuning.summary().modules if row.rank}


def test_the_config_has_their_keys_and_form(tmp_path):
    model = MODELS["bert"]()
    theirs = peft.get_peft_model(MODELS["bert"](), peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path / "theirs")
    attach(model, LoRA(rank=4, target_modules=["query"], modules_to_save=["classifier"])).save(tmp_path / "ours")
    text = (tmp_path / "ours" / "adapter_config.json").read_text()
    expected, config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text()), json.loads(text)
    assert config.pop("modules_to_save") == ["classifier"] and expected.pop("modules_to_save") == [
        "classifier",
        "score",
    ]
    assert config == expected
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
    assert set(_DEFAULTS) == {*expected, "modules_to_save"}


@pytest.mark.parametrize("autocast", [True, False], ids=["float32 factors", "bfloat16 factors"])
def test_factors_keep_their_dtype_over_a_bfloat16_base(autocast, tmp_path):
    model, other = (m.to(torch.bfloat16) for m in twins("llama"))
    theirs = theirs_trained(other, {"target_modules": ["q_proj", "down_proj"]}, autocast_adapter_dtype=autocast)
    theirs.save_pretrained(tmp_path)
    tuning, ids = load(model, tmp_path, trainable=True), tokens()
    dtype = torch.float32 if autocast else torch.bfloat16
    assert {parameter.dtype for parameter in tuning.parameters()} == {dtype}
    assert distance(logits(model, ids), logits(theirs, ids)) < 2e-2
    tuning.save(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert all(
        torch.equal(saved[key], tensor) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
    )


FILE_DTYPES = [  # base, file, factors
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float32, torch.float64),
]


@pytest.mark.parametrize("base, stored, factors", FILE_DTYPES)
def test_other_dtypes_are_widened_and_not_rounded(base, stored, factors, tmp_path):
    tuning = attach(Block(), LoRA())
    randomise(tuning)
    tuning.save(tmp_path)
    tensors = {key: t.to(stored) for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = load(Block(base), tmp_path, trainable=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {factors}
    a = loaded.model.layers[0]["up"].lora_a.default
    assert torch.equal(a, tensors["base_model.model.layers.0.up.lora_A.weight"].to(factors))


@pytest.mark.parametrize(
    "name, targets", [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("bert", ["query", "dense"])]
)
def test_forward_and_gradients_equal_theirs(name, targets):
    model, other = twins(name)
    theirs = theirs_trained(other, {"target_modules": targets, "lora_alpha": 6})
    tuning, ids = attach(model, LoRA(rank=4, alpha=6, target_modules=targets)), tokens()
    pairs = []
    for key, parameter in tuning.named_parameters():
        path = key.replace("lora_a.default", "lora_A.default.weight").replace("lora_b.default", "lora_B.default.weight")
        pairs.append((parameter, theirs.get_parameter(f"base_model.model.{path}")))
    with torch.no_grad():
        for ours, reference in pairs:
            ours.copy_(reference)
    for run in (model, theirs):
        logits(run, ids).square().sum().backward()
    assert distance(logits(model, ids), logits(theirs, ids)) < 1e-5
    for ours, reference in pairs:
        assert distance(ours.grad, reference.grad) < 1e-5
