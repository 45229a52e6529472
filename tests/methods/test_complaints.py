"""What users of other libraries complained about: one test for each, with the thread that it answers. Complaints about
files, merging, memory or compilation that a test elsewhere answers in full are not repeated here.
"""

import copy
import io
import sys

import peft
import peftops
import pytest
import torch
from peftops.methods import LoRA, attach, load
from torch import nn

from .models import Block, bert, distance, inputs, llama, randomise, tokens

UP = LoRA(rank=3, alpha=5, target_modules=["up"])


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter_dtype, wanted", [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_factors_have_the_dtype_that_was_asked_for(adapter_dtype, wanted, tmp_path):
    """axolotl-ai-cloud/axolotl#3310, huggingface/peft#2421: adapters of a bfloat16 model are float32 silently."""
    base = Block(torch.bfloat16)
    tuning = attach(copy.deepcopy(base), LoRA(rank=3, target_modules=["up"], adapter_dtype=adapter_dtype))
    randomise(tuning)
    assert {parameter.dtype for parameter in tuning.parameters()} == {wanted}
    tuning.save(tmp_path)
    again = load(base, tmp_path, trainable=True)
    assert {parameter.dtype for parameter in again.parameters()} == {wanted}
    assert all(torch.equal(old, new) for old, new in zip(tuning.parameters(), again.parameters(), strict=True))


def test_all_parameters_have_one_dtype():
    """huggingface/trl#1723, axolotl-ai-cloud/axolotl#1482, hiyouga/LlamaFactory#3853: "Must flatten tensors with
    uniform dtype" under FSDP.
    """
    model = Block(torch.bfloat16)
    tuning = attach(model, LoRA(rank=3, target_modules=["up"], lora_bias=True, modules_to_save=["head"]))
    tuning.add("second", UP, trainable=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_second_adapter_has_the_dtype_of_the_first(tmp_path):
    """huggingface/peft#1090: the second adapter was loaded in float16, the first one in float32."""
    half = attach(Block(torch.float16), UP)
    half.save(tmp_path)
    model = Block()
    with pytest.warns(UserWarning, match="another base model"):
        tuning = load(model, tmp_path, name="first")
        tuning.add("second", tmp_path)
    tuning.add("third", UP)
    tuning.activate(["first", "second", "third"])
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert model(tokens()).dtype == torch.float32


# ---- merging and combining -------------------------------------------------------------------------------------------


def test_a_bfloat16_merge_loses_no_more_than_one_rounding():
    """huggingface/peft#1388: merging in bfloat16 moves the loss from 2.1178 to 2.1214."""
    base = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    model = copy.deepcopy(base)
    tuning = attach(model, LoRA(rank=4, alpha=3, target_modules=["0"]))
    randomise(tuning)
    (a, b), layer = tuning.parameters(), theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    exact = base[0].weight.double() + 0.75 * b.double() @ a.double()
    report = tuning.merge(report=True)
    ours = (model[0].weight.double() - exact).abs()
    assert torch.all(ours <= exact.abs() * 2**-8) and report.largest == pytest.approx(ours.max().item(), rel=1e-4)
    assert ours.norm() < (theirs.merge_and_unload()[0].weight.double() - exact).norm()
    tuning.unmerge()
    assert torch.equal(model[0].weight, base[0].weight)


def test_an_adapter_on_another_base_is_noticed(tmp_path):
    """unslothai/unsloth-zoo#810: merged into a base that was not the one it was trained on (the weights before their
    quantisation), which gave a degenerate model.
    """
    base = Block()
    attach(copy.deepcopy(base), UP).save(tmp_path)
    with torch.no_grad():
        for layer in base.layers:
            layer["up"].weight.copy_((layer["up"].weight * 16).round() / 16)
    with pytest.warns(UserWarning, match="trained on another base model"):
        load(base, tmp_path)


def test_no_layer_is_left_out_of_a_merge():
    """unslothai/unsloth-zoo#779: 57 of 60 deltas of a mixture of experts were dropped without a word."""
    experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(60))
    before = copy.deepcopy(experts)
    tuning = attach(experts, LoRA(rank=2))
    randomise(tuning)
    report = tuning.merge(report=True)
    assert [layer.name for layer in report.layers] == [str(index) for index in range(60)]
    assert all(layer.delta > 0 and layer.unchanged < 0.1 for layer in report.layers)
    assert not any(torch.equal(old.weight, new.weight) for old, new in zip(before, experts, strict=True))


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"lora_bias": True}, {"use_rslora": True, "lora_bias": True}]
)
def test_scale_merge_and_combination_agree(options, weight, tmp_path):
    """huggingface/peft#3761, #3449, #1155, #2733: combinations are wrong with rsLoRA and with a bias of B, and the
    setter of the scale forgets rsLoRA.
    """
    base, ids = Block().eval(), tokens()
    tuning = attach(copy.deepcopy(base), LoRA(rank=4, alpha=3, target_modules=["up", "q_proj"], **options))
    randomise(tuning)
    tuning.activate({"default": weight})
    scaled = tuning.model(ids)
    tuning.merge()
    assert distance(tuning.model(ids), scaled) < 1e-6
    tuning.unmerge()
    tuning.save(tmp_path / "a")
    peftops.combine({"a": tmp_path / "a"}, [weight], output=tmp_path / "out")
    model = copy.deepcopy(base)
    load(model, tmp_path / "out")
    assert distance(model(ids), scaled) < 1e-6
    layer = base.layers[0]["up"]
    own = {name.split(".")[-2]: p.double() for name, p in tuning.named_parameters() if name.startswith("layers.0.up")}
    s = weight * 3 / (2 if options.get("use_rslora") else 4)
    x = torch.randn(5, 16, dtype=torch.float64)
    low = x @ own["lora_a"].t() @ own["lora_b"].t() + own.get("lora_bias", 0)
    expected = x @ layer.weight.double().t() + layer.bias.double() + s * low
    assert distance(tuning.model.layers[0]["up"](x.float()), expected) < 1e-6


