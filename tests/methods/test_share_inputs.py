"""`attach(..., share_inputs=True)` on models of transformers: fewer calls, the same numbers."""

import copy

import pytest
import torch
from peftops.methods import LoRA, attach, load
from torch import nn

from ..nn.sharing import assert_same, counted, few_rows_count, groups, nothing_waits  # noqa: F401
from .models import FAMILIES, inputs, outputs, randomise

# Projections in each call for several, in the order of the calls; T5's and BART's cross attention reads two tensors.
CALLS = {
    "llama": [3, 2, 3, 2],
    "qwen2": [3, 2, 3, 2],
    "mistral": [3, 2, 3, 2],
    "gpt2": [],
    "bert": [3, 3],
    "roberta": [3, 3],
    "opt": [3, 3],
    "vit": [3],
    "t5": [3, 3, 2],
    "bart": [3, 3, 2],
}


def tuned(kind, p=0.2, **options):
    """(model, tuning) with the same weights every time."""
    torch.manual_seed(1)
    model = FAMILIES[kind]().train()
    tuning = attach(model, LoRA(rank=4, alpha=8, dropout=p), **options)
    randomise(tuning)
    return model, tuning


def arguments(kind):
    torch.manual_seed(2)
    return inputs(FAMILIES[kind]())


def step(model, tuning, given):
    """Output and gradients of one step, and the next random number."""
    torch.manual_seed(3)
    model.zero_grad()
    y = outputs(model, given)
    y.square().mean().backward()
    return {"y": y.detach(), "next number": torch.rand(1), **{n: p.grad for n, p in tuning.named_parameters()}}


@pytest.mark.parametrize("kind", CALLS)
def test_a_model_trains_as_without(kind):
    given, (plain, reference), (model, tuning) = arguments(kind), tuned(kind), tuned(kind, share_inputs=True)
    expected = step(plain, reference, given)
    for _ in range(2):
        with counted() as calls:
            got = step(model, tuning, given)
        assert calls == CALLS[kind] and nothing_waits()
        assert_same(got, expected, tolerance=1e-4)
    assert not any(group.dissolved for group in groups(model))
    assert not groups(plain)
    with torch.no_grad():
        assert torch.equal(outputs(model.eval(), given), outputs(plain.eval(), given))


def test_a_run_of_adamw_goes_where_it_goes_without():
    losses = []
    for options in ({}, {"share_inputs": True}):
        model, tuning = tuned("llama", **options)
        optimizer, ids = tuning.optimizer(lr=1e-2), arguments("llama")["input_ids"]
        torch.manual_seed(4)
        losses.append([])
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generate(kind):
    how = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"decoder_start_token_id": 1} if kind == "t5" else {}
    found = []
    for options in ({}, {"share_inputs": True}):
        model, _ = tuned(kind, **options)
        with counted() as calls:
            found.append(model.eval().generate(arguments(kind)["input_ids"], **how))
    assert calls and torch.equal(*found)
    assert not any(group.dissolved for group in groups(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    given = arguments("llama")
    results = []
    for options in ({}, {"share_inputs": True}):
        model, tuning = tuned("llama", **options)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with counted() as calls:
            results.append(step(model, tuning, given))
    assert calls == (2 * CALLS["llama"][:2] + CALLS["llama"] if reentrant else [])
    assert_same(*results, tolerance=1e-4)


def test_the_groups_follow_the_adapters(tmp_path):
    ids = arguments("llama")["input_ids"]
    other = attach(FAMILIES["llama"](), LoRA(rank=2, target_modules=["k_proj", "v_proj"]))
    randomise(other)
    other.save(tmp_path)
    torch.manual_seed(1)
    model = FAMILIES["llama"]().eval()
    tuning = attach(model, LoRA(rank=3, target_modules=["q_proj", "v_proj"]), "a", share_inputs=True)
    randomise(tuning)
    plain = copy.deepcopy(tuning)
    plain._sharing = False

    def check(expected):
        with torch.no_grad(), counted() as calls:
            got = model(ids).logits
        assert calls == expected and torch.equal(got, plain.model(ids).logits)

    for each in (tuning, plain):
        each.add("b", tmp_path)
    from peftops.nn.sharing import unshare_inputs

    unshare_inputs(plain.model)
    check([2, 2])
    for which, expected in (("b", [2, 2]), (["a", "b"], [2, 2]), (None, []), ("a", [2, 2])):
        for each in (tuning, plain):
            each.activate(which)
        check(expected)
    with tuning.disabled(), plain.disabled():
        check([])
    tuning.merge(), plain.merge()
    check([])
    tuning.unmerge(), plain.unmerge()
    check([2, 2])
    for each in (tuning, plain):
        each.swap("a", tmp_path)
    check([2, 2])
    for each in (tuning, plain):
        each.delete("b")
    check([2, 2])
    tuning.detach()
    assert not groups(model) and not any("sharing" in vars(module) for module in model.modules())
    load(model, tmp_path, share_inputs=True)
    check([2, 2])


def test_without_being_asked_nothing_is_shared():
    model, _ = tuned("llama")
    assert not groups(model) and isinstance(model, nn.Module)
