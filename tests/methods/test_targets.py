"""Which layers are chosen: Hugging Face PEFT's rules."""

import re
import warnings

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peftops.methods import LoRA, attach
from peftops.methods.lora import plan
from peftops.methods.targets import Choice, find_modules, find_targets, first_match
from torch import nn

from .models import FAMILIES, Block, gpt2, llama, t5

LAYERS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up", "down")]

CHOICES = [
    (None, [*LAYERS, "head"]),
    ("all-linear", [*LAYERS, "head"]),
    ("All-Linear", [*LAYERS, "head"]),
    (["up"], ["layers.0.up", "layers.1.up"]),
    (["1.up", "head"], ["layers.1.up", "head"]),
    (["layers.0.down"], ["layers.0.down"]),
    (["embed", "head"], ["embed", "head"]),
    (r"layers\.\d+\.(q_proj|up)", [name for name in LAYERS if "down" not in name]),
    (r".*\.1\..*", LAYERS[3:]),
]


@pytest.mark.parametrize("target_modules, names", CHOICES)
def test_names_suffixes_and_patterns(target_modules, names):
    assert list(find_targets(Block(), Choice(target_modules)).layers) == names


@pytest.mark.parametrize("target_modules", [["p"], ["q_pro"], ["proj"], "up", "layers", [], ["layers"], ["norm"]])
def test_parts_of_a_name_and_other_modules_do_not_match(target_modules):
    with pytest.raises((ValueError, TypeError), match="chooses"):
        find_targets(Block(), Choice(target_modules))


RESTRICTED = [
    (Choice(["up", "down"], ["1.up"]), ["layers.0.up", "layers.0.down", "layers.1.down"]),
    (Choice(None, r".*(up|q_proj)"), ["layers.0.down", "layers.1.down", "head"]),
    (Choice(["up"], None, 1, "layers"), ["layers.1.up"]),
    (Choice(["up"], None, [0, 1], ["nothing", "layers"]), ["layers.0.up", "layers.1.up"]),
    (Choice(None, None, [0], ["layers"]), LAYERS[:3]),
    (Choice(["layers.0.up", "1.down"], None, 1, "layers"), ["layers.0.up", "layers.1.down"]),
    (Choice(["up"], None, []), ["layers.0.up", "layers.1.up"]),
]


@pytest.mark.parametrize("choice, names", RESTRICTED)
def test_exclusion_and_blocks(choice, names):
    assert list(find_targets(Block(), choice).layers) == names


def test_a_block_without_a_part_before_its_list_needs_layers_pattern():
    """PEFT's rule: in `layers.0.up` the number comes too early."""
    with pytest.raises(ValueError, match=r"chooses no layer of Block, with layers_to_transform 0"):
        find_targets(Block(), Choice(["up"], None, 0))
    assert len(find_targets(llama(), Choice(["q_proj"], None, 0)).layers) == 1


# ---- PEFT's own functions on random names ----------------------------------------------------------------------------

PART = st.sampled_from(["layers", "h", "0", "1", "12", "q", "qq", "up", "experts", "a_b"])
NAME = st.lists(PART, min_size=1, max_size=6).map(".".join)
NAMES = st.lists(NAME, max_size=3)
PATTERN = st.sampled_from([r".*", r".*\.q", r"(layers|h)\.\d\..*", r"q|up", r".*(up|q)", r"layers\.0\.q", ""])
NUMBERS = st.one_of(st.none(), st.integers(0, 12), st.lists(st.integers(0, 12), max_size=2))
BLOCKS = st.one_of(st.none(), st.sampled_from(["layers", "h", "experts"]), st.lists(PART, max_size=2))


@settings(max_examples=400, deadline=None)
@example("a.layers.1.experts.0.q", ["q"], None, 1, None)  # the first number counts
@example("a.layers.1.experts.0.q", ["q"], None, 0, None)
@example("a.layers.1.experts.0.q", ["q"], None, [0], ["experts", "layers"])
@given(NAME, st.one_of(NAMES, PATTERN), st.one_of(st.none(), NAMES, PATTERN), NUMBERS, BLOCKS)
def test_names_are_matched_as_peft_does(name, target_modules, exclude_modules, numbers, blocks):
    if isinstance(target_modules, str) or numbers is None:
        numbers = blocks = None
    config = peft.LoraConfig(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers_to_transform=numbers,
        layers_pattern=blocks,
    )
    expected = check_target_module_exists(config, name)
    choice = Choice(target_modules, exclude_modules, numbers, blocks)
    assert choice.takes(name) == (bool(expected) and type(expected).__name__ != "_ExcludedModule")


