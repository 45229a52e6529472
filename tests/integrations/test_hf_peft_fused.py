"""`accelerate(model, share_inputs=True)`: projections of one input in one call, and PEFT's results as before."""

from __future__ import annotations

import copy

import pytest
import torch
from peftops.integrations import hf_peft
from transformers import T5Config, T5ForConditionalGeneration

from ..nn.sharing import counted, few_rows_count, groups, nothing_waits  # noqa: F401
from . import models
from .models import assert_close, batch, gradients, with_adapter

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = {"llama": [3, 2, 3, 2], "bert": [3, 3], "gpt2": []}


def pair(kind, **changes):
    """(fused layers, the same sharing their inputs), with equal parameters."""
    alone = with_adapter(kind, **changes)
    shared = copy.deepcopy(alone)
    assert hf_peft.accelerate(alone) == hf_peft.accelerate(shared, share_inputs=True) > 0
    return alone, shared


def compare(models, inputs, calls, seed=5, tolerance=2e-5):
    results = []
    for model in models:
        torch.manual_seed(seed)
        with counted() as found:
            results.append(gradients(model, inputs) | {"next number": torch.rand(1)})
    assert found == calls and nothing_waits()
    for name in ("logits", "next number"):
        assert torch.equal(results[0][name], results[1][name]), name
    assert_close(results[1], results[0], tolerance)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_outputs_to_the_bit_and_gradients(kind, p):
    both = pair(kind, lora_dropout=p)
    for model in both:
        model.train()
    for _ in range(2):
        compare(both, batch(kind), CALLS[kind])
    assert not any(group.dissolved for group in groups(both[1]))
    assert hf_peft.coverage(both[1]).fused == hf_peft.coverage(both[0]).fused


def test_cross_attention(monkeypatch):
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.1, decoder_start_token_id=0)

    def t5():
        torch.manual_seed(1)
        return T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes, feed_forward_proj="gated-gelu"))

    monkeypatch.setattr(models, "base", lambda kind: t5())
    monkeypatch.setitem(models.TARGETS, "t5", ["q", "k", "v", "o", "wi_0", "wi_1"])
    both = pair("t5", lora_dropout=0.2)
    for model in both:
        model.train()
    compare(both, batch("t5"), [3, 2, 3, 2, 2])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_autocast_and_16_bits(kind):
    both = pair(kind, lora_dropout=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        compare(both, batch(kind), CALLS[kind], tolerance=5e-2)
    both = pair(kind, dtype=torch.bfloat16)
    compare(both, batch(kind), CALLS[kind], tolerance=5e-2)


def test_states_of_pefts_layers():
    both = pair("llama")
    for model in both:
        model.add_adapter("other", models.config(r=2))
        models.fill(model, "other")
    with torch.no_grad():
        for act, calls in (
            (lambda model: model.set_adapter("other"), CALLS["llama"]),
            (lambda model: model.base_model.set_adapter(["default", "other"]), []),
            (lambda model: model.set_adapter("default"), CALLS["llama"]),
            (lambda model: model.base_model.disable_adapter_layers(), []),
            (lambda model: model.base_model.enable_adapter_layers(), CALLS["llama"]),
            (lambda model: model.merge_adapter(), []),
            (lambda model: model.unmerge_adapter(), CALLS["llama"]),
        ):
            results = []
            for model in both:
                act(model)
                with counted() as found:
                    results.append(model(**batch("llama")).logits)
            assert torch.equal(*results) and found == calls
        names = ["default", "__base__", "other"]
        results = [model.eval()(**batch("llama"), adapter_names=names).logits for model in both]
        assert torch.equal(*results)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    both = pair("llama", lora_dropout=0.3)
    for model in both:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(both, batch("llama"), CALLS["llama"] + [3, 2, 3, 2] if reentrant else [])


def test_copies_and_the_way_back():
    alone, shared = pair("llama")
    clone = copy.deepcopy(shared)
    compare((alone, clone), batch("llama"), CALLS["llama"])
    assert hf_peft.accelerate(shared) == 0 and not groups(shared)  # the last call counts
    compare((alone, shared), batch("llama"), [])
    hf_peft.accelerate(shared, share_inputs=True)
    hf_peft.undo(shared)
    assert not any("sharing" in vars(module) for module in shared.modules())
    compare((alone, clone), batch("llama"), CALLS["llama"])


def test_hooks_on_a_layer_leave_it_to_itself():
    both = pair("llama")
    for model in both:
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        layer.register_forward_hook(lambda module, args, y: 2 * y)
    compare(both, batch("llama"), [2, 2, 3, 2])
