"""Several adapters in one model: add, activate, swap, delete."""

import copy

import peft
import pytest
import torch
from peftops.methods import LoRA, attach, load
from peftops.nn import LoRALinear
from peftops.nn.lora import LoRALayer
from torch._dynamo.utils import counters

from .models import Block, distance, llama, logits, randomise, tokens
from .test_lora import assert_same, snapshot

Q_AND_UP = ["q_proj", "up"]
FIRST = LoRA(rank=3, alpha=5, target_modules=Q_AND_UP)


@pytest.fixture
def directories(tmp_path):
    """Three trained adapters of one base; what the model gives with each of them; the base."""
    base = Block().eval()
    methods = {
        "a": FIRST,
        "b": LoRA(rank=5, target_modules=["up", "down"], use_rslora=True),
        "c": LoRA(rank=2, alpha=1, target_modules=Q_AND_UP),
    }
    for name, method in methods.items():
        tuning = attach(copy.deepcopy(base), method)
        randomise(tuning)
        tuning.save(tmp_path / name)
    return base, {name: tmp_path / name for name in methods}


def alone(base, directory, ids):
    model = copy.deepcopy(base)
    load(model, directory)
    return model(ids)


def layers_of(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoRALayer)}


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_each_adapter_alone_gives_what_it_gives_by_itself_to_the_last_bit(directories):
    base, paths = directories
    ids, model = tokens(), copy.deepcopy(base)
    tuning = load(model, paths["a"], name="a")
    for name in "bc":
        tuning.add(name, paths[name])
        assert tuning.active == {"a": 1.0} and torch.equal(model(ids), alone(base, paths["a"], ids))
    for name in "cab":
        tuning.activate(name)
        assert tuning.active == {name: 1.0} and torch.equal(model(ids), alone(base, paths[name], ids))
    tuning.activate(None)
    assert torch.equal(model(ids), base(ids))
    assert tuning.parameters() == [] and list(tuning.adapters) == ["a", "b", "c"]


def test_active_adapters_add_up_with_their_weights(directories):
    base, paths = directories
    base, ids = base.double(), tokens()
    model = copy.deepcopy(base)
    tuning = load(model, paths["a"], name="a")
    tuning.add("b", paths["b"])
    weights = {"a": 0.5, "b": -2.0}
    tuning.activate(weights)
    expected = copy.deepcopy(base)
    for name, weight in weights.items():
        other = copy.deepcopy(base)
        load(other, paths[name])
        for path in layers_of(other):
            layer = other.get_submodule(path)
            expected.get_submodule(path).weight.data += weight * layer.delta_weight("default")
    assert distance(model(ids), expected(ids)) < 1e-6
    tuning.merge()
    assert distance(model(ids), expected(ids)) < 1e-6
    tuning.unmerge()
    tuning.activate(["a", "b"])
    assert tuning.active == {"a": 1.0, "b": 1.0}


def test_activation_is_pefts(directories, tmp_path):
    base, paths = directories
    ids, model = tokens(), copy.deepcopy(base)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), paths["a"], adapter_name="a").eval()
    tuning = load(model, paths["a"], name="a")
    theirs.load_adapter(paths["b"], "b")
    tuning.add("b", paths["b"])
    for names in (["a"], ["b"], ["a", "b"]):
        theirs.base_model.set_adapter(names)
        tuning.activate(names)
        assert distance(model(ids), theirs(ids)) < 1e-5
    theirs.delete_adapter("a")
    tuning.delete("a")
    assert distance(model(ids), theirs(ids)) < 1e-5
    assert layers_of(model) == {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}


def test_swap_takes_the_place_and_keeps_the_parameter_objects(directories):
    base, paths = directories
    ids, model = tokens(), copy.deepcopy(base)
    tuning = load(model, paths["a"], trainable=True, name="a")
    before = dict(tuning.named_parameters())
    tuning.swap("a", paths["c"])
    assert torch.equal(model(ids), alone(base, paths["c"], ids))
    assert all(before[name] is parameter for name, parameter in tuning.named_parameters())
    assert tuning.adapters["a"].rank == 2 and model.layers[0]["up"].capacity("a") == 3
    tuning.save(paths["a"], "a")
    assert torch.equal(alone(base, paths["a"], ids), model(ids))


def test_swap_to_other_layers_and_a_larger_rank(directories):
    base, paths = directories
    ids, model = tokens(), copy.deepcopy(base)
    tuning = load(model, paths["c"], name="x")
    tuning.swap("x", paths["b"])
    assert distance(model(ids), alone(base, paths["b"], ids)) < 1e-6
    assert {row.name for row in tuning.summary().modules} == {
        f"layers.{i}.{n}" for i in range(2) for n in ("up", "down")
    }
    tuning.swap("x", paths["c"])
    assert distance(model(ids), alone(base, paths["c"], ids)) < 1e-6
    assert_same(snapshot(base), {**snapshot(tuning.detach()), "parameters": snapshot(base)["parameters"]})