# ---- compilation -----------------------------------------------------------------------------------------------------


def test_a_compiled_model_takes_an_adapter_of_other_layers(tmp_path):
    """huggingface/diffusers#9279, #11408, huggingface/peft#3593: a swap compiles anew, and is impossible where the
    other adapter has other targets. Fewer of them cost nothing, new ones one compilation.
    """
    torch.compiler.reset()
    base, ids = Block().eval(), tokens()
    wanted = {}
    for name, targets in {"both": ["up", "down"], "up": ["up"], "other": ["q_proj", "down"]}.items():
        tuning = attach(copy.deepcopy(base), LoRA(rank=2, target_modules=targets))
        randomise(tuning)
        tuning.save(tmp_path / name)
        wanted[name] = tuning.model(ids)
    model = copy.deepcopy(base)
    tuning = load(model, tmp_path / "both")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(compiled(ids), wanted["both"]) < 1e-6
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name in ("up", "both"):
            tuning.swap("default", tmp_path / name)
            assert distance(compiled(ids), wanted[name]) < 1e-6
    tuning.swap("default", tmp_path / "other")
    assert distance(compiled(ids), wanted["other"]) < 1e-6


# ---- attaching and loading -------------------------------------------------------------------------------------------


def test_attaching_calls_for_no_memory_on_the_meta_device_and_grows_with_the_layers():
    """huggingface/peft#3039, #871, artidoro/qlora#208: injecting or loading takes minutes. The calls into Python that
    800 layers take are about four times those of 200.
    """
    calls = []
    for layers in (200, 800):
        with torch.device("meta"):
            model = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(layers))
        tuning, count = count_calls(lambda model=model: attach(model, LoRA(rank=8)))
        assert all(parameter.is_meta for parameter in model.parameters()) and len(tuning.parameters()) == 2 * layers
        calls.append(count)
    assert calls[1] < 5 * calls[0]


