"""Hugging Face PEFT as the oracle: the same output and gradients, and files both ways."""

import json
import warnings

import peft
import pytest
import torch
from peftops.methods import LoRA, attach, load
from peftops.methods.peft_config import DEFAULTS
from safetensors.torch import load_file, save_file

from .models import FAMILIES, MODELS, Block, distance, inputs, logits, outputs, qwen2, randomise, tokens

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's, of lora_B.bias of one dimension, layers without a bias, tied weights, Conv1D and embeddings.
_THEIR_WARNINGS = ("invalid shape", "lora_bias=True", "tie_word|tied", "fan_in_fan_out")
_THEIR_WARNINGS += ("save_embedding_layers", "Using Rank-Stabilized LoRA")
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*({text})") for text in _THEIR_WARNINGS]

# model, PEFT's config
THEIRS = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "llama all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "use_rslora": True}),
    "llama pattern": ("llama", {"target_modules": r".*\.(gate|up|down)_proj", "lora_alpha": 3}),
    "llama ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"layers.0.self_attn.o_proj": 5},
            "use_rslora": True,
        },
    ),
    "llama blocks": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
            "exclude_modules": ["self_attn.q_proj"],
        },
    ),
    "llama embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "bias": "all"}),
    "llama head": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    "gaussian": ("llama", {"target_modules": ["v_proj"], "init_lora_weights": "gaussian"}),
    "qwen2 tied embedding": ("qwen2", {"target_modules": ["embed_tokens", "o_proj"], "bias": "all"}),
    "qwen2 biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "lora_bias": True}),
    "mistral": ("mistral", {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*", "task_type": "CAUSAL_LM"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "lora_dropout": 0.1}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["c_attn", "wte"], "bias": "lora_only", "task_type": "CAUSAL_LM"}),
    "opt": ("opt", {"target_modules": ["embed_tokens", "k_proj", "fc1"], "bias": "all", "lora_bias": False}),
    "bert with head": ("bert", {"target_modules": ["query", "value", "pooler.dense"], "task_type": "SEQ_CLS"}),
    "bert biases with head": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "bert all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "bert embeddings": ("bert", {"target_modules": ["word_embeddings", "position_embeddings"], "task_type": "SEQ_CLS"}),
    "roberta with head": ("roberta", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "t5": ("t5", {"target_modules": ["q", "wo", "relative_attention_bias"], "task_type": "SEQ_2_SEQ_LM"}),
    "bart": ("bart", {"target_modules": ["q_proj", "fc2", "lm_head"], "bias": "all", "task_type": "SEQ_2_SEQ_LM"}),
    "vit convolution": ("vit", {"target_modules": ["projection", "query"], "modules_to_save": ["classifier"]}),
    "vit biases": ("vit", {"target_modules": ["projection", "dense"], "lora_bias": True, "bias": "all"}),
    "clip": ("clip", {"target_modules": ["patch_embedding", "token_embedding", "q_proj", "text_projection"]}),
}


def twins(name, count=2):
    """Models with the same values."""
    models = [FAMILIES[name]().eval() for _ in range(count)]
    for other in models[1:]:
        other.load_state_dict(models[0].state_dict())
    return models


def theirs_trained(model, options, std=0.2, **settings):
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, **options), **settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    return theirs


# ---- files both ways -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", THEIRS)
def test_a_directory_of_theirs_gives_the_same_output_here_and_back(case, tmp_path):
    name, options = THEIRS[case]
    model, other, third, fourth = twins(name, 4)
    theirs, arguments = theirs_trained(other, options), inputs(model)
    expected, base = outputs(theirs, arguments), outputs(model, arguments)
    theirs.save_pretrained(tmp_path / "theirs")
    values = {key: value.clone() for key, value in model.state_dict().items()}
    tuning = load(model, tmp_path / "theirs")
    assert distance(outputs(model, arguments), expected) < 1e-5 < 1e-2 < distance(base, expected)
    assert tuning.parameters() == [] and not any(p.requires_grad for p in model.parameters())
    with tuning.disabled():
        assert torch.equal(outputs(model, arguments), base)
    with pytest.raises(RuntimeError, match="nothing is trained; load the adapter with trainable=True"):
        tuning.optimizer(1e-3)

    tuning.save(tmp_path / "ours")
    written = [load_file(tmp_path / who / TENSORS) for who in ("theirs", "ours")]
    assert written[1].keys() <= written[0].keys()
    # Theirs also holds copies that nobody reads, and embeddings as they are in the base model.
    more = [key for key in written[0].keys() - written[1].keys() if ".modules_to_save." not in key]
    assert all("base_layer.weight" in key or "original_module" in key for key in more)
    assert not any("base_layer.weight" in key for key in written[1])
    assert all(torch.equal(tensor, written[0][key]) for key, tensor in written[1].items())
    back = peft.PeftModel.from_pretrained(third, tmp_path / "ours").eval()
    assert torch.equal(outputs(back, arguments), expected)
    fourth.load_adapter(tmp_path / "ours")
    assert torch.equal(outputs(fourth, arguments), expected)

    tuning.detach()
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


OURS = {
    "llama": ("llama", LoRA(rank=4, target_modules=["q_proj", "v_proj"], alpha=6)),
    "llama all-linear": ("llama", LoRA(rank=3, use_rslora=True, layers_to_transform=1)),
    "llama pattern": ("llama", LoRA(rank=3, target_modules=r".*\.mlp\..*_proj", init="gaussian")),
    "llama everything": (
        "llama",
        LoRA(
            rank=4,
            target_modules=["embed_tokens", "q_proj", "up_proj", "lm_head"],
            exclude_modules=["1.self_attn.q_proj"],
            rank_pattern={
                "q_proj": 3,
                "lm_head": 2,
                r".*_proj": 5,
            },  # sorted, as in a file, it would mean another thing
            alpha_pattern={"embed_tokens": 2.5},
            use_rslora=True,
            bias="lora_only",
            modules_to_save=["norm"],
        ),
    ),
    "qwen2": (
        "qwen2",
        LoRA(rank=4, target_modules=["q_proj", "v_proj"], bias="all", lora_bias=True, init="orthogonal"),
    ),
    "mistral": ("mistral", LoRA(rank=4, init="orthogonal", exclude_modules=["down_proj"])),
    "gpt2": ("gpt2", LoRA(rank=4, dropout=0.1)),
    "gpt2 embeddings": ("gpt2", LoRA(rank=4, target_modules=["wte", "wpe", "c_attn"], bias="all", init="gaussian")),
    "opt": ("opt", LoRA(rank=4, target_modules=["embed_tokens", "out_proj"], bias="all")),
    "bert with head": ("bert", LoRA(rank=4, modules_to_save=["classifier"], bias="all")),
    "roberta with head": ("roberta", LoRA(rank=4, target_modules=["query", "dense"], modules_to_save=["classifier"])),
    "t5": ("t5", LoRA(rank=4, target_modules=["q", "wi", "relative_attention_bias"], use_rslora=True)),
    "bart": ("bart", LoRA(rank=4, bias="all")),
    "vit": (
        "vit",
        LoRA(rank=4, target_modules=["projection", "query"], lora_bias=True, modules_to_save=["classifier"]),
    ),
    "vit orthogonal": ("vit", LoRA(rank=4, target_modules=["projection", "dense"], init="orthogonal")),
    "clip": ("clip", LoRA(rank=4, target_modules=["patch_embedding", "token_embedding", "fc1"])),
    "plain PyTorch": ("block", LoRA(rank=4, modules_to_save=["head", "norm"])),
}


def plain(name):
    """A model of these tests, and one that knows nothing of transformers."""
    return FAMILIES[name]() if name in FAMILIES else Block()


@pytest.mark.parametrize("case", OURS)
def test_a_directory_of_ours_gives_the_same_output_there(case, tmp_path):
    name, method = OURS[case]
    model, other, third, fresh = (plain(name).eval() for _ in range(4))
    for copy in (other, third, fresh):
        copy.load_state_dict(model.state_dict())
    call, arguments = (outputs, inputs(model)) if name != "block" else (logits, tokens())
    tuning = attach(model, method)
    randomise(tuning)
    tuning.save(tmp_path)
    expected = call(model, arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's, of keys that are missing among them
        warnings.filterwarnings(
            "ignore", message=".*(fan_in_fan_out|tie_word_embeddings|weight tying|peftops_|lora_bias)"
        )
        theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert distance(call(theirs, arguments), expected) < 1e-5
    kinds = {"bert": peft.PeftModelForSequenceClassification, "bart": peft.PeftModelForSeq2SeqLM}
    assert isinstance(theirs, kinds.get(name, peft.PeftModel))
    adapted = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == {row.name for row in tuning.summary().modules if row.rank}
    if name != "block":
        third.load_adapter(tmp_path)
        assert distance(call(third, arguments), expected) < 1e-5
    again = load(fresh, tmp_path, trainable=True)
    assert torch.equal(call(fresh, arguments), expected)
    assert [key for key, _ in again.named_parameters()] == [key for key, _ in tuning.named_parameters()]


def test_the_config_has_their_keys_and_form(tmp_path):
    model = MODELS["bert"]()
    theirs = peft.get_peft_model(MODELS["bert"](), peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    theirs.save_pretrained(tmp_path / "theirs")
    attach(model, LoRA(rank=4, target_modules=["query"], modules_to_save=["classifier"])).save(tmp_path / "ours")
    text = (tmp_path / "ours" / CONFIG).read_text()
    expected, config = json.loads((tmp_path / "theirs" / CONFIG).read_text()), json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert config.pop("modules_to_save") == ["classifier"]
    assert expected.pop("modules_to_save") == ["classifier", "score"]
    assert config == expected
    assert set(DEFAULTS) == {*expected, "modules_to_save"}


# ---- what files of theirs hold beside the adapter --------------------------------------------------------------------


def test_an_embedding_in_the_file_is_honoured(tmp_path):
    """PEFT stores an adapted or resized embedding whole. Where it is not the base model's, it is the adapter's."""
    model, other, third = (m for m in (qwen2(False).eval(), qwen2(False).eval(), qwen2(False).eval()))
    third.load_state_dict(model.state_dict())
    theirs, arguments = theirs_trained(other, {"target_modules": ["embed_tokens", "o_proj"]}), inputs(model)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    tensors = load_file(tmp_path / "theirs" / TENSORS)
    stored = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors["base_model.model.lm_head.weight"] = other.lm_head.weight.detach().clone()  # a head that was resized
    save_file(tensors, tmp_path / "theirs" / TENSORS)
    expected = outputs(peft.PeftModel.from_pretrained(third, tmp_path / "theirs").eval(), arguments)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    base = outputs(model, arguments)
    tuning = load(model, tmp_path / "theirs", trainable=True)
    assert distance(outputs(model, arguments), expected) < 1e-5
    assert not any("weight" in key for key, _ in tuning.named_parameters())
    with tuning.disabled():
        assert torch.equal(outputs(model, arguments), base)
    tuning.save(tmp_path / "ours")
    assert torch.equal(load_file(tmp_path / "ours" / TENSORS)[stored], tensors[stored])
    tuning.detach()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model, tmp_path / "ours")
    assert distance(outputs(model, arguments), expected) < 1e-5


def test_what_cannot_be_kept_apart_is_named_in_an_error(tmp_path):
    """PEFT copies a tied embedding that is trained whole; here it would change with the head."""
    model, other = twins("qwen2")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    theirs_trained(other, options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="modules_to_save: model.embed_tokens.weight is tied to lm_head.weight"):
        load(model, tmp_path)
    model, other = twins("bart")
    theirs_trained(other, {"target_modules": ["embed_tokens", "q_proj"]}).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="model.encoder.embed_tokens: BartScaledWordEmbedding is a subclass of Embed"):
        load(model, tmp_path)
    model, other = twins("opt")
    theirs_trained(other, {"target_modules": ["embed_positions"]}).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="model.decoder.embed_positions: OPTLearnedPositionalEmbedding is a subclass"):
        load(model, tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_files_of_older_versions(bias, tmp_path):
    """Before 0.6 an adapted layer held its bias itself; later versions left out those of `lora_only`."""
    model, other, third = twins("qwen2", 3)
    theirs, arguments = theirs_trained(other, {"target_modules": ["q_proj"], "bias": bias}), inputs(model)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    keep = ("peft_type", "r", "lora_alpha", "target_modules", "bias")
    old = {"enable_lora": None, "merge_weights": False}
    (tmp_path / CONFIG).write_text(json.dumps({key: config[key] for key in keep} | old))
    tensors = load_file(tmp_path / TENSORS)
    save_file({key.replace(".base_layer.", "."): value for key, value in tensors.items()}, tmp_path / TENSORS)
    load(model, tmp_path)
    assert distance(outputs(model, arguments), outputs(theirs, arguments)) < 1e-5
    save_file({key: value for key, value in tensors.items() if "bias" not in key}, tmp_path / TENSORS)
    with pytest.warns(UserWarning, match=f"bias is '{bias}', but the file holds none"):
        load(third, tmp_path)


# ---- starts that change the base weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_their_adapter_on_another_base_weight_fits_the_original_one_here(init, use_rslora, tmp_path):
    model, other, third = twins("llama", 3)
    options = {
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "init_lora_weights": init,
        "use_rslora": use_rslora,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"0.self_attn.q_proj": 5},
    }
    theirs, arguments = theirs_trained(other, options), inputs(model)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, base = outputs(theirs, arguments), outputs(model, arguments)
    tuning = load(model, tmp_path / "theirs")
    assert distance(outputs(model, arguments), expected) < 2e-5 < 1e-2 < distance(base, expected)
    ranks = {row.name.rpartition(".")[2]: row.rank for row in tuning.summary().modules}
    assert ranks == {"embed_tokens": 4, "q_proj": 8, "down_proj": 6}
    with tuning.disabled():
        assert torch.equal(outputs(model, arguments), base)
    tuning.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(third, tmp_path / "ours").eval()
    assert distance(outputs(back, arguments), expected) < 2e-5