def test_padding_stays_zero_under_training(directories):
    base, paths = directories
    model = copy.deepcopy(base)
    tuning = attach(model, LoRA(rank=2, target_modules=["up"]), name="a")
    tuning.add("b", LoRA(rank=2, target_modules=["up"], dropout=0.1), trainable=True, capacity=6)
    tuning.activate("b")
    optimizer = tuning.optimizer(1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()(tokens()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = model.layers[0]["up"]
    assert layer.lora_a["b"].shape[0] == 6 and layer.lora_b["b"][:, :2].abs().min() > 0
    assert layer.lora_a["b"][2:].abs().max() == 0 and layer.lora_b["b"][:, 2:].abs().max() == 0


def test_delete_and_detach_leave_the_base_model(directories):
    base, paths = directories
    model = copy.deepcopy(base)
    before = snapshot(model)
    tuning = load(model, paths["a"], name="a")
    tuning.add("b", paths["b"])
    tuning.add("c", LoRA(rank=2, init="orthogonal"), trainable=True)
    tuning.delete("c")
    tuning.delete("b")
    assert list(tuning.adapters) == ["a"] and tuning.active == {"a": 1.0}
    tuning.detach()
    assert_same(before, snapshot(model))


def test_only_active_adapters_are_trained(directories):
    base, paths = directories
    model = copy.deepcopy(base)
    tuning = load(model, paths["a"], trainable=True, name="a")
    tuning.add("b", paths["b"])
    tuning.add("c", paths["c"], trainable=True)
    assert {name.rpartition(".")[2] for name, _ in tuning.named_parameters()} == {"a", "c"}
    tuning.activate(["a", "b"])
    model(tokens()).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith(".a")


def test_a_factor_that_the_user_froze_stays_frozen(directories):
    base, paths = directories
    tuning = load(base, paths["a"], trainable=True, name="a")
    frozen = base.layers[0]["up"].lora_a["a"].requires_grad_(False)
    tuning.add("b", paths["b"])
    tuning.activate(["a", "b"])
    assert not frozen.requires_grad and base.layers[1]["up"].lora_a["a"].requires_grad


def test_a_layer_that_was_replaced_is_named(directories, tmp_path):
    base, paths = directories
    tuning = load(base, paths["a"])
    base.layers[0]["up"] = torch.nn.Linear(16, 24)
    with pytest.raises(RuntimeError, match="layers.0.up was replaced by a plain Linear after its adapter was put in"):
        tuning.save(tmp_path / "out")


def test_a_head_that_was_on_the_meta_device_has_no_base_to_go_back_to():
    with torch.device("meta"):
        model = Block()
    tuning = attach(model, LoRA(rank=2, target_modules=["up"], modules_to_save=["head"]))
    model.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="the base model's head.weight is not known"), tuning.disabled():
        pass
    assert not any(layer.disabled for layer in model.modules() if isinstance(layer, LoRALayer))


def test_a_layer_with_attributes_of_these_names_is_refused():
    model = Block()
    model.head.adapters = "mine"
    with pytest.raises(TypeError, match="head: it has an attribute 'adapters' of its own"):
        attach(model, LoRA(target_modules=["head"]))
    assert model.head.adapters == "mine"


def test_adapters_with_heads_exchange_them():
    base, ids = Block().eval(), tokens()
    method = LoRA(rank=2, target_modules=["up"], modules_to_save=["head"])
    model = copy.deepcopy(base)
    before = snapshot(model)
    tuning = attach(model, method, name="a")
    randomise(tuning)
    of_a = model(ids)
    tuning.add("b", method, trainable=True)
    tuning.activate("b")
    assert torch.equal(model(ids), base(ids))
    with torch.no_grad():
        for name, parameter in tuning.named_parameters():
            if not name.endswith(".a"):
                parameter.add_(torch.randn_like(parameter))
    of_b = model(ids)
    tuning.activate("a")
    assert torch.equal(model(ids), of_a) and not torch.equal(of_a, of_b)
    with tuning.disabled():
        assert torch.equal(model(ids), base(ids))
    tuning.activate("b")
    assert torch.equal(model(ids), of_b)
    with pytest.raises(ValueError, match="'a' and 'b' both have head.weight; one of them can be active"):
        tuning.activate(["a", "b"])
    assert torch.equal(model(ids), of_b)
    tuning.activate(None)
    assert torch.equal(model(ids), base(ids)) and not model.head.weight.requires_grad
    tuning.activate("a")
    tuning.delete("b")
    assert torch.equal(model(ids), of_a) and model.head.weight.requires_grad
    tuning.detach()
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
def test_save_names_the_adapter(names, directories, tmp_path):
    base, paths = directories
    model, ids = copy.deepcopy(base), tokens()
    tuning = load(model, paths["a"], name="a")
    tuning.add("b", paths["b"])
    tuning.activate(names)
    if len(names) > 1:
        with pytest.raises(ValueError, match="save: name which adapter; there are 'a', 'b'"):
            tuning.save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    tuning.save(tmp_path / "out", None if len(names) == 1 else "a")
    assert torch.equal(alone(base, tmp_path / "out", ids), alone(base, paths["a"], ids))


def test_two_adapters_under_dropout_draw_masks_of_their_own():
    model = Block()
    tuning = attach(model, LoRA(rank=2, target_modules=["head"], dropout=0.5), name="a")
    tuning.add("b", LoRA(rank=2, target_modules=["head"], dropout=0.25), trainable=True)
    layer = model.head
    with torch.no_grad():
        for name in "ab":
            layer.lora_a[name].copy_(torch.eye(2, 16))
            layer.lora_b[name].copy_(torch.eye(5, 2) * 10 ** (3 * (name == "b")) * 2 / 8)
    tuning.activate(["a", "b"])
    x = torch.ones(4000, 16)
    kept = layer(x)[:, :2] - torch.nn.functional.linear(x, layer.weight, layer.bias)[:, :2]
    values = kept.round().flatten().long()
    shares = {value: (values == value).float().mean().item() for value in values.unique().tolist()}
    assert set(shares) == {0, 2, 1333, 1335}
    expected = {0: 0.125, 2: 0.125, 1333: 0.375, 1335: 0.375}
    assert all(abs(shares[value] - share) < 0.03 for value, share in expected.items())


def test_the_summary_tells_the_adapters_apart(directories):
    base, paths = directories
    tuning = load(base, paths["a"], name="a")
    tuning.add("b", paths["b"], capacity=9)
    summary = tuning.summary()
    assert [(row.name, row.adapter, row.rank) for row in summary.modules if row.name == "layers.0.up"] == [
        ("layers.0.up", "a", 3),
        ("layers.0.up", "b", 5),
    ]
    assert summary.parameters == 2 * (3 * (16 + 16) + 3 * (16 + 24)) + 2 * (5 * (16 + 24) + 5 * (24 + 16))
    lines = [line.split()[:3] for line in str(summary).splitlines()]
    assert ["layers.*.up", "a", "2"] in lines and ["layers.*.up", "b", "2"] in lines


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_nothing_recompiles(training, directories, tmp_path):
    """Swapping weights, another scale, another active adapter, switching off and on: by dynamo's own counters."""
    torch.compiler.reset()
    base, paths = directories
    model, ids = copy.deepcopy(base).train(training), tokens()
    model.dropout.p = 0.0
    tuning = load(model, paths["a"], name="a", trainable=training)
    tuning.add("b", paths["b"], capacity=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for which in ("b", "a", {"a": 0.25}, ["a", "b"], None, "a"):
            tuning.activate(which)
            assert distance(compiled(ids), model(ids)) < 1e-6
        with tuning.disabled():
            assert distance(compiled(ids), base(ids)) < 1e-6
        tuning.swap("a", paths["c"])
        assert distance(compiled(ids), alone(base, paths["c"], ids)) < 1e-6
        if training:
            compiled(ids).sum().backward()
    assert counters["stats"].get("unique_graphs", 0) == 0 and not counters["graph_break"]


def test_pefts_own_layers_do_recompile(directories):
    """The comparison that the test above stands for."""
    torch.compiler.reset()
    base, paths = directories
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), paths["a"], adapter_name="a").eval()
    theirs.load_adapter(paths["c"], "c")
    compiled, ids = torch.compile(theirs, backend="aot_eager"), tokens()
    compiled(ids)
    counters.clear()
    theirs.set_adapter("c")
    compiled(ids)
    assert counters["stats"]["unique_graphs"] >= 1


