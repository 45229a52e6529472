"""After `accelerate`, everything that PEFT does with its layers goes on working, and as PEFT does it."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peftops.integrations import hf_peft
from peftops.integrations.hf_peft_linear import FusedLinear
from torch import nn
from torch.utils.checkpoint import checkpoint

from .models import (
    assert_close,
    base,
    batch,
    both,
    config,
    fill,
    fused_calls,
    gradients,
    layer_pair,
    logits,
    pair,
    run,
    with_adapter,
    with_the_operators_mask,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def with_two(kind="llama", dtype=torch.float32, **changes):
    """A pair with the adapters "default" and "b", of rank 3 and another scale."""
    models = pair(kind, dtype, **changes)
    for model in models:
        model.add_adapter("b", config(kind, r=3, lora_alpha=2, **changes))
        fill(model, "b", seed=9)
    return models


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_activating_another_adapter():
    oracle, fused = with_two()
    for name in ("b", "default", "b"):
        oracle.set_adapter(name), fused.set_adapter(name)
        with fused_calls() as calls:
            got = gradients(fused, batch("llama"))
        assert len(calls) == 14
        assert_close(got, gradients(oracle, batch("llama")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_active_adapters_take_one_call(dtype):
    oracle, fused = with_two(dtype=dtype)
    for model in (oracle, fused):
        model.base_model.set_adapter(["default", "b"])
    with fused_calls() as calls:
        got = gradients(fused, batch("llama"))
    assert len(calls) == 14 and calls[0][3].dtype == torch.float32
    assert any(".b." in name for name in got) and any(".default." in name for name in got)
    truth, peer = (gradients(model, batch("llama")) for model in (copy.deepcopy(oracle).double(), oracle))
    ours, theirs = (
        max(((values[name].double() - exact).norm() / exact.norm()).item() for name, exact in truth.items())
        for values in (got, peer)
    )
    assert ours <= 2 * theirs, f"{ours:.1e}, PEFT {theirs:.1e}"


def test_several_active_adapters_with_dropout_are_pefts_own_call():
    oracle, fused = with_two(lora_dropout=0.2)
    for model in (oracle, fused):
        model.base_model.set_adapter(["default", "b"])
        model.train()
    torch.manual_seed(1)
    wanted = logits(oracle)
    torch.manual_seed(1)
    with fused_calls() as calls:
        assert torch.equal(logits(fused), wanted)
    assert not calls
    fused.eval(), oracle.eval()
    with fused_calls() as calls:
        assert_close({"y": logits(fused)}, {"y": logits(oracle)})
    assert len(calls) == 14


def test_batches_of_mixed_adapters_are_pefts_own_call():
    oracle, fused = (model.eval() for model in with_two())
    names = ["b", "__base__", "default"]
    wanted = logits(oracle, adapter_names=names)
    assert torch.equal(logits(fused, adapter_names=names), wanted)
    oracle.set_adapter("b")
    assert_close({"row": wanted[:1]}, {"row": logits(oracle)[:1]})


def test_adapters_come_and_go():
    oracle, fused = with_two()
    for model in (oracle, fused):
        model.set_adapter("b")
        model.delete_adapter("default")
    assert_close({"y": logits(fused)}, {"y": logits(oracle)})
    for model in (oracle, fused):
        model.delete_adapter("b") if len(model.peft_config) > 1 else None
        model.add_adapter("c", config(r=5, use_rslora=True))
        model.set_adapter("c")
        fill(model, "c", seed=4)
    assert_close({"y": logits(fused)}, {"y": logits(oracle)})
    assert hf_peft.coverage(fused).fused == 14


def test_an_adapter_with_more_targets_is_swapped_by_a_second_call():
    model = with_adapter("llama", target_modules=["q_proj"])
    assert hf_peft.accelerate(model) == 2
    model.add_adapter("wide", config())
    assert hf_peft.coverage(model).fused == 2
    assert hf_peft.accelerate(model) == 12
    assert hf_peft.coverage(model).fused == 2  # "default" is active, on the first two alone
    model.set_adapter("wide")
    assert hf_peft.coverage(model).fused == 14


@pytest.mark.parametrize("weights", [[0.7, 0.3]])
def test_weighted_adapters(weights):
    models = with_two()
    for model in models:
        model.add_weighted_adapter(["default", "b"], weights, "mixed", combination_type="cat")
        model.set_adapter("mixed")
    wanted, got = both(models, logits)
    assert_close({"y": got}, {"y": wanted})


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_dora": True, "lora_dropout": 0.2}], ids=str)
def test_a_variant_is_pefts_own_call(variant):
    oracle, fused = pair("llama")
    for model in (oracle, fused):
        torch.manual_seed(3)
        model.add_adapter("dora", config(**variant))
        model.set_adapter("dora")
        fill(model, "dora")
    torch.manual_seed(1)
    wanted = gradients(oracle, batch("llama"))
    torch.manual_seed(1)
    with fused_calls() as calls:
        got = gradients(fused, batch("llama"))
    assert not calls
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# ---- scale, disabling, merging ---------------------------------------------------------------------------------------


def test_every_way_to_change_the_scale():
    oracle, fused = layer_pair(use_rslora=True)
    x = torch.randn(5, 24)
    for change in (
        lambda layer: layer.set_scale("default", 0.25),
        lambda layer: layer.scale_layer(3.0),
        lambda layer: layer.unscale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.scaling.__setitem__("default", -1.5),
        lambda layer: layer.scaling.update(default=0.5),
        lambda layer: setattr(layer, "scaling", {"default": 4}),
    ):
        change(oracle), change(fused)
        assert fused.scaling == oracle.scaling
        assert_close(run(fused, x), run(oracle, x), 1e-5)
    models = nn.Sequential(oracle), nn.Sequential(fused)
    for model in models:
        with peft.helpers.rescale_adapter_scale(model, 0.5):
            assert model[0].scaling == {"default": 2.0}
            model.result = run(model[0], x)
    assert_close(models[1].result, models[0].result, 1e-5)
    assert fused.scaling == {"default": 4}


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.5]), torch.tensor(0.5, requires_grad=True)], ids=["shape", "trained"]
)
def test_a_scale_that_the_operator_cannot_take_is_pefts_own_call(scale):
    oracle, fused = layer_pair()
    for layer in (oracle, fused):
        layer.scaling["default"] = scale
    x = torch.randn(5, 24)
    got, wanted = run(fused, x), run(oracle, x)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert fused._obstacle(x, ["default"], False) == "its scaling is not a number"
    fused.set_scale("default", 1), oracle.set_scale("default", 1)
    assert_close(run(fused, x), run(oracle, x), 1e-5)


def test_hot_swapping_writes_into_its_tensors(tmp_path):
    models = pair("llama")
    other = with_adapter("llama", r=3, lora_alpha=2)
    fill(other, seed=5)
    other.save_pretrained(tmp_path)
    for model in models:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        with fused_calls() as calls:
            gradients(model, batch("llama"))
        hotswap_adapter(model, tmp_path, "default")
    assert len(calls) == 14
    assert_close(gradients(models[1], batch("llama")), gradients(models[0], batch("llama")))
    assert_close({"y": logits(models[1])}, {"y": logits(other)})


def test_a_scale_changed_between_forward_and_backward_changes_no_gradient():
    _, layer = layer_pair()
    x = torch.randn(5, 24)
    (wanted,) = torch.autograd.grad(layer(x).sum(), [layer.lora_A["default"].weight])
    y = layer(x)
    with torch.inference_mode():
        layer.set_scale("default", 17)
    (got,) = torch.autograd.grad(y.sum(), [layer.lora_A["default"].weight])
    assert torch.equal(got, wanted)
    layer(x).sum().backward()  # the tensor made in inference mode can be kept for backward


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_disabling_is_exact_and_draws_no_random_number(kind):
    _, model = pair(kind, lora_dropout=0.5)
    wanted = logits(base(kind), kind)
    model.train()
    before = torch.get_rng_state()
    with model.disable_adapter():
        assert torch.equal(logits(model, kind), wanted)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(logits(model, kind), wanted)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_and_unmerging(kind):
    models = pair(kind)
    plain = logits(models[1], kind)
    for model in models:
        model.merge_adapter()
    wanted, got = both(models, lambda model: logits(model, kind))
    assert torch.equal(got, wanted)
    assert_close({"y": got}, {"y": plain}, 1e-5)
    with models[1].disable_adapter(), models[0].disable_adapter():  # PEFT unmerges here
        wanted, got = both(models, lambda model: logits(model, kind))
        assert torch.equal(got, wanted)
    wanted, got = both(models, lambda model: logits(model, kind))
    assert_close({"y": got}, {"y": wanted})
    for model in models:
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()
    assert_close({"y": logits(models[1], kind)}, {"y": logits(models[0], kind)})


def test_merge_and_unload_leaves_no_trace():
    oracle, fused = pair("llama")
    wanted, got = oracle.merge_and_unload(), fused.merge_and_unload()
    assert [type(m) for m in got.modules()] == [type(m) for m in wanted.modules()]
    assert all(torch.equal(got.state_dict()[name], value) for name, value in wanted.state_dict().items())
    _, fused = pair("llama")
    assert torch.equal(logits(fused.unload()), logits(base("llama")))


# ---- files and copies ------------------------------------------------------------------------------------------------


def test_saved_files_are_pefts(tmp_path):
    oracle, fused = pair("bert", modules_to_save=["classifier"])
    oracle.save_pretrained(tmp_path / "theirs"), fused.save_pretrained(tmp_path / "ours")
    ours, theirs = (tmp_path / folder for folder in ("ours", "theirs"))
    assert (ours / "adapter_model.safetensors").read_bytes() == (theirs / "adapter_model.safetensors").read_bytes()
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (ours, theirs)]
    for settings in configs:  # PEFT writes a set in any order
        settings["target_modules"].sort()
    assert configs[0] == configs[1]
    loaded = peft.PeftModel.from_pretrained(base("bert"), tmp_path / "ours")
    assert hf_peft.accelerate(loaded) == hf_peft.coverage(fused).fused
    assert_close({"y": logits(loaded, "bert")}, {"y": logits(oracle.eval(), "bert")})
    fused.load_adapter(tmp_path / "theirs", "again")
    fused.set_adapter("again")
    assert_close({"y": logits(fused.eval(), "bert")}, {"y": logits(oracle, "bert")})


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_fused_and_stand_alone(copied):
    _, model = pair("llama")
    wanted = gradients(model, batch("llama"))
    twin = copied(model)
    for module in twin.modules():
        if isinstance(module, FusedLinear):
            assert module.scaling == {"default": 2.0} and module.scaling.tensors["default"] == 2.0
            module.set_scale("default", 3.0)
    assert hf_peft.coverage(twin).fused == 14
    assert all(torch.equal(value, wanted[name]) for name, value in gradients(model, batch("llama")).items())
    assert not torch.equal(logits(twin), logits(model))
    assert hf_peft.undo(twin) == 14 and hf_peft.coverage(model).fused == 14


def test_torch_save_and_load(tmp_path):
    _, model = pair("llama")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False, map_location="cpu")
    assert torch.equal(logits(loaded), logits(model))


def test_conversions():
    models = pair("llama")
    for dtype in (torch.bfloat16, torch.float64):
        wanted, got = both(models, lambda model, dtype=dtype: logits(model.to(dtype)))
        assert got.dtype == wanted.dtype == dtype
        assert_close({"y": got}, {"y": wanted}, 3e-2 if dtype == torch.bfloat16 else 1e-7)


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_layers_made_on_the_meta_device(assign):
    _, fused = layer_pair()
    empty = copy.deepcopy(fused).to("meta")
    assert hf_peft.undo(nn.Sequential(empty)) == hf_peft.accelerate(nn.Sequential(empty)) == 1
    if not assign:
        empty.to_empty(device="cpu")
        assert empty.scaling.tensors["default"] == 2 and empty.scaling.device.type == "cpu"
    empty.load_state_dict(fused.state_dict(), assign=assign)
    x = torch.randn(3, 24)
    with fused_calls() as calls:
        assert torch.equal(empty(x), fused(x))
    assert len(calls) == 2


def test_factors_cast_under_the_hand():
    """`param.data = ...` tells the layer nothing; each call looks for itself."""
    oracle, fused = layer_pair(dtype=torch.bfloat16)
    x = torch.randn(30, 24, dtype=torch.bfloat16)
    for dtype, calls_wanted in ((torch.float32, 1), (torch.float16, 0), (torch.bfloat16, 1)):
        for layer in (oracle, fused):
            for part in (layer.lora_A, layer.lora_B):
                part["default"].weight.data = part["default"].weight.data.to(dtype)
        with fused_calls() as calls:
            got = run(fused, x)
        assert len(calls) == calls_wanted
        assert_close(got, run(oracle, x), 2e-2)


# ---- engines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_the_mask(reentrant):
    _, model = pair("llama", lora_dropout=0.4)
    model.train().enable_input_require_grads()
    model.config.use_cache = False  # checkpointing switches it off, and attention sums in another order

    def grads():
        torch.manual_seed(8)
        return gradients(model, batch("llama"))

    wanted = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = grads()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_checkpointed_layer():
    oracle, fused = layer_pair(lora_dropout=0.3)
    with_the_operators_mask(nn.Sequential(oracle))
    x = torch.randn(6, 24)
    assert_close(run_checkpointed(fused, x), run(oracle, x), 1e-5)


def run_checkpointed(layer, x):
    plain = layer.forward
    layer.forward = lambda x: checkpoint(plain, x, use_reentrant=False)
    try:
        return run(layer, x)
    finally:
        del layer.forward


def test_hooks_on_the_layer_itself_go_on_working():
    oracle, fused = layer_pair()
    seen = []
    for layer in (oracle, fused):
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        layer.register_forward_hook(lambda module, args, y: seen.append(type(module)) or y + 1)
    x = torch.randn(4, 24)
    with fused_calls() as calls:
        assert_close(run(fused, x), run(oracle, x), 1e-5)
    assert len(calls) == 1 and seen == [FusedLinear, Linear]


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_hooks_on_an_inner_module_make_it_pefts_own_call(part):
    oracle, fused = layer_pair()
    for layer in (oracle, fused):
        layer.get_submodule(part).register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(4, 24)
    with fused_calls() as calls:
        got, wanted = run(fused, x), run(oracle, x)
    assert not calls
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_hooks_on_every_module_see_the_inner_ones():
    _, fused = layer_pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)) and None)
    try:
        fused(torch.randn(4, 24))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3 and FusedLinear in seen


def test_functions_of_torch_func():
    oracle, fused = layer_pair()
    x = torch.randn(4, 24)
    assert torch.equal(torch.vmap(fused)(x), torch.vmap(oracle)(x))
    parameters = {name: p.detach() + 0.5 for name, p in fused.named_parameters()}
    got, wanted = (torch.func.functional_call(layer, parameters, (x,)) for layer in (fused, oracle))
    assert_close({"y": got}, {"y": wanted}, 1e-5)


def test_a_layer_of_an_offloaded_model_is_left_alone():
    model = with_adapter("llama", target_modules=["q_proj"])
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    layers[0].forward = layers[0].forward
    assert hf_peft.accelerate(model) == 1
    assert "its forward was replaced on the instance" in str(hf_peft.coverage(model))