@settings(max_examples=200, deadline=None)
@given(NAME, st.lists(st.one_of(NAME, PATTERN.filter(bool), NAME.map("^{}".format)), max_size=4))
def test_patterns_are_matched_as_peft_does(name, patterns):
    found = first_match(patterns, name)
    assert (name if found is None else found) == get_pattern_key(patterns, name)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_is_what_peft_takes(name):
    task = "SEQ_CLS" if name in ("bert", "roberta") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(FAMILIES[name](), peft.LoraConfig(target_modules="all-linear", task_type=task))
    found = find_targets(FAMILIES[name](), Choice())
    adapted = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert list(found.layers) == adapted
    left = {"bert": "classifier", "roberta": "classifier.dense", "vit": None, "clip": None}
    assert left.get(name, "lm_head") in {*found.skipped, None}


def test_layers_that_carry_an_adapter_count_as_what_they_were():
    model = Block()
    attach(model, LoRA(target_modules=["up", "embed"]))
    assert list(find_targets(model, Choice()).layers) == [*LAYERS, "head"]
    assert list(find_targets(model, Choice(["embed", "1.up"])).layers) == ["embed", "layers.1.up"]
    assert list(find_targets(model, Choice(r".*\.1\..*")).layers) == LAYERS[3:]
    model = gpt2()
    everything = list(find_targets(model, Choice()).layers)
    attach(model, LoRA())
    assert list(find_targets(model, Choice()).layers) == everything


def test_a_module_in_several_places_is_refused():
    """PEFT would replace it in one of them, so that a file would mean two things."""
    model = Block()
    model.layers[1]["up"] = model.layers[0]["up"]
    reason = r"layers.0.up: it is one module in several places \(layers.0.up, layers.1.up\)"
    with pytest.raises(TypeError, match=reason):
        find_targets(model, Choice(["up"]))
    assert "layers.0.up" in find_targets(model, Choice()).skipped
    with pytest.raises(TypeError, match=r"shared: .*\(shared, encoder.embed_tokens, decoder.embed_tokens\)"):
        find_targets(t5(), Choice(["shared"]))
    with pytest.raises(ValueError, match="modules_to_save chooses layers.0.up, but it is one module in several"):
        find_modules(model, ["up"])


def test_two_names_of_one_parent_are_one_place():
    model = nn.ModuleDict({"one": Block()})
    model["two"] = model["one"]
    assert list(find_targets(model, Choice(["head"])).layers) == ["one.head"]


def test_layers_that_cannot_be_adapted_are_skipped_with_a_reason_or_named_in_an_error():
    model = nn.ModuleDict(
        {
            "good": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "encoder": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        }
    )
    found = find_targets(model, Choice())
    assert list(found.layers) == ["good"]
    skipped = ["attention.out_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2", "normed"]
    assert list(found.skipped) == skipped
    for name in skipped:
        with pytest.raises(TypeError, match=rf"{name}: "):
            find_targets(model, Choice(["good", name]))


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
    assert list(find_modules(model, ["head"])) == ["lm_head"]  # PEFT's rule: the end of the name
    assert list(find_modules(model, ["mlp", "gate_proj"])) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert find_modules(model, ["score"], strict=False) == {}
    inside = find_targets(model, Choice(), ["model.layers.0.mlp"])
    assert "model.layers.1.mlp.up_proj" in inside.layers and "model.layers.0.mlp.up_proj" not in inside.layers


# ---- the plan of a new adapter ---------------------------------------------------------------------------------------


def test_patterns_give_ranks_and_alphas():
    method = LoRA(
        rank=4,
        alpha=6,
        rank_pattern={"1.up": 2, "up": 3, r"layers\.\d\.down": 5},
        alpha_pattern={"^head$": 1.5, "q_proj": 9},
    )
    layers = plan(Block(), method).layers
    assert [layers[name].rank for name in [*LAYERS, "head"]] == [4, 3, 5, 4, 2, 5, 4]
    assert [layers[name].alpha for name in [*LAYERS, "head"]] == [9, 6, 6, 9, 6, 6, 1.5]
    assert layers["layers.1.up"].scaling == 3