def test_a_scale_made_in_inference_mode_can_be_trained_with():
    model, ids = Block(), tokens()
    tuning = attach(model, FIRST)
    with torch.inference_mode(), tuning.disabled():
        model(ids)
    model(ids).sum().backward()


# ---- errors ----------------------------------------------------------------------------------------------------------

BAD = [
    (lambda t, p: t.add("a", FIRST), ValueError, "add: name is 'a', but there is an adapter of that name"),
    (lambda t, p: t.add("x.y", FIRST), ValueError, "name is 'x.y', but it must be made of letters"),
    (lambda t, p: t.add("train", FIRST), ValueError, "name is 'train', which torch.nn uses itself"),
    (lambda t, p: t.add("x", 5), TypeError, "add: source is 5, but it must be a method or a directory"),
    (lambda t, p: t.add("x", p / "nowhere"), FileNotFoundError, "nowhere is not a directory"),
    (lambda t, p: t.add("x", LoRA(target_modules=["zzz"])), ValueError, "chooses no layer"),
    (lambda t, p: t.add("x", FIRST, capacity=2), ValueError, "capacity is 2, but it must be at least the rank, 3"),
    (lambda t, p: t.add("x", LoRA(init="pissa")), ValueError, "init is 'pissa', which changes the base weights"),
    (lambda t, p: t.activate("x"), ValueError, "activate: there is no adapter 'x', only 'a'"),
    (lambda t, p: t.activate({"a": float("nan")}), ValueError, "activate: the weight of 'a' is nan"),
    (lambda t, p: t.activate(5), TypeError, "activate: got 5"),
    (lambda t, p: t.swap("x", p / "b"), ValueError, "swap: there is no adapter 'x'"),
    (lambda t, p: t.delete("x"), ValueError, "delete: there is no adapter 'x'"),
    (lambda t, p: t.delete("a"), ValueError, r"delete: 'a' is the only adapter; detach\(\) takes it out"),
    (lambda t, p: t.save(p / "out", "x"), ValueError, "save: there is no adapter 'x'"),
]


