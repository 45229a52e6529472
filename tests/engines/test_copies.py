"""A whole transformers model with an adapter: autocast, copies, files of torch, the meta device."""

import copy
import io
import pickle

import peftops
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..methods.models import llama
from .common import VOCABULARY, adapted, assert_close, assert_equal, sequences, state, values

# ---- autocast --------------------------------------------------------------------------------------------------------


def loss_and_gradients(model, tuning, ids, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    tuning.model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in tuning.named_parameters()}}


def test_autocast_follows_float64_within_bfloat16():
    """Against the same model in float64; float32 factors keep float32 gradients."""
    ids = sequences(2)
    model, tuning = adapted(lora={"dropout": 0.0}, attention_dropout=0.0)
    exact = copy.deepcopy(tuning)
    exact.model.double()
    expected = loss_and_gradients(exact.model, exact, ids, False)
    actual = loss_and_gradients(model, tuning, ids, True)
    assert {gradient.dtype for gradient in actual.values()} == {torch.float32}
    assert_close(actual, expected, 0.05)


# ---- copies ----------------------------------------------------------------------------------------------------------


def through_torch_save(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("what", ["tuning", "model"])
def test_a_copy_trains_like_the_original_and_apart_from_it(way, what):
    model, tuning = adapted()
    before, ids = state(model), sequences(2)
    clone = COPIES[way](tuning if what == "tuning" else model)
    other = clone.model if what == "tuning" else clone
    assert type(other) is type(model)
    assert_equal(state(other), before)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}

    def trained(model):
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return state(model)

    after = trained(other.train())
    assert_equal(state(model), before)
    assert_equal(trained(model.train()), after)
    if what == "tuning":
        assert_equal({name: value for name, value in after.items() if name in values(clone)}, values(clone))
        clone.merge()
        clone.detach()
        plain = {name: tensor for name, tensor in before.items() if ".lora_" not in name}
        assert_equal(state(other), plain)


def test_a_state_dict_passes_weights_only():
    model, tuning = adapted()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert type(saved) is type(model.state_dict())
    other, again = adapted(seed=9)
    other.load_state_dict(saved)
    assert_equal(values(again), values(tuning))
    assert_equal(state(other), state(model))


# ---- the meta device -------------------------------------------------------------------------------------------------


def on_meta():
    with torch.device("meta"):
        return llama()


def with_rotary(model):
    """Its frequencies are no part of a state_dict; transformers' own from_pretrained computes them anew as well."""
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model.eval()


@pytest.mark.parametrize("assign", [False, True])
def test_attach_on_meta_then_base_and_factors_from_files(assign):
    """Storage comes from to_empty, or with the values themselves (`assign`)."""
    trained, reference = adapted(attention_dropout=0.0)
    model = on_meta()
    tuning = peftops.attach(model, peftops.LoRA(rank=4, alpha=8, dropout=0.25))
    assert all(parameter.is_meta for parameter in model.parameters())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(state(trained), assign=assign)
    ids = sequences(2)
    assert torch.equal(with_rotary(model)(ids).logits, trained.eval()(ids).logits)
    names = [name for name, _ in reference.named_parameters()]
    assert [name for name, _ in tuning.named_parameters()] == names
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in tuning.parameters())


def test_attach_on_meta_with_new_factors_is_the_base_model():
    base = llama().eval()
    model = on_meta()
    tuning = peftops.attach(model, peftops.LoRA(rank=4))
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), strict=False)
    for module in model.modules():
        if isinstance(module, peftops.nn.LoRALinear):
            module.reset_lora_parameters()
    ids = sequences(2)
    assert torch.equal(with_rotary(model)(ids).logits, base(ids).logits)
    assert all(parameter.isfinite().all() for parameter in tuning.parameters())


def test_load_needs_storage_and_says_so(tmp_path):
    trained, tuning = adapted(attention_dropout=0.0)
    tuning.save(tmp_path)
    model = on_meta()
    with pytest.raises(RuntimeError, match="load: the model has parameters on the meta device; materialise it first"):
        peftops.load(model, tmp_path)
    model.to_empty(device="cpu")
    base = {name: tensor for name, tensor in state(trained).items() if ".lora_" not in name}
    model.load_state_dict(base)
    again = peftops.load(model, tmp_path, trainable=True)
    assert_equal(values(again), values(tuning))
    ids = sequences(2)
    assert ids.max() < VOCABULARY
    assert torch.equal(with_rotary(model)(ids).logits, trained.eval()(ids).logits)
