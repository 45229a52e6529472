"""The content of adapter files: what is written for a method, what is refused, and what does not fit a model."""

import dataclasses
import json
import warnings

import pytest
import torch
from peftops.methods import LoRA, attach, load
from peftops.methods.files import load_adapter, save_adapter
from peftops.methods.fingerprint import fingerprint
from safetensors.torch import load_file, save_file
from torch import nn

from .adapters import CONFIG, TENSORS, assert_refused, edit, save_block
from .models import Block, randomise, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*trained on another base model")


@pytest.fixture
def saved(tmp_path):
    return save_block(tmp_path / "adapter")


# ---- written ---------------------------------------------------------------------------------------------------------


def test_all_linear_is_written_as_full_names(tmp_path):
    attach(Block(), LoRA()).save(tmp_path)
    names = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert names == [*(f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up", "down")), "head"]


def test_full_names_that_are_suffixes_of_others_are_written_as_a_pattern(tmp_path):
    """`linear1` alone would also choose the encoder's, which all-linear has left alone."""
    models = [
        nn.ModuleDict({"linear1": nn.Linear(4, 4), "encoder": nn.TransformerEncoderLayer(4, 2, 8)}) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    attach(models[0], LoRA()).save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "linear1"
    assert [row.name for row in load(models[1], tmp_path).summary().modules] == ["linear1"]


def test_a_rank_of_one_layer_is_not_read_as_that_of_another(tmp_path):
    """`a` fits `x.a` as well, so that it is anchored where the two differ."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "x": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    tuning = attach(model, LoRA(rank=4, rank_pattern={"x.a": 3, "a": 2}))
    tuning.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["rank_pattern"] == {"^a": 2, r"^x\.a": 3}
    fresh = nn.ModuleDict({"a": nn.Linear(4, 4), "x": nn.ModuleDict({"a": nn.Linear(4, 4)})})
    assert [row.rank for row in load(fresh, tmp_path).summary().modules] == [2, 3]


def test_all_arguments_come_back(tmp_path):
    method = LoRA(
        rank=4,
        alpha=3.5,
        dropout=0.25,
        target_modules=("up", "down"),
        exclude_modules=("1.down",),
        layers_to_transform=(0, 1),
        layers_pattern=("layers",),
        rank_pattern={"up": 2, "0.down": 3},
        alpha_pattern={"down": 1.5},
        use_rslora=True,
        bias="all",
        modules_to_save=("head",),
    )
    attach(Block(), method).save(tmp_path)
    assert load(Block(), tmp_path).method == method
    for change in ({"bias": "lora_only", "lora_bias": True}, {"init": "orthogonal", "layers_to_transform": 0}):
        changed = dataclasses.replace(method, **({"rank_pattern": {"up": 2}} | change))
        attach(Block(), changed).save(tmp_path)
        assert load(Block(), tmp_path).method == changed


def test_another_base_is_noticed(saved, seed):
    config, tensors = load_adapter(saved)
    torch.manual_seed(seed)
    assert config["peftops_base_fingerprint"] == fingerprint(
        Block(), [f"layers.{i}.{n}" for i in range(2) for n in ("q_proj", "up")]
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(Block(), saved)
        save_file(tensors, saved / TENSORS)
        load(Block(), saved)
    save_adapter(saved, config, tensors)
    with pytest.warns(UserWarning, match="adapter: the adapter was trained on another base model than this one"):
        load(Block(), saved)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_the_fingerprint_is_the_original_base_s_also_when_it_is_changed_or_merged(init, tmp_path):
    torch.manual_seed(3)
    tuning = attach(Block(), LoRA(rank=2, init=init, bias="all"))
    randomise(tuning)
    for folder, merged in (("plain", False), ("merged", True)):
        if merged:
            tuning.merge()
        tuning.save(tmp_path / folder)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(Block(), tmp_path / folder)


def test_a_sufficient_config_is_enough(saved):
    keep = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({key: config[key] for key in keep}))
    assert load(Block(), saved).method.dropout == 0


# ---- refusals --------------------------------------------------------------------------------------------------------

ACTIVE_KEYS = {
    "use_dora": True,
    "use_bdlora": {"blocks": 2},
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1]],
    "init_lora_weights": "pissa_niter_16",
    "ensure_weight_tying": True,
    "velora_config": {"rank": 1},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 8},
    "alora_invocation_tokens": [5],
    "megatron_config": {"a": 1},
    "a_key_of_the_future": "on",
}


@pytest.mark.parametrize("key", ACTIVE_KEYS)
def test_an_active_key_that_is_not_supported_is_named(key, saved):
    edit(saved, **{key: ACTIVE_KEYS[key]})
    assert_refused(saved, ValueError, rf"{saved.name}: {key} is .* not supported")


@pytest.mark.parametrize(
    "init", ["loftq", "corda", "lora_ga", "mica", "pissa_niter_4", "a new one", 1, ["pissa"], None]
)
def test_a_start_that_is_not_supported_is_named(init, saved):
    edit(saved, init_lora_weights=init)
    assert_refused(
        saved, ValueError, r"init_lora_weights is .*, which is not supported: the adapter belongs to another"
    )


def test_keys_that_are_off_or_of_no_effect_or_ours_are_accepted(saved):
    edit(saved, a_key_of_the_future=False, another=None, peftops_note="x", qalora_group_size=32, peft_version="0.7.0")
    edit(
        saved, loftq_config={"loftq_bits": 4}, eva_config={"rho": 2.0}, corda_config={}, megatron_core="m", revision="x"
    )
    for init in (True, False, "eva", "gaussian"):
        edit(saved, init_lora_weights=init)
        load(Block(), saved)


def test_a_pattern_that_fits_no_layer_is_a_warning(saved):
    edit(saved, alpha_pattern={"down": 3})
    with pytest.warns(UserWarning, match="alpha_pattern has down, which fits no adapted layer"):
        load(Block(), saved)


BAD_CONFIGS = [
    ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA', but only 'LORA' is supported"),
    ({"peft_type": None}, "peft_type is None"),
    ({"r": "8"}, "rank is '8'"),
    ({"r": float("nan")}, "rank is nan"),
    ({"r": 10**12}, "wrong shape"),
    ({"lora_alpha": float("inf")}, "alpha is inf"),
    ({"lora_dropout": 2}, "dropout is 2"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": "(("}, "no regular expression"),
    ({"target_modules": 5}, "target_modules is 5"),
    ({"target_modules": ["../../etc"]}, "chooses no layer"),
    ({"target_modules": ["__class__"]}, "chooses no layer"),
    ({"target_modules": ["norm"]}, "norm: LayerNorm is neither"),
    ({"target_modules": ["embed"], "lora_bias": True}, "embed: lora_bias is for linear layers"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
    ({"rank_pattern": {"(": 1}}, "rank_pattern is .* no regular expression"),
    ({"rank_pattern": {"up": -1}}, "rank_pattern, 'up': rank is -1"),
    ({"alpha_pattern": {"up": "x"}}, "alpha_pattern, 'up': alpha is 'x'"),
    ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
    ({"bias": "boft_only"}, "bias is 'boft_only'"),
    ({"lora_bias": "yes"}, "lora_bias is 'yes'"),
    ({"use_rslora": 1}, "use_rslora is 1"),
    ({"exclude_modules": 3}, "exclude_modules is 3"),
    ({"exclude_modules": ["up", "q_proj"]}, "chooses no layer of Block, with exclude_modules"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform holds '0'"),
    ({"layers_pattern": "layers"}, "layers_pattern is .* no meaning without layers_to_transform"),
]


@pytest.mark.parametrize("changes, match", BAD_CONFIGS)
def test_bad_configurations_are_named(changes, match, saved):
    edit(saved, **changes)
    assert_refused(saved, (ValueError, TypeError), match)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(saved):
    tensors = load_file(saved / TENSORS)
    first = "base_model.model.layers.0.up.lora_A.weight"
    del tensors["base_model.model.layers.1.up.lora_B.weight"], tensors["base_model.model.head.bias"]
    tensors["base_model.model.layers.0.down.lora_A.weight"] = torch.zeros(3, 24)
    tensors["base_model.model.__class__.weight"] = torch.zeros(1)
    tensors[first] = torch.zeros(16, 3)
    tensors["base_model.model.layers.0.q_proj.lora_A.weight"] = torch.zeros(3, 16, dtype=torch.int32)
    save_file(tensors, saved / TENSORS)
    with pytest.raises(ValueError) as caught:
        load(Block(), saved)
    text = str(caught.value)
    for part in (
        "missing (2): base_model.model.layers.1.up.lora_B.weight, base_model.model.head.bias",
        "unexpected (2):",
        "layers.0.down.lora_A.weight",
        "base_model.model.__class__.weight",
        f"wrong shape (1): {first} is [16, 3], but the model and the configuration need [3, 16]",
        "wrong dtype (1): base_model.model.layers.0.q_proj.lora_A.weight is int32",
    ):
        assert part in text
    assert_refused(saved, ValueError, "do not fit the model")


def test_a_bias_that_is_missing_and_one_that_nobody_trains_are_listed(tmp_path):
    attach(Block(), LoRA(target_modules=["up"], bias="lora_only", lora_bias=True)).save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    del tensors["base_model.model.layers.0.up.base_layer.bias"], tensors["base_model.model.layers.0.up.lora_B.bias"]
    tensors["base_model.model.norm.bias"] = torch.zeros(16)
    tensors["base_model.model.layers.1.up.base_layer.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError) as caught:
        load(Block(), tmp_path)
    for part in (
        "missing (2): base_model.model.layers.0.up.lora_B.bias, base_model.model.layers.0.up.base_layer.bias",
        "unexpected (1): base_model.model.norm.bias",
        "wrong shape (1): base_model.model.layers.1.up.base_layer.bias is [7]",
    ):
        assert part in str(caught.value)


def test_long_lists_and_odd_names_are_shortened(saved):
    save_file({f"x.{i}\n{'y' * 1000}": torch.zeros(1) for i in range(100)}, saved / TENSORS)
    with pytest.raises(
        ValueError, match=r"missing \(10\): .*, and 2 more; unexpected \(100\): .*, and 92 more"
    ) as caught:
        load(Block(), saved)
    assert len(str(caught.value)) < 3000 and "\n" not in str(caught.value)


def test_a_model_of_other_sizes_is_refused(saved):
    model = Block()
    model.head = torch.nn.Linear(16, 7)
    with pytest.raises(
        ValueError, match=r"head.weight is \[5, 16\], but the model and the configuration need \[7, 16\]"
    ):
        load(model, saved)
    assert torch.isfinite(model(tokens())).all()
