"""`MultiLoRA`: each row of a batch is what its adapter alone gives, and nothing else changes."""

import copy
from functools import partial

import peft
import peftops
import pytest
import torch
from peftops.methods import LoRA, MultiLoRA, attach, load
from peftops.nn.grouped import GroupedLike
from torch import nn

from .adapters import edit
from .models import FAMILIES, Block, Net, distance, inputs, outputs, randomise

# Rank, scale and targets differ, as adapters of different origin do.
LINEAR = {"a": LoRA(rank=4, alpha=6), "b": LoRA(rank=9, alpha=3, use_rslora=True, init="gaussian")}
SOME = {"llama": ["q_proj", "up_proj"], "qwen2": ["v_proj"], "gpt2": ["c_attn"], "bert": ["query", "output.dense"]}
SOME |= {"roberta": ["value"], "opt": ["fc1", "k_proj"], "t5": ["k", "wo"], "bart": ["v_proj", "fc2"], "vit": ["value"]}
CHOSEN = ["a", None, "b"]
IDS = torch.arange(27).view(3, 9) * 7 % 11


def seeded(make):
    """`make` with the same weights every time."""

    def made():
        torch.manual_seed(1)
        return make()

    return made


def saved(folder, make, methods):
    """name -> directory of an adapter with values as after training."""
    for number, (name, method) in enumerate(methods.items()):
        tuning = attach(make(), method)
        torch.manual_seed(10 + number)
        randomise(tuning)
        tuning.save(folder / name)
    return {name: folder / name for name in methods}


def alone(make, directory, call):
    """What `call` gives for the model with this adapter only, or for the base model."""
    model = make()
    if directory is not None:
        load(model, directory)
    return call(model.eval())


@pytest.fixture
def llamas(tmp_path):
    """(how to make the model, adapters "a" and "b" for it)."""
    make = seeded(lambda: FAMILIES["llama"]().eval())
    return make, saved(tmp_path, make, {"a": LINEAR["a"], "b": LoRA(rank=9, alpha=3, target_modules=SOME["llama"])})


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
def test_each_row_is_what_its_adapter_alone_gives(tmp_path, kind):
    make = seeded(lambda: FAMILIES[kind]().eval())
    methods = {"a": LINEAR["a"], "b": LoRA(rank=9, alpha=3, use_rslora=True, target_modules=SOME[kind])}
    where = saved(tmp_path, make, methods)
    arguments = inputs(make())
    expected = {name: alone(make, where.get(name), lambda m: outputs(m, arguments)) for name in ("a", "b", None)}
    multi = MultiLoRA(make(), where)

    def call(adapters):
        return outputs(partial(multi, adapters=adapters), arguments)

    got = call(CHOSEN)
    for row, name in enumerate(CHOSEN):
        assert distance(got[row], expected[name][row]) < 1e-5
        assert name is None or distance(got[row], expected[None][row]) > 1e-3
    for name in expected:
        assert distance(call(name), expected[name]) < 1e-5


