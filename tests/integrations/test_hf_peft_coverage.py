"""What `accelerate` leaves to PEFT, layer by layer and call by call, and how `coverage` says so."""

from __future__ import annotations

import copy
import subprocess
import sys

import peft
import pytest
import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Linear
from peftops.integrations import hf_peft
from torch import nn
from torch.distributed.fsdp import fully_shard

from .models import assert_close, base, batch, config, fill, fused_calls, gradients, layer_pair, pair, run, with_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


class Subclass(nn.Linear):
    """Stands for a quantised layer: a subclass of nn.Linear that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.plain = nn.Linear(16, 16)
        self.special = Subclass(16, 16)
        self.hooked = nn.Linear(16, 16)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        for layer in (self.plain, self.special, self.hooked):
            x = layer(x)
        return x


def mixed_model():
    torch.manual_seed(6)
    model = Mixed()
    targets = ["embed", "conv", "attention", "plain", "special", "hooked"]
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), model)
    fill(model)
    model.hooked.base_layer.register_forward_hook(lambda module, args, y: 3 * y)
    return model


def test_coverage_names_every_layer_with_its_reason():
    model = mixed_model()
    ids = torch.arange(10).view(2, 5)
    wanted = model(ids)
    before = hf_peft.coverage(model)
    assert (before.fused, before.left) == (0, 7)
    assert "plain (Linear over Linear): not swapped yet: call accelerate(model)" in str(before)
    assert hf_peft.accelerate(model) == 1
    found = hf_peft.coverage(model)
    assert (found.fused, found.left) == (1, 6)
    reasons = {layer.name: layer.reason for layer in found.layers}
    assert reasons == {
        "embed": "embeddings have no fused kernel",
        "conv": "convolutions have no fused kernel",
        "attention": "nn.MultiheadAttention reads the merged weight and calls no linear layer",
        "attention.base_layer.out_proj": "the nn.MultiheadAttention around it never calls it",
        "plain": None,
        "special": "its base layer is a Subclass, neither exactly nn.Linear nor transformers' Conv1D",
        "hooked": "its base layer carries hooks or a forward of its own",
    }
    lines = str(found).splitlines()
    assert lines[0] == "1 of 7 PEFT layers run on peftops" and len(lines) == 8
    assert "fused plain (FusedLinear over Linear)" in lines
    assert_close({"y": model(ids)}, {"y": wanted})


def test_classes_derived_from_pefts_are_left_alone():
    class Custom(Linear):
        pass

    class Linear4bit(Linear):
        __module__ = "peft.tuners.lora.bnb"

    for derived, reason in (
        (Custom, "Custom is not exactly PEFT's lora.Linear"),
        (Linear4bit, "its base layer is quantised (bnb)"),
    ):
        layer, _ = layer_pair()
        layer.__class__ = derived
        assert hf_peft.accelerate(nn.Sequential(layer)) == 0
        (found,) = hf_peft.coverage(nn.Sequential(layer)).layers
        assert found.reason == reason and found.adapters == {"default": reason}


@pytest.mark.parametrize("change", ["weight class", "weight dtype", "bias dtype"])
def test_an_odd_base_parameter_is_left_alone(change):
    class Quantised(nn.Parameter):
        pass

    layer, _ = layer_pair()
    base = layer.base_layer
    if change == "weight class":
        base.weight = Quantised(base.weight.data)
    elif change == "weight dtype":
        base.weight = nn.Parameter(base.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    else:
        base.bias = nn.Parameter(base.bias.data.double())
    assert hf_peft.accelerate(nn.Sequential(layer)) == 0
    wanted = {
        "weight class": "its weight is a Quantised",
        "weight dtype": "its weight is float8_e4m3fn",
        "bias dtype": "its bias is float64 beside a float32 weight",
    }
    assert hf_peft.coverage(nn.Sequential(layer)).layers[0].reason == wanted[change]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer.lora_dropout["default"], "p", 1.0), "its dropout has p=1, inplace=False"),
        (lambda layer: setattr(layer.lora_dropout["default"], "inplace", True), "its dropout has p=0.1, inplace=True"),
        (lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)}), "its dropout is a AlphaDropout"),
        (
            lambda layer: layer.lora_A.update({"default": Subclass(24, 4, bias=False)}),
            "its lora_A or lora_B is no plain linear layer",
        ),
        (
            lambda layer: layer.lora_A.update({"default": nn.Linear(24, 4)}),
            "its lora_A or lora_B is no plain linear layer",
        ),
        (
            lambda layer: setattr(layer.lora_A["default"], "weight", Tagged(torch.zeros(4, 24))),
            "its factors are Tagged and Parameter",
        ),
        (lambda layer: setattr(layer, "cast_input_dtype_enabled", False), None),
    ],
    ids=["p", "inplace", "dropout", "lora_A", "lora_A bias", "factor", "cast"],
)
def test_an_odd_adapter_is_pefts_own_call(change, reason):
    oracle, fused = layer_pair(lora_dropout=0.1)
    x = torch.randn(6, 24)
    for layer in (oracle, fused):
        torch.manual_seed(0)
        change(layer)
    with fused_calls() as calls:
        got, wanted = run(fused, x.clone()), run(oracle, x.clone())
    assert not calls
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert hf_peft.coverage(nn.Sequential(fused)).layers[0].adapters == {"default": reason}


class Tagged(nn.Parameter):
    """Stands for a parameter of somebody else's class."""


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 24, dtype=torch.float64),
        torch.ones(2, 24, dtype=torch.int64),
        torch.ones(2, 24, dtype=torch.bfloat16),
        torch.ones(2, 23),
        torch.ones(2, 24, device="meta"),
    ],
    ids=["float64", "int64", "bfloat16", "23 features", "meta"],
)
def test_an_input_that_does_not_fit_gets_an_error(x):
    oracle, fused = layer_pair()
    messages = []
    for layer in (oracle, fused):
        with pytest.raises(RuntimeError) as error:
            layer(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1] or messages[1] == "lora_linear: weight has 24 columns, but x has 23 features"


