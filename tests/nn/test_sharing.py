"""Layers that share their input give what they give alone: outputs and random numbers to the bit, whatever happens
between their calls.
"""

import copy
import gc
import io
import pickle
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from peftops.nn import LoRALinear
from peftops.nn.adapter import Adapter
from peftops.nn.sharing import share_inputs, unshare_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from .laws import add, train
from .sharing import assert_same, counted, few_rows_count, groups, nothing_waits, train_step  # noqa: F401

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections that `step` calls."""

    def __init__(self, step=None, p=0.0, dtype=torch.float32, **options):
        super().__init__()
        torch.manual_seed(1)
        for name, width in zip(NAMES, (16, 8, 8), strict=True):
            layer = LoRALinear.from_linear(nn.Linear(12, width, dtype=dtype), rank=3, dropout=p, **options)
            setattr(self, name, train(layer, "default"))
        self.step = step or plain

    def forward(self, x):
        return torch.cat([y.flatten() for y in self.step(self, x)])


def plain(model, x):
    return [model.q_proj(x), model.k_proj(x), model.v_proj(x)]


def tokens(dtype=torch.float32, rows=20):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def compare(model, calls, step=None, x=None, passes=2, tolerance=1e-5):
    """Steps with and without a group; `calls` is what the group computed in each of them."""
    model.step = step or model.step
    x = tokens() if x is None else x
    parameters = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    unshare_inputs(model)
    expected = train_step(lambda: model(x), parameters)
    expected = {name: value.clone() for name, value in expected.items()}
    assert share_inputs(model, LoRALinear) == 1
    for number in range(passes):
        with counted() as found:
            got = train_step(lambda: model(x), parameters)
        assert found == (calls[number] if isinstance(calls[0], list) else calls)
        assert_same(got, expected, tolerance=tolerance)
    assert nothing_waits()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_one_call_for_three_layers(p, dtype):
    compare(Attention(p=p, dtype=dtype), [3], x=tokens(dtype), tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5)
    with torch.no_grad(), counted() as calls:
        model = Attention(p=p, dtype=dtype)
        share_inputs(model, LoRALinear)
        for rows in (20, 1, 0):
            x = tokens(dtype, rows)
            got, state = [], torch.get_rng_state()
            for shared in (True, False):
                torch.set_rng_state(state)
                if not shared:
                    unshare_inputs(model)
                got.append((model(x), torch.rand(1)))
            assert all(map(torch.equal, *got))
            share_inputs(model, LoRALinear)
    assert calls == [3, 3, 3]


def test_the_start_is_the_base_to_the_bit():
    model, x = Attention(), tokens()
    for name in NAMES:
        nn.init.zeros_(model.get_submodule(name).lora_b["default"])
    share_inputs(model, LoRALinear)
    with counted() as calls:
        outputs = plain(model, x)
    for name, y in zip(NAMES, outputs, strict=True):
        layer = model.get_submodule(name)
        assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert calls == [3]


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_any_order_of_calls_draws_the_same_masks(order, p):
    """An order that the family does not have is learned: the first pass then computes in vain once."""
    names = [NAMES[i] for i in order]
    model = Attention(lambda model, x: [model.get_submodule(name)(x) for name in names], p)
    compare(model, [3], passes=4)
    assert not groups(model)[0].dissolved


def test_random_numbers_drawn_between_the_calls_stay_where_they_were():
    def step(model, x):
        q = nn.functional.dropout(model.q_proj(x), 0.5)
        return [q, model.k_proj(x), nn.functional.dropout(model.v_proj(x), 0.5)]

    model = Attention(p=0.4)
    compare(model, [[3], [3], [], []], step, passes=4)  # tried twice, dissolved then
    assert groups(model)[0].dissolved
    compare(Attention(), [3], step, passes=3)  # without masks nothing depends on them


def test_families_and_kinds():
    def linear(width=6):
        return LoRALinear.from_linear(nn.Linear(width, 4), rank=2)

    def grouped(**children):
        model = nn.ModuleDict({"block": nn.ModuleDict(children)})
        share_inputs(model, LoRALinear)
        return [name for name, layer in children.items() if getattr(layer, "sharing", None) is not None]

    assert grouped(gate_proj=linear(), up_proj=linear(), down_proj=linear()) == ["gate_proj", "up_proj"]
    assert grouped(query=linear(), key=nn.Linear(6, 4), value=linear()) == ["query", "value"]
    assert grouped(q=linear(), k=linear(5), v=linear()) == []
    assert grouped(w1=linear(), w2=linear(), w3=linear()) == ["w1", "w3"]
    assert grouped(first=linear(), second=linear()) == []
    tied = linear()
    assert grouped(q=tied, k=tied, v=nn.Linear(6, 4)) == []
    model = nn.ModuleDict({"EncDecAttention": nn.ModuleDict({name: linear() for name in "qkv"})})
    assert share_inputs(model, LoRALinear) == 1
    assert model["EncDecAttention"]["q"].sharing is None and model["EncDecAttention"]["k"].sharing is not None
    assert share_inputs(model, LoRALinear) == 1  # again: the same
    unshare_inputs(model)
    assert not groups(model)


def test_few_rows_without_gradients_are_not_worth_a_group(monkeypatch):
    monkeypatch.undo()
    model = Attention(p=0.3)
    share_inputs(model, LoRALinear)
    with counted() as calls:
        with torch.no_grad():
            model(tokens(rows=64)), model(tokens(rows=65))
        model(tokens(rows=1))
    assert calls == [3, 3]


# ---- what happens between the calls ----------------------------------------------------------------------------------


def _then(act):
    """Calls of q, `act`, then k and v."""

    def step(model, x):
        q = model.q_proj(x)
        x = act(model, x)
        return [q, model.k_proj(x), model.v_proj(x)]

    return step


def _weights(name):
    def act(model, x):
        with torch.no_grad():
            parameter = getattr(model.k_proj, name)
            (parameter if name == "weight" else parameter["default"]).mul_(2)
        return x

    return act


def _new_weight(model, x):
    model.k_proj.weight = nn.Parameter(2 * model.k_proj.weight.detach(), requires_grad=False)
    return x


BETWEEN = {
    "another tensor": lambda model, x: 2 * x,
    "an equal tensor": lambda model, x: x.clone(),
    "a view of the tensor": lambda model, x: x.view(x.shape),
    "written in place": lambda model, x: _written(x),
    "a factor changes": _weights("lora_a"),
    "the other factor changes": _weights("lora_b"),
    "a weight changes": _weights("weight"),
    "a weight is another": _new_weight,
    "its storage is another": lambda model, x: setattr(model.k_proj.weight, "data", 2 * model.k_proj.weight.data) or x,
    "its scale changes": lambda model, x: model.k_proj.set_active({"default": 3.0}) or x,
    "it is switched off": lambda model, x: model.k_proj.set_disabled(True) or x,
    "it is merged": lambda model, x: model.k_proj.merge() and x or x,
    "eval": lambda model, x: model.eval() and x,
    "a second adapter": lambda model, x: model.k_proj.set_active({"default": 1.0, "b": 1.0}) or x,
    "frozen": lambda model, x: model.k_proj.lora_a["default"].requires_grad_(False) is None or x,
}


def _written(x):
    with torch.no_grad():
        return x.mul_(2)


@pytest.mark.parametrize("what", BETWEEN)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_output_is_used_only_for_what_it_was_computed_for(what, p):
    results = []
    for shared in (False, True):
        model, x = Attention(_then(BETWEEN[what]), p), tokens()
        torch.manual_seed(4)
        for name in NAMES:
            add(model.get_submodule(name), "b")
        if shared:
            share_inputs(model, LoRALinear)
        with counted() as calls, torch.no_grad() if what == "written in place" else nullcontext():
            results.append((model(x), torch.rand(1), [y.requires_grad for y in plain(model, x)]))
    assert calls[0] == 3
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "saved tensors": lambda: torch.autograd.graph.save_on_cpu(),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_an_output_is_used_only_under_what_it_was_computed_under(what):
    def step(model, x):
        q = model.q_proj(x)
        with SURROUNDINGS[what]():
            k = model.k_proj(x)
        return [q, k, model.v_proj(x)]

    for shared in (False, True):
        model = Attention(step, p=0.4)
        if shared:
            share_inputs(model, LoRALinear)
        torch.manual_seed(6)
        got = model.step(model, tokens())
        if not shared:
            expected = got
    assert all(map(torch.equal, got, expected))
    assert [(y.dtype, y.requires_grad, y.is_inference()) for y in got] == [
        (y.dtype, y.requires_grad, y.is_inference()) for y in expected
    ]


def test_autocast_around_all_is_shared():
    def step(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(model, x)

    compare(Attention(p=0.3), [3], step, tolerance=2e-2)


# ---- off -------------------------------------------------------------------------------------------------------------


def off(model, x, call=None):
    """What `call` gives without a group, and with one, which computes nothing."""
    call = call or (lambda: torch.cat([y.flatten() for y in model.step(model, x)]))
    unshare_inputs(model)
    torch.manual_seed(3)
    expected = call()
    share_inputs(model, LoRALinear)
    torch.manual_seed(3)
    with counted() as calls:
        got = call()
    assert torch.equal(got, expected) and not calls and nothing_waits()
    assert not any(group.dissolved for group in groups(model))


HOOKS = {
    "forward": lambda layer: layer.register_forward_hook(lambda module, args, y: 2 * y),
    "forward pre": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "full backward": lambda layer: layer.register_full_backward_hook(lambda module, given, taken: None),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(lambda module, grad: None),
    "own forward": lambda layer: setattr(layer, "forward", type(layer).forward.__get__(layer)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_with_hooks_is_called_itself(kind, name):
    """The two others are still one call, but where the layer between them draws a mask of its own."""
    for p in (0.0, 0.3):
        model = Attention(p=p)
        HOOKS[kind](model.get_submodule(name))
        compare(model, [2] if p == 0 or name != "k_proj" else [[2], [2], [], []], passes=4)


def test_hooks_on_every_module():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    try:
        off(Attention(p=0.3), tokens())
    finally:
        handle.remove()


def test_saved_tensor_hooks_dispatch_modes_and_inference_mode():
    model, x = Attention(p=0.3), tokens()
    for around in (torch.autograd.graph.save_on_cpu(), FlopCounterMode(display=False)):
        with around:
            off(model, x)
    with torch.inference_mode():
        off(model, torch.randn(5, 12))
    with torch.inference_mode():
        weight = torch.randn(8, 12)
    model.k_proj.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad(), counted() as calls:
        model(x)
    assert calls == [2]


def test_functorch_and_forward_traces():
    model, x = Attention().eval(), tokens().detach()
    off(model, x, lambda: torch.func.vmap(lambda row: model(row))(x.view(4, 5, 12)))
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert torch.allclose(traced(2 * x), model(2 * x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layers_are_their_own():
    model, x = Attention(p=0.3), tokens()
    share_inputs(model, LoRALinear)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with counted() as calls:
        compiled(x).sum().backward()
    assert not calls and nothing_waits()
    with counted() as calls:
        model(x)
    assert calls == [3]


def test_layers_that_differ_in_what_one_call_takes_are_left_out():
    model = Attention(p=0.3)
    model.k_proj.adapters["default"] = Adapter(rank=3, alpha=3, dropout=0.1)
    compare(model, [[2], [2], [], []], passes=4)
    model = Attention()
    model.v_proj.lora_a.double(), model.v_proj.lora_b.double()
    share_inputs(model, LoRALinear)
    with pytest.raises(RuntimeError, match="lora_linear: lora_a has dtype float64"):
        model(tokens())
    model = Attention()
    model.v_proj.lora_a["default"].requires_grad_(False), model.v_proj.lora_b["default"].requires_grad_(False)
    compare(model, [3])
    compare(model, [2], x=tokens().detach())  # the output of v has no gradient there
    share_inputs(model, LoRALinear)
    assert not model.v_proj(tokens().detach()).requires_grad
    model = Attention(lora_bias=True)
    off(model, tokens())


def test_one_call_of_the_layer_itself_names_its_errors():
    model = Attention()
    share_inputs(model, LoRALinear)
    with pytest.raises(RuntimeError, match="lora_linear: "):
        model(torch.randn(3, 11))
    with pytest.raises(RuntimeError, match="lora_linear: "):
        model(torch.randn(3, 12).double())
    assert nothing_waits()


def test_outputs_that_nobody_asks_for_dissolve_the_group():
    def step(model, x):
        return [model.q_proj(x), model.k_proj(2 * x), model.v_proj(3 * x)]

    model = Attention(p=0.2)
    compare(model, [[3], [], []], step, passes=3)
    assert groups(model)[0].dissolved

    model = Attention(lambda model, x: [model.q_proj(x)])
    share_inputs(model, LoRALinear)
    with counted() as calls:
        for _ in range(3):
            model(tokens())
    assert calls == [3] and groups(model)[0].dissolved and nothing_waits()


def test_another_groups_outputs_take_the_place_of_those_that_wait():
    first, second, x = Attention(lambda model, x: [model.q_proj(x)]), Attention(), tokens()
    both = nn.ModuleList([first, second])
    assert share_inputs(both, LoRALinear) == 2
    first(x)
    assert not nothing_waits()
    second(x)
    assert nothing_waits() and [group.dissolved for group in groups(both)] == [True, False]


# ---- memory, copies, threads -----------------------------------------------------------------------------------------


def test_nothing_is_kept_after_the_last_call():
    model, x = Attention(p=0.2), tokens()
    share_inputs(model, LoRALinear)
    outputs = [weakref.ref(y) for y in plain(model, x)]
    gc.collect()
    assert nothing_waits() and all(output() is None for output in outputs)
    assert sorted(model.state_dict()) == sorted(Attention().state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    """Reentrant: shared in both passes. Else each layer by itself in both, for it counts what they save."""
    model, x = Attention(p=0.4), tokens()
    parameters = {"x": x, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    expected = train_step(lambda: model(x), parameters)
    expected = {name: value.clone() for name, value in expected.items()}
    share_inputs(model, LoRALinear)
    for _ in range(2):
        with counted() as calls:
            got = train_step(lambda: checkpoint(model, x, use_reentrant=reentrant), parameters)
        assert calls == ([3, 3] if reentrant else [])
        assert_same(got, expected, exact=("y", "next number") if reentrant else expected)


def test_several_backward_passes_through_one_node():
    model, x = Attention(), tokens()
    share_inputs(model, LoRALinear)
    q, k, v = plain(model, x)
    first = torch.autograd.grad(k.sum(), model.k_proj.lora_b["default"], retain_graph=True)[0]
    (q.sum() + k.sum()).backward()
    assert torch.equal(model.k_proj.lora_b["default"].grad, first)
    assert model.v_proj.lora_b["default"].grad is None or not model.v_proj.lora_b["default"].grad.any()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _loaded(model),
}


def _loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_copies_share_among_themselves_and_take_nothing_along(way):
    model, x = Attention(p=0.3), tokens()
    share_inputs(model, LoRALinear)
    model.q_proj(x)  # two outputs wait
    other = COPIES[way](model)
    assert groups(other)[0] is not groups(model)[0]
    torch.manual_seed(3)
    model.k_proj(x), model.v_proj(x)
    results = []
    for each in (other, model):
        torch.manual_seed(3)
        with counted() as calls:
            results.append(each(x))
        assert calls == [3] and nothing_waits()
    assert torch.equal(*results)


def test_a_copied_layer_is_alone():
    model, x = Attention(), tokens()
    share_inputs(model, LoRALinear)
    for other in (copy.deepcopy(model.k_proj), copy.copy(model.k_proj), pickle.loads(pickle.dumps(model.k_proj))):
        with counted() as calls:
            y = other(x)
        assert not calls and torch.equal(y, model.k_proj(x))
        _ = model.q_proj(x), model.v_proj(x)
    with counted() as calls:
        model(x)
    assert calls == [3]


def test_replicas_of_data_parallel_are_no_members():
    model, x = Attention(), tokens()
    share_inputs(model, LoRALinear)
    replica = model.q_proj._replicate_for_data_parallel()
    replica.lora_a, replica.lora_b, replica.lora_scale = (
        model.q_proj.lora_a,
        model.q_proj.lora_b,
        model.q_proj.lora_scale,
    )
    replica._parameters = model.q_proj._parameters
    with counted() as calls:
        assert torch.equal(replica(x), model.q_proj(x))
    assert calls == [3]  # the model's own


def test_threads_do_not_mix():
    model, inputs = Attention(), [tokens(rows=rows).detach() for rows in range(1, 5)]
    expected = [model(x) for x in inputs]
    share_inputs(model, LoRALinear)
    wrong, barrier = [], threading.Barrier(len(inputs))

    def work(x, y):
        for _ in range(20):
            barrier.wait()
            q = model.q_proj(x)
            barrier.wait()
            got = torch.cat([each.flatten() for each in (q, model.k_proj(x), model.v_proj(x))])
            if not torch.equal(got, y):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not groups(model)[0].dissolved


def test_a_removed_layer_leaves_the_group():
    model, x = Attention(), tokens()
    share_inputs(model, LoRALinear)
    model.k_proj.remove_()
    assert "sharing" not in vars(model.k_proj)
    with counted() as calls:
        model(x)
    assert calls == [2]