def test_a_whole_batch_with_one_adapter_has_its_bits(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    with torch.no_grad():
        for name in ("a", "b", None):
            expected = alone(make, where.get(name), lambda m: m(IDS).logits)
            assert torch.equal(multi(IDS, adapters=name).logits, expected)
            assert torch.equal(multi(IDS, adapters=[name] * 3).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("gradients", [False, True])
def test_rows_of_a_mixed_batch_have_the_bits_of_their_adapters(tmp_path, kind, gradients):
    """Where the plan is the same: as many rows, and more than the few-row kernels take."""
    make = seeded(lambda: FAMILIES[kind]().eval())
    where = saved(tmp_path, make, LINEAR)
    with torch.set_grad_enabled(gradients):
        got = MultiLoRA(make(), where)(IDS, adapters=CHOSEN).logits
        for row, name in enumerate(CHOSEN):
            assert torch.equal(got[row], alone(make, where.get(name), lambda m: m(IDS).logits)[row])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pefts_mixed_batch(tmp_path, kind):
    make, where = seeded(lambda: FAMILIES[kind]().eval()), {}
    for number, (name, r, targets) in enumerate([("a", 4, SOME[kind]), ("b", 7, "all-linear")]):
        config = peft.LoraConfig(r=r, lora_alpha=5, target_modules=targets, fan_in_fan_out=kind == "gpt2")
        theirs = peft.get_peft_model(make(), config)
        torch.manual_seed(20 + number)
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.2)
        theirs.save_pretrained(tmp_path / name)
        where[name] = tmp_path / name
    theirs = peft.PeftModel.from_pretrained(make(), where["a"], adapter_name="a")
    theirs.load_adapter(where["b"], adapter_name="b")
    names = ["b", "__base__", "a"]
    with torch.no_grad():
        expected = theirs.eval()(input_ids=IDS, adapter_names=names).logits
        got = MultiLoRA(make(), where)(IDS, adapters=["b", None, "a"]).logits
    assert distance(got, expected) < 1e-5


def test_gradients_are_those_of_each_adapter_alone(llamas):
    """Of the inputs and of the stacked factors, in training mode, where no dropout is drawn."""
    make, where = llamas
    embedded = torch.randn(3, 7, 16)

    def gradient(call, model):
        x = embedded.clone().requires_grad_()
        call(inputs_embeds=x).logits.square().sum().backward()
        return x.grad

    multi = MultiLoRA(make(), where)
    for layer in multi.model.modules():
        if isinstance(layer, GroupedLike):
            layer.lora_a.requires_grad_(), layer.lora_b.requires_grad_()
    got = gradient(lambda **given: multi.model.train() and multi(**given, adapters=CHOSEN), multi.model)
    for row, name in enumerate(CHOSEN):
        model = make()
        tuning = load(model, where[name], trainable=True) if name else None
        assert distance(got[row], gradient(model, model)[row]) < 1e-5
        if tuning is None:
            continue
        model.zero_grad()
        model(inputs_embeds=embedded[row : row + 1]).logits.square().sum().backward()
        path = "model.layers.0.self_attn.q_proj"
        stacked, own = multi.model.get_submodule(path), model.get_submodule(path)
        place, rank = multi.adapters[name], own.adapters["default"].rank
        assert distance(stacked.lora_a.grad[place, :rank], own.lora_a["default"].grad) < 1e-5
        assert distance(stacked.lora_b.grad[place, :, :rank], own.lora_b["default"].grad) < 1e-5


def test_backward_may_come_after_another_batch_was_chosen(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)

    def backward(x, names, between=()):
        x = x.clone().requires_grad_()
        loss = multi(inputs_embeds=x, adapters=names).logits.square().sum()
        for other in between:
            with torch.no_grad():
                multi(IDS, adapters=other)
            multi(IDS, adapters=other)
        loss.backward()
        return x.grad

    x = torch.randn(3, 7, 16)
    assert torch.equal(backward(x, CHOSEN, (["b", "b", "a"], None)), backward(x, CHOSEN))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_factors_over_a_16_bit_base_stay_float32(tmp_path, dtype):
    make = seeded(lambda: FAMILIES["llama"]().to(dtype).eval())
    methods = {"a": LoRA(rank=4, adapter_dtype=torch.float32), "b": LoRA(rank=2, target_modules=["q_proj", "o_proj"])}
    where = saved(tmp_path, make, methods)
    multi = MultiLoRA(make(), where)
    layers = dict(multi.model.named_modules())
    assert layers["model.layers.0.self_attn.q_proj"].lora_a.dtype == torch.float32
    expected = [alone(make, where.get(name), lambda m: m(IDS).logits)[row] for row, name in enumerate(CHOSEN)]
    for _ in range(2):
        got = multi(IDS, adapters=CHOSEN).logits
        assert distance(got, torch.stack(expected)) < 2 * torch.finfo(dtype).eps ** 0.75
        multi.model.to(dtype)
    assert layers["model.layers.0.self_attn.q_proj"].lora_a.dtype == torch.float32
    multi.model.float()
    assert layers["model.layers.1.self_attn.q_proj"].lora_scales.dtype == torch.float32
    assert multi(IDS, adapters=CHOSEN).logits.dtype == torch.float32


def test_an_adapter_that_started_with_pissa_is_served(tmp_path):
    make = seeded(lambda: FAMILIES["llama"]().eval())
    where = saved(tmp_path, make, {"a": LoRA(rank=2, init="pissa", target_modules=["v_proj"]), "b": LINEAR["b"]})
    got = MultiLoRA(make(), where)(IDS, adapters=CHOSEN).logits
    for row, name in enumerate(CHOSEN):
        assert distance(got[row], alone(make, where.get(name), lambda m: m(IDS).logits)[row]) < 1e-5


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_generate_is_that_of_each_adapter_alone(tmp_path, kind, how):
    make = seeded(lambda: FAMILIES[kind]().eval())
    where = saved(tmp_path, make, LINEAR)
    how = {**how, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if kind in ("t5", "bart"):
        how["decoder_start_token_id"] = 1
    prompts = IDS
    got = MultiLoRA(make(), where).generate(prompts, adapters=CHOSEN, **how)
    count = how.get("num_return_sequences", 1)
    for row, name in enumerate(CHOSEN):
        expected = alone(make, where.get(name), lambda m, row=row: m.generate(prompts[row : row + 1], **how))
        assert torch.equal(got[row * count : (row + 1) * count], expected)


def test_sampled_sequences_of_a_row_share_its_adapter(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    multi.model.generation_config.num_return_sequences = 2
    how = {"max_new_tokens": 3, "do_sample": True, "pad_token_id": 0}
    assert multi.generate(IDS, adapters=CHOSEN, **how).shape[0] == 6
    with pytest.raises(ValueError, match="names 6 rows, but the batch has 3"):
        multi.generate(IDS, adapters=CHOSEN * 2, **how)


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_ids_are_names(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    assert multi.adapters == {"a": 0, "b": 1}
    expected = multi(IDS, adapters=CHOSEN).logits
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(multi(IDS, adapters=torch.tensor([0, -1, 1], dtype=dtype)).logits, expected)
    multi.select(CHOSEN)
    assert torch.equal(multi.model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("adapters", "error", "match"),
    [
        (["a", "c", None], ValueError, "call: there is no adapter 'c', only 'a', 'b'"),
        ("c", ValueError, "there is no adapter 'c'"),
        (["a"] * 2, ValueError, "adapters names 2 rows, but the batch has 3"),
        ([], ValueError, "adapters names 0 rows, but the batch has 3"),
        (["a", 1, None], TypeError, "it must be a name or None, one of them for each row, or a tensor of ids"),
        (3, TypeError, "adapters is 3, but it must be a name"),
        (torch.tensor([0, 1]), ValueError, "adapters has 2 ids, but the batch has 3 rows"),
        (torch.tensor([0, 1, 2]), ValueError, "adapters has the id 2"),
        (torch.tensor([0, 1, -2]), ValueError, "adapters has the id -2"),
        (torch.tensor([0.0, 1, 1]), TypeError, r"a torch.float32 tensor of shape \[3\]"),
        (torch.zeros(3, 1, dtype=torch.int64), TypeError, r"shape \[3, 1\], but ids must be int32 or int64"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_runs(llamas, adapters, error, match):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    ran = []
    multi.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=match):
        multi(IDS, adapters=adapters)
    assert not ran
    expected = multi(IDS, adapters=CHOSEN).logits
    with pytest.raises(error):
        multi(IDS, adapters=adapters)
    assert torch.equal(multi.model(IDS).logits, expected)  # the choice before stands


def test_activations_without_the_batch_in_front_are_refused(tmp_path):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 5)

        def forward(self, x):
            return self.up(x.transpose(0, 1))

    where = saved(tmp_path, seeded(SequenceFirst), {"a": LINEAR["a"], "b": LINEAR["b"]})
    multi, x = MultiLoRA(seeded(SequenceFirst)(), where), torch.randn(3, 4, 6)
    with pytest.raises(ValueError, match=r"x is \[4, 3\] tokens, but adapters were chosen for 3 rows"):
        multi(x, adapters=CHOSEN)
    assert multi(x, adapters="a").shape == (4, 3, 5)


# ---- adapters come and go --------------------------------------------------------------------------------------------


def test_add_and_remove(tmp_path, llamas):
    make, where = llamas
    more = saved(tmp_path, make, {"c": LoRA(rank=12, target_modules=["down_proj", "k_proj"])})
    multi = MultiLoRA(make(), {"a": where["a"]})
    for name, directory in {"b": where["b"], **more}.items():
        multi.add(name, directory)
    expected = {name: alone(make, {**where, **more}.get(name), lambda m: m(IDS).logits) for name in (*"abc", None)}

    def check(names):
        got = multi(IDS, adapters=names).logits
        for row, name in enumerate(names):
            assert distance(got[row], expected[name][row]) < 1e-5

    check(["c", "a", "b"])
    multi.remove("a")
    check(["c", None, "b"])
    with pytest.raises(ValueError, match="there is no adapter 'a', only 'b', 'c'"):
        multi(IDS, adapters="a")
    with pytest.raises(ValueError, match="adapters has the id 0"):
        multi(IDS, adapters=torch.tensor([0, 1, 2]))
    multi.add("again", where["a"])
    assert multi.adapters == {"b": 1, "c": 2, "again": 0}  # the place was free
    expected["again"] = expected["a"]
    check(["again", "b", "c"])
    with pytest.raises(ValueError, match="add: name is 'b', but there is an adapter of that name"):
        multi.add("b", where["b"])


def test_an_adapter_that_fails_on_the_way_leaves_nothing(llamas, monkeypatch):
    make, where = llamas
    done, real = [], GroupedLike.put_

    def fails(layer, *args):
        done.append(layer)
        if len(done) % 5 == 0:
            raise MemoryError("no memory")
        real(layer, *args)

    model = make()
    kinds, expected = [type(m) for m in model.modules()], model(IDS).logits
    monkeypatch.setattr(GroupedLike, "put_", fails)
    with pytest.raises(MemoryError):
        MultiLoRA(model, where)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(model(IDS).logits, expected)
    monkeypatch.setattr(GroupedLike, "put_", real)
    multi = MultiLoRA(model, {"b": where["b"]})
    expected = multi(IDS, adapters=["b", None, "b"]).logits
    monkeypatch.setattr(GroupedLike, "put_", fails)
    with pytest.raises(MemoryError):
        multi.add("a", where["a"])
    changed = {path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, GroupedLike)}
    assert multi.adapters == {"b": 0} and changed == set(SOME["llama"])
    assert torch.equal(multi(IDS, adapters=["b", None, "b"]).logits, expected)


def test_layers_without_an_adapter_are_plain(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    multi.remove("a")
    changed = {path.rpartition(".")[2] for path, m in multi.model.named_modules() if isinstance(m, GroupedLike)}
    assert changed == set(SOME["llama"])
    multi.remove("b")
    assert all(type(m) is not GroupedLike and not isinstance(m, GroupedLike) for m in multi.model.modules())
    assert torch.equal(multi(IDS, adapters=[None] * 3).logits, make()(IDS).logits)
    multi.add("b", where["b"])
    assert distance(multi(IDS, adapters="b").logits, make()(IDS).logits) > 1e-3


def test_detach_gives_the_model_back(llamas):
    make, where = llamas
    model = make()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    multi = MultiLoRA(model, where)
    assert multi.detach() is model
    assert [type(m) for m in model.modules()] == kinds and [set(vars(m)) for m in model.modules()] == attributes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="call: the adapters were taken out by detach"):
        multi(IDS, adapters="a")
    MultiLoRA(model, where)


def test_copies_are_apart(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    expected = multi(IDS, adapters=CHOSEN).logits
    other = copy.deepcopy(multi)
    assert torch.equal(other(IDS, adapters=["b", "b", "a"]).logits, multi(IDS, adapters=["b", "b", "a"]).logits)
    multi(IDS, adapters=CHOSEN)
    other.remove("a")
    assert torch.equal(multi(IDS, adapters=CHOSEN).logits, expected)


# ---- refused ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "modules_to_save": (LoRA(rank=2, target_modules=["up"], modules_to_save=["head"]), r"modules of its own \(head"),
    "bias": (LoRA(rank=2, target_modules=["up"], bias="lora_only"), r"trained biases \(bias='lora_only'\)"),
    "lora_bias": (LoRA(rank=2, target_modules=["up"], lora_bias=True), "its factors have a bias"),
    "embedding": (LoRA(rank=2, target_modules=["embed"]), "it adapts embed, a Embedding; only linear layers"),
    "convolution": (LoRA(rank=2, target_modules=["conv"]), "it adapts conv, a Conv1d; only linear layers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(tmp_path, what):
    (method, match), make = REFUSED[what], seeded(Net)
    where = saved(tmp_path, make, {"good": LoRA(rank=2, target_modules=["up"]), "bad": method})
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"MultiLoRA: .*bad: .*{match}"):
        MultiLoRA(model, where)
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    multi = MultiLoRA(model, {"good": where["good"]})
    with pytest.raises(ValueError, match=rf"add: .*bad: .*{match}"):
        multi.add("bad", where["bad"])
    assert multi.adapters == {"good": 0} and multi(torch.zeros(2, 3).long(), adapters="good").shape == (2, 3, 4)
    multi.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dora_and_experts_are_refused(tmp_path):
    where = saved(tmp_path, Block, {"a": LoRA(rank=2, target_modules=["up"])})
    edit(where["a"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora is True, which is not supported"):
        MultiLoRA(Block(), where)

    def experts():
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})

    where = saved(tmp_path, experts, {"a": LoRA(rank=2)})
    with pytest.raises(ValueError, match="experts.0, an expert, which sees tokens out of their rows"):
        MultiLoRA(experts(), where)


def test_a_model_that_carries_adapters_is_refused(llamas):
    make, where = llamas
    multi = MultiLoRA(make(), where)
    for again in (lambda m: MultiLoRA(m, where), lambda m: attach(m, LINEAR["a"])):
        with pytest.raises(RuntimeError, match="the model serves the adapters of a MultiLoRA"):
            again(multi.model)
    tuned = make()
    load(tuned, where["a"])
    with pytest.raises(RuntimeError, match="MultiLoRA: the model carries an adapter already"):
        MultiLoRA(tuned, where)
    for adapters in ({}, ["a"], None):
        with pytest.raises(TypeError, match="it must be a dictionary of names and directories"):
            MultiLoRA(make(), adapters)
    assert peftops.MultiLoRA is MultiLoRA


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
def test_other_adapters_recompile_nothing(llamas, gradients):
    torch.compiler.reset()
    make, where = llamas
    multi = MultiLoRA(make(), where)
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    plain = copy.deepcopy(multi)
    multi.model.compile(backend=counting)
    x = torch.randn(3, 7, 16, requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        for names in (CHOSEN, ["b", "b", "a"], [None] * 3, torch.tensor([1, 0, -1])):
            results = [each(inputs_embeds=x, adapters=names).logits for each in (multi, plain)]
            assert distance(*results) < 1e-5
            if gradients:
                assert distance(*(torch.autograd.grad(r.square().sum(), x)[0] for r in results)) < 1e-5
        assert len(graphs) == 1
        for length in (9, 8, 6):  # other numbers of rows and tokens: once more, with sizes that are not fixed
            multi(inputs_embeds=torch.randn(2, length, 16, requires_grad=gradients), adapters=["a", "b"])
    assert len(graphs) == 2