@pytest.mark.parametrize("call, error, match", BAD)
def test_bad_calls_are_named_and_change_nothing(call, error, match, directories, tmp_path):
    base, paths = directories
    tuning = load(base, paths["a"], trainable=True, name="a")
    before, active = snapshot(base), tuning.active
    with pytest.raises(error, match=match):
        call(tuning, tmp_path)
    assert_same(before, snapshot(base))
    assert tuning.active == active and list(tuning.adapters) == ["a"] and not (tmp_path / "out").exists()


def test_while_merged_the_adapters_stay_as_they_are(directories):
    base, paths = directories
    tuning = load(base, paths["a"], name="a")
    tuning.merge()
    calls = [lambda: tuning.add("b", paths["b"]), lambda: tuning.activate(None), lambda: tuning.delete("a")]
    for call in [*calls, lambda: tuning.swap("a", paths["c"])]:
        with pytest.raises(RuntimeError, match=r"not possible while merged; unmerge\(\) first"):
            call()


# ---- an initialisation that changes the base -------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_changed_the_base_is_switched_off_after_a_conversion(init):
    base, ids = llama().eval(), tokens()
    model = copy.deepcopy(base)
    tuning = attach(model, LoRA(rank=4, init=init, target_modules=["q_proj", "v_proj"]))
    model.to(torch.bfloat16)
    with tuning.disabled():
        assert torch.equal(logits(model, ids), logits(base.to(torch.bfloat16), ids))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tuning.detach()
    assert torch.equal(logits(model, ids), logits(base, ids))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_init_that_changes_the_base_is_switched_off_and_taken_out_to_the_last_bit(init, dtype):
    model, ids = llama().to(dtype).eval(), tokens()
    before, expected = snapshot(model), logits(model, ids)
    tuning = attach(model, LoRA(rank=4, alpha=6, init=init, target_modules=["q_proj", "v_proj"]))
    assert distance(logits(model, ids), expected) < (1e-5 if dtype == torch.float32 else 3e-2)
    with tuning.disabled():
        assert torch.equal(logits(model, ids), expected)
    randomise(tuning)
    trained = logits(model, ids)
    with tuning.disabled():
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids), trained)
    tuning.merge()
    with tuning.disabled():
        assert torch.equal(logits(model, ids), expected)
    tuning.unmerge()
    assert torch.equal(logits(model, ids), trained)
    with pytest.raises(ValueError, match=rf"'default' has changed the base weights \(init '{init}'"):
        tuning.add("b", LoRA())
    tuning.detach()
    assert_same(before, snapshot(model))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_an_init_that_changes_the_base_is_refused_where_the_weight_is_shared():
    model = llama(tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="attach: init 'olora': lm_head.weight is tied to model.embed_tokens.weight"):
        attach(model, LoRA(rank=2, init="olora", target_modules=["lm_head"]))
    assert_same(before, snapshot(model))


def test_a_grouped_convolution_is_refused_by_merge_before_anything_changes():
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(4, 4, 3), "grouped": torch.nn.Conv1d(4, 4, 3, groups=2)})
    tuning = attach(model, LoRA(rank=2, target_modules=["conv", "grouped"]))
    randomise(tuning)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="merge: grouped: a convolution with 2 groups"):
        tuning.merge()
    assert_same(before, snapshot(model))
    assert not tuning.merged