def test_factors_of_two_dtypes_get_pefts_error():
    for layer in layer_pair():
        layer.lora_B.bfloat16()
        with pytest.raises(RuntimeError, match="to have the same dtype"):
            layer(torch.ones(2, 24))


@pytest.mark.parametrize("part", ["all", "factors", "base"])
def test_float64_under_autocast_is_pefts_own_call(part):
    oracle, fused = layer_pair()
    for layer in (oracle, fused):
        parts = {"all": [layer], "factors": [layer.lora_A, layer.lora_B], "base": [layer.base_layer]}
        nn.ModuleList(parts[part]).double()
    x = torch.randn(4, 24, dtype=oracle.weight.dtype)
    with torch.autocast("cpu", torch.bfloat16), fused_calls() as calls:
        results = []
        for layer in (oracle, fused):
            try:
                results.append(layer(x))
            except RuntimeError as error:  # PEFT fails where autocast leaves the factors in float64
                results.append(torch.tensor(list(str(error).encode())))
    assert not calls and torch.equal(*results)


class Watched(torch.Tensor):
    """A tensor of somebody else's class, which notes the functions that are called with it."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_an_input_of_another_class_is_pefts_own_call():
    oracle, fused = layer_pair()
    x = torch.randn(2, 24).as_subclass(Watched)
    assert torch.equal(fused(x), oracle(x)) and type(fused(x)) is Watched
    assert not any("lora_linear" in name for name in Watched.seen)


def test_dropout_follows_its_own_module():
    """PEFT's dropout is a module with a `training` of its own."""
    oracle, fused = layer_pair(lora_dropout=0.5)
    x = torch.randn(4, 24)
    for layer in (oracle, fused):
        layer.train()
        layer.lora_dropout.eval()
    assert_close(run(fused, x), run(oracle, x), 1e-5)


def test_a_parametrized_base_is_left_alone():
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["normed"]), Mixed())
    assert hf_peft.accelerate(model) == 0
    assert "ParametrizedLinear" in hf_peft.coverage(model).layers[0].reason


def test_coverage_follows_the_state_of_the_adapters():
    _, model = pair("llama")
    name = "base_model.model.model.layers.0.self_attn.q_proj"

    def reason():
        return {layer.name: layer.reason for layer in hf_peft.coverage(model).layers}[name]

    assert reason() is None
    with model.disable_adapter():
        assert reason() == "its adapters are disabled: only the base layer runs"
    model.merge_adapter()
    assert reason() == "the weight holds the merged default: only the base layer runs"
    model.unmerge_adapter()
    model.add_adapter("dora", config(use_dora=True))
    assert reason() is None
    (layer,) = [layer for layer in hf_peft.coverage(model).layers if layer.name == name]
    assert layer.adapters == {"default": None, "dora": "DoraLinearVariant replaces plain LoRA"}
    assert layer.active == ("default",)
    assert str(layer) == f"fused {name} (FusedLinear over Linear): dora: DoraLinearVariant replaces plain LoRA"
    model.set_adapter("dora")
    assert reason() == "dora: DoraLinearVariant replaces plain LoRA"
    model.delete_adapter("dora")
    model.set_adapter("default")
    assert reason() is None
    model.add_adapter("odd", config(target_modules=["k_proj"]))
    model.set_adapter("odd")
    assert reason() == "none of its adapters is active: only the base layer runs"


@pytest.mark.parametrize("first", ["accelerate", "fully_shard"])
def test_sharded_models_are_fused_where_they_run(first):
    oracle = with_adapter("llama")
    wanted = gradients(oracle, batch("llama"))
    model = copy.deepcopy(oracle)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        if first == "accelerate":
            assert hf_peft.accelerate(model) == 14
        for block in (*model.get_base_model().model.layers, model):
            fully_shard(block, mesh=mesh)
        if first == "fully_shard":
            assert hf_peft.accelerate(model) == 14
        assert hf_peft.coverage(model).fused == 14
        with fused_calls() as calls:
            got = gradients(model, batch("llama"))
        assert len(calls) == 14
        assert_close({name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in got.items()}, wanted)
        assert hf_peft.undo(model) == 14
    finally:
        dist.destroy_process_group()


def test_other_methods_are_named():
    model = peft.get_peft_model(
        base("llama"), peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    reasons = {layer.reason for layer in hf_peft.coverage(model).layers}
    assert reasons == {"ia3 is another method than LoRA"}
    with pytest.raises(ValueError, match=r"accelerate: PeftModel has no LoRA layer .* \(ia3 is another method"):
        hf_peft.accelerate(model)


@pytest.mark.parametrize("call", ["accelerate", "coverage", "undo"])
def test_what_is_no_module_is_named(call):
    with pytest.raises(TypeError, match=f"{call}: model is a str, but it must be a module with PEFT's layers"):
        getattr(hf_peft, call)("model")


@pytest.mark.parametrize("call", ["accelerate", "coverage"])
def test_a_model_without_adapters_is_named(call):
    with pytest.raises(ValueError, match=f"{call}: Linear has no LoRA layer .* get_peft_model"):
        getattr(hf_peft, call)(nn.Linear(2, 2))


def test_without_peft_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['peft'] = None; import torch; from peftops.integrations import hf_peft\n"
        "try: hf_peft.accelerate(torch.nn.Linear(1, 1))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "peftops.integrations.hf_peft needs peft: pip install 'peftops[peft]'", done.stderr