STARTS = [
    ("llama", LoRA(rank=4, init="pissa", target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})),
    ("llama", LoRA(rank=4, alpha=6, init="olora", use_rslora=True, alpha_pattern={"q_proj": 3})),
    ("gpt2", LoRA(rank=4, init="pissa", target_modules=["c_attn", "wpe"], lora_bias=False)),
    ("gpt2", LoRA(rank=4, init="olora", target_modules=["c_attn"], lora_bias=True)),
    ("vit", LoRA(rank=4, init="pissa_niter_4", target_modules=["projection", "query"])),
    ("llama", LoRA(rank=4, init=lambda weight, rank, s: principal(weight, rank, s), target_modules=["v_proj"])),
]


def principal(weight, rank, scaling, kept=1.0):
    """A start as a user may write it: the first rows, and what is left of the weight."""
    a, b = weight[:rank].clone(), torch.eye(len(weight), rank)
    return a, b, kept * weight - scaling * b @ a


@pytest.mark.parametrize("name, method", STARTS)
def test_our_adapter_on_another_base_weight_is_saved_for_the_original_one(name, method, tmp_path):
    model, other, third = twins(name, 3)
    arguments, tuning = inputs(model), attach(model, method)
    randomise(tuning, 0.05)
    tuning.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert distance(outputs(theirs, arguments), outputs(model, arguments)) < 2e-5
    load(third, tmp_path)
    assert distance(outputs(third, arguments), outputs(model, arguments)) < 2e-5
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)