def test_biases_are_those_of_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("bert", "gpt2", "qwen2"):
            targets = {"bert": ["query"], "gpt2": ["c_attn", "wte"], "qwen2": ["q_proj", "o_proj"]}[name]
            for bias in ("all", "lora_only"):
                model = FAMILIES[name]()
                trained = plan(model, LoRA(target_modules=targets, bias=bias)).trained
                theirs = peft.get_peft_model(FAMILIES[name](), peft.LoraConfig(target_modules=targets, bias=bias))
                named = theirs.base_model.model.named_parameters()
                expected = [n.replace("base_layer.", "") for n, p in named if p.requires_grad and "lora_" not in n]
                assert sorted(trained) == sorted(expected)
                assert all(model.get_parameter(key) is parameter for key, parameter in trained.items())


def test_a_bias_inside_a_module_that_is_trained_whole_is_not_trained_twice():
    what = plan(Block(), LoRA(target_modules=["up"], bias="all", modules_to_save=["head", "1.down"]))
    assert sorted(what.trained) == ["layers.0.down.bias", "layers.0.up.bias", "layers.1.up.bias", "norm.bias"]


BAD = [
    ({"target_modules": "(("}, "target_modules is '((', which is no regular expression"),
    ({"target_modules": 5}, "target_modules is 5, but it must be a list of names"),
    ({"exclude_modules": [""]}, "exclude_modules is [''], but it must be a list of names"),
    ({"exclude_modules": ["nowhere"]}, "exclude_modules is ('nowhere',), which fits no module"),
    ({"exclude_modules": ".*"}, "chooses no layer of Block, with exclude_modules '.*'"),
    ({"layers_to_transform": "1"}, "layers_to_transform is '1', but it must be a number or a list of numbers"),
    ({"layers_to_transform": [-1]}, "layers_to_transform holds -1"),
    ({"layers_to_transform": True}, "layers_to_transform holds True"),
    ({"layers_to_transform": 1, "target_modules": ".*up"}, "target_modules must be a list of names, or None"),
    ({"layers_pattern": "layers"}, "layers_pattern is ('layers',), which has no meaning without layers_to_transform"),
    ({"layers_to_transform": 1, "layers_pattern": 3}, "layers_pattern is 3, but it must be a list of names"),
    ({"rank_pattern": ["up"]}, "rank_pattern is ['up'], but it must be a dictionary"),
    ({"rank_pattern": {"up": 0}}, "rank_pattern, 'up': rank is 0"),
    ({"rank_pattern": {"(": 2}}, "rank_pattern is '(', which is no regular expression"),
    ({"rank_pattern": {"sideways": 2}}, "rank_pattern has 'sideways', which fits no adapted layer"),
    ({"alpha_pattern": {"up": "x"}}, "alpha_pattern, 'up': alpha is 'x'"),
    ({"alpha_pattern": {3: 1}}, "alpha_pattern has the key 3"),
    ({"init": "orthogonal", "rank_pattern": {"up": 3}}, "rank_pattern, 'up': rank is 3, but init 'orthogonal'"),
    ({"bias": "some"}, "bias is 'some', but it must be one of 'none', 'all', 'lora_only'"),
    ({"lora_bias": 1}, "lora_bias is 1, but it must be True or False"),
    ({"use_rslora": "yes"}, "use_rslora is 'yes', but it must be True or False"),
    ({"adapter_dtype": "float32"}, "adapter_dtype is 'float32', but it must be a torch.dtype or None"),
    ({"adapter_dtype": torch.bfloat16}, "layers.0.q_proj: adapter_dtype is bfloat16"),
    ({"lora_bias": True, "target_modules": ["embed"]}, "embed: lora_bias is for linear layers"),
    ({"modules_to_save": "head"}, "modules_to_save is 'head', but it must be a list of names"),
    ({"modules_to_save": ["nowhere"]}, "modules_to_save names 'nowhere', which matches no module"),
    ({"modules_to_save": ["dropout"]}, "modules_to_save chooses dropout, which has no parameters to train"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[next(iter(arguments)) for arguments, _ in BAD])
def test_a_wrong_argument_is_named(arguments, message):
    model = Block()
    with pytest.raises(ValueError, match=re.escape(message)):
        attach(model, LoRA(**arguments))
    assert type(model.head) is nn.Linear and all(parameter.requires_grad for parameter in model.parameters())