def test_merging_and_saving_grow_with_the_layers(tmp_path):
    """huggingface/peft#871: work on every layer that looks at every layer is minutes for a mixture of experts."""
    calls = {"merge": [], "save": []}
    for layers in (100, 400):
        tuning = attach(nn.ModuleList(nn.Linear(4, 4) for _ in range(layers)), LoRA(rank=1))
        calls["save"].append(count_calls(lambda tuning=tuning: tuning.save(tmp_path))[1])
        calls["merge"].append(count_calls(tuning.merge)[1])
    assert all(more < 5 * few for few, more in calls.values()), calls


def count_calls(function):
    """The function's result, and how often Python called a function or went on with a generator."""
    count = 0

    def count_call(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_call)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, count


def test_a_classification_head_comes_back(tmp_path):
    """huggingface/peft#2422, huggingface/sentence-transformers#3980, hiyouga/LlamaFactory#8859: after loading, the head
    is a random one, with no more than a warning.
    """
    base = bert().eval()
    model, arguments = copy.deepcopy(base), inputs(base)
    tuning = attach(model, LoRA(rank=2, target_modules=["query"], modules_to_save=["classifier"]))
    randomise(tuning)
    tuning.save(tmp_path)
    nn.init.normal_(base.classifier.weight)
    load(base, tmp_path)
    assert torch.equal(base.classifier.weight, model.classifier.weight)
    assert torch.equal(base(**arguments).logits, model(**arguments).logits)


def test_tied_weights_survive_saving_and_loading(tmp_path):
    """huggingface/peft#2699: tied weights come apart or are missing."""
    base = llama(tie_word_embeddings=True).eval()
    model, arguments = copy.deepcopy(base), inputs(base)
    tuning = attach(model, LoRA(rank=2, target_modules=["q_proj", "embed_tokens"]))
    randomise(tuning)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tuning.save(tmp_path)
    load(base, tmp_path)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base(**arguments).logits, model(**arguments).logits)


# ---- any model -------------------------------------------------------------------------------------------------------


def test_silent_lack_of_training_is_named():
    """huggingface/transformers#42489, locuslab/open-unlearning#178: checkpointing over frozen embeddings trains
    nothing, and nobody is told.
    """
    model = llama().train()
    attach(model, LoRA(rank=2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids = tokens()
    report = peftops.check_trainable(model, {"input_ids": ids, "labels": ids})
    assert not report.ok and "enable_input_require_grads" in str(report)


def test_a_class_that_nobody_knows_is_adapted_by_its_layers(tmp_path):
    """axolotl-ai-cloud/axolotl#3378, adapter-hub/adapters#392: kernels and adapters fail on attention classes and
    models that are on no list, or whose code came with the weights.
    """
    space = {"nn": nn}
    exec(  # as remote code: there is no source file
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.mix = nn.Linear(6, 6)\n"
        "    def forward(self, x):\n"
        "        return self.mix(x.flip(-1)) * x\n",
        space,
    )
    model, x = space["Odd"](), torch.randn(3, 6)
    plain = copy.deepcopy(model)
    tuning = attach(model, LoRA(rank=2))
    randomise(tuning)
    tuning.save(tmp_path)
    load(plain, tmp_path)
    assert distance(plain(x), model(x)) < 1e-6 and [row.name for row in tuning.summary().modules] == ["mix"]


def test_every_layer_that_is_left_alone_is_listed_with_a_reason():
    """unslothai/unsloth#5865, #803, #373: "patched 0 QKV layers" and a run that is silently slow."""
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 1)})
    text = str(attach(model, LoRA(rank=2)).summary())
    assert "plain" in text and "left alone: attention.out_proj: " in text
    with pytest.raises(TypeError, match="attention.out_proj: .*subclass"):
        attach(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1)}), LoRA(target_modules=["out_proj"]))


def test_two_adapters_in_one_file_format_keep_a_plain_state_dict():
    """huggingface/peft#2699: the keys of a checkpoint change with the adapters that are active."""
    model = Block()
    tuning = attach(model, UP, name="a")
    tuning.add("b", LoRA(rank=2, target_modules=["up", "down"]), trainable=True)
    keys = list(model.state_dict())
    for which in ("b", ["a", "b"], None):
        tuning.activate(which)
        assert list(model.state_dict()) == keys
    assert Block().state_dict().keys() <= set(keys)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    randomise(tuning)
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