def test_a_base_weight_that_no_adapter_brings_back_is_not_saved(tmp_path):
    def start(weight, rank, scaling):
        return principal(weight, rank, scaling, kept=0.9)

    tuning = attach(Block(), LoRA(rank=4, init=start, target_modules=["up"]))
    with pytest.raises(ValueError, match=r"save: init .*start.* gave layers.0.up a base weight that is not W - s B A"):
        tuning.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    tuning.merge()
    with pytest.raises(ValueError, match="is not W - s B A"):
        tuning.save(tmp_path)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


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
    saved = load_file(tmp_path / "ours" / TENSORS)
    assert all(torch.equal(saved[key], tensor) for key, tensor in load_file(tmp_path / TENSORS).items())


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
    tensors = {key: t.to(stored) for key, t in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS)
    loaded = load(Block(base), tmp_path, trainable=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {factors}
    a = loaded.model.layers[0]["up"].lora_a.default
    assert torch.equal(a, tensors["base_model.model.layers.0.up.lora_A.weight"].to(factors))


# ---- training --------------------------------------------------------------------------------------------------------

GRADIENTS = [
    ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "all", "lora_bias": True}),
    ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    ("vit", {"target_modules": ["projection", "value"], "use_rslora": True}),
]
_NAMES = {
    "lora_a.default": "lora_A.default.weight",
    "lora_b.default": "lora_B.default.weight",
    "lora_bias.default": "lora_B.default.bias",
}


