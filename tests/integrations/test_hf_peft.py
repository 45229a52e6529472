"""`accelerate`: the fused layers compute and train what PEFT's do, keep less, and name what they leave alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear
from peftops.integrations import hf_peft
from torch import nn
from transformers import Trainer, TrainingArguments

from .models import (
    assert_close,
    base,
    batch,
    config,
    fill,
    fused_calls,
    gradients,
    layer_pair,
    pair,
    run,
    with_adapter,
    with_the_operators_mask,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("llama", "gpt2", "bert")


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_pefts(kind):
    oracle, fused = pair(kind)
    inputs = batch(kind)
    with fused_calls() as calls:
        got = gradients(fused, inputs)
    assert len(calls) == hf_peft.coverage(fused).fused
    assert_close(got, gradients(oracle, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_five_steps_of_adamw_go_where_pefts_go(kind, p):
    oracle, fused = pair(kind, lora_dropout=p)
    with_the_operators_mask(oracle)
    results = []
    for model in (oracle, fused):
        torch.manual_seed(5)
        model.train()
        optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(**batch(kind)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append({"losses": torch.stack(losses)} | {n: q for n, q in model.named_parameters() if q.requires_grad})
    assert results[0]["losses"][0] > results[0]["losses"][-1]
    assert_close(results[1], results[0], 2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_dropout": 0.25},
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all", "lora_bias": True, "lora_dropout": 0.5},
        {"rank_pattern": {"0": 40}, "alpha_pattern": {"0": 3}},
    ],
    ids=str,
)
def test_a_layer_in_float64_follows_peft(changes):
    oracle, fused = layer_pair(dtype=torch.float64, **changes)
    for parameter in (*oracle.parameters(), *fused.parameters()):
        parameter.data = parameter.data.double()
    with_the_operators_mask(nn.Sequential(oracle))
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with fused_calls() as calls:
        got = run(fused, x)
    assert len(calls) == 1
    assert_close(got, run(oracle, x), 1e-6)  # the scale is a float32 number


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapters_bias_needs_no_base_bias(bias):
    with pytest.warns(UserWarning) if not bias else nullcontext():
        oracle, fused = layer_pair(bias=bias, lora_bias=True)
    x = torch.randn(3, 24)
    assert_close(run(fused, x), run(oracle, x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factors", ["float32", "base"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_16_bit_bases_are_as_near_to_the_truth_as_peft_is(dtype, factors, autocast):
    oracle, fused = layer_pair(96, 80, dtype=dtype)
    if factors == "float32":
        peft.tuners.tuners_utils.cast_adapter_dtype(nn.Sequential(oracle), "default")
        peft.tuners.tuners_utils.cast_adapter_dtype(nn.Sequential(fused), "default")
    wanted_dtype = torch.float32 if factors == "float32" else dtype
    assert oracle.lora_A["default"].weight.dtype == fused.lora_A["default"].weight.dtype == wanted_dtype
    x = torch.randn(50, 96).to(dtype)
    truth = run(copy.deepcopy(oracle).double(), x.double())
    with torch.autocast("cpu", dtype, enabled=autocast), fused_calls() as calls:
        got, peer = run(fused, x), run(oracle, x)
    assert len(calls) == 1
    for name, exact in truth.items():
        assert got[name].dtype == peer[name].dtype, name
        ours, theirs = ((v[name].double() - exact).norm() / exact.norm() for v in (got, peer))
        assert ours <= 2 * theirs + torch.finfo(got[name].dtype).eps / 2, f"{name}: {ours:.1e}, PEFT {theirs:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_under_autocast(dtype):
    oracle, fused = pair("llama", dtype)
    inputs = batch("llama")
    with torch.autocast("cpu", torch.bfloat16), fused_calls() as calls:
        got, wanted = gradients(fused, inputs), gradients(oracle, inputs)
    assert len(calls) == 14 and got["logits"].dtype == wanted["logits"].dtype
    assert_close(got, wanted, 5e-2)


def test_a_trained_base_weight_gets_its_gradient():
    oracle, fused = layer_pair()
    for layer in (oracle, fused):
        layer.base_layer.requires_grad_(True)
    x = torch.randn(9, 24)
    got, wanted = run(fused, x), run(oracle, x)
    assert "base_layer.weight" in wanted and "base_layer.bias" in wanted
    assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_right_after_the_start_the_output_is_the_bases_to_the_bit(kind):
    model = base(kind)
    inputs = batch(kind)
    with torch.no_grad():
        wanted = model(**inputs).logits
    model = peft.get_peft_model(model, config(kind, lora_bias=kind == "bert"))
    hf_peft.accelerate(model)
    assert torch.equal(model(**inputs).logits, wanted)
    fill(model)
    assert not torch.equal(model(**inputs).logits, wanted)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, wanted)


def test_the_scale_of_zero_is_no_adapter():
    oracle, fused = layer_pair()
    x = torch.randn(30, 24)
    fused.set_scale("default", 0)
    assert torch.equal(fused(x), fused.base_layer(x))


def test_generation_is_pefts():
    oracle, fused = pair("llama")
    ids = batch("llama")["input_ids"]
    wanted = oracle.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(fused.eval().generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0), wanted)


def test_the_trainer_trains_it_as_it_trains_pefts(own_precision, tmp_path):
    results = []
    for model in pair("bert", modules_to_save=["classifier"]):
        rows = batch("bert", 12)
        data = [{name: values[i] for name, values in rows.items()} for i in range(12)]
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(losses) == 6 and not any(map(torch.equal, trained.values(), start))
        results.append({"losses": losses} | trained)
    assert_close(results[1], results[0], 1e-3)


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(call, exclude) -> int:
    """Bytes of the storages that autograd keeps, each once, but for those of `exclude`."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_three_projections_of_one_input_keep_it_once(p):
    tokens, width, rank = 256, 128, 4
    model = nn.ModuleDict({name: nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for name in "qkv"})
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, target_modules=list("qkv"), lora_dropout=p), model.requires_grad_(False)
    )
    peft.tuners.tuners_utils.cast_adapter_dtype(model, "default")  # what get_peft_model does
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)

    def measured() -> int:
        return saved_bytes(lambda: [layer(x) for layer in model.values()], list(model.parameters()))

    theirs = measured()
    assert hf_peft.accelerate(model) == 3
    ours = measured()
    scales = 3 * 4
    bits = 3 * tokens * width // 8 if p else 0
    assert ours <= 2 * tokens * width + 3 * 4 * tokens * rank + bits + scales
    assert theirs >= (8 if p else 5) * ours


# ---- there and back --------------------------------------------------------------------------------------------------


def state(model):
    """Everything that PEFT's layers hold, by layer."""
    return {
        name: (type(m), list(vars(m)), dict(m.scaling), type(m.scaling))
        for name, m in model.named_modules()
        if isinstance(m, Linear)
    }


def test_swapping_changes_nothing_but_the_class():
    model = with_adapter("llama", lora_dropout=0.1)
    before = dict(model.named_parameters())
    buffers, keys, modules = (
        dict(model.named_buffers()),
        list(model.state_dict()),
        [n for n, _ in model.named_modules()],
    )
    assert hf_peft.accelerate(model) == 14
    assert hf_peft.accelerate(model) == 0
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == modules
    assert dict(model.named_buffers()).keys() == buffers.keys()
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert {type(m).__name__ for m in layers} == {"FusedLinear"}


def test_undo_gives_pefts_model_back():
    model = with_adapter("llama")
    inputs = batch("llama")
    before, wanted = state(model), gradients(model, inputs)
    hf_peft.accelerate(model)
    gradients(model, inputs)
    assert hf_peft.undo(model) == 14
    assert state(model) == before
    got = gradients(model, inputs)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert hf_peft.undo(model) == 0