def their_parameter(theirs, key):
    """PEFT's parameter for one of ours."""
    named = dict(theirs.base_model.model.named_parameters())
    for ours, name in _NAMES.items():
        key = key.replace(ours, name)
    owner, _, last = key.rpartition(".")
    embedding = key.replace("lora_A.default.weight", "lora_embedding_A.default")
    embedding = embedding.replace("lora_B.default.weight", "lora_embedding_B.default")
    return next(named[form] for form in (key, f"{owner}.base_layer.{last}", embedding) if form in named)


@pytest.mark.parametrize("name, options", GRADIENTS)
def test_forward_and_gradients_equal_theirs(name, options):
    model, other = twins(name)
    theirs = theirs_trained(other, {**options, "lora_alpha": 6})
    tuning, arguments = attach(model, LoRA(rank=4, alpha=6, **options)), inputs(model)
    pairs = [(parameter, their_parameter(theirs, key)) for key, parameter in tuning.named_parameters()]
    assert len(pairs) == sum(parameter.requires_grad for parameter in theirs.parameters())
    with torch.no_grad():
        for ours, reference in pairs:
            ours.copy_(reference)
    for run in (model, theirs):
        outputs(run, arguments).square().sum().backward()
    assert distance(outputs(model, arguments), outputs(theirs, arguments)) < 1e-5
    for ours, reference in pairs:
        assert distance(ours.grad, reference.grad) < 1e-5
