"""attach with LoRA: the laws of the tuning."""

import copy
import pickle

import peft
import peftops
import pytest
import torch
from peftops.methods import LoRA, attach, load
from peftops.nn import LoRALinear
from torch import nn

from .models import MODELS, Block, distance, inputs, llama, logits, outputs, randomise, tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Q_AND_UP = ["q_proj", "up"]


def snapshot(model):
    """What detach has to bring back: classes, attributes, names in their order, objects, bits, flags, modes."""
    return {
        "modules": [
            (name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()
        ],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        "state": [(name, tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()],
    }


def assert_same(before, after):
    assert before["modules"] == after["modules"] and before["parameters"] == after["parameters"]
    assert [entry[:2] for entry in before["state"]] == [entry[:2] for entry in after["state"]]
    for (name, _, old), (_, _, new) in zip(before["state"], after["state"], strict=True):
        assert torch.equal(old, new), name


# ---- attach and detach -----------------------------------------------------------------------------------------------


def test_the_package_exports_the_method():
    assert (peftops.attach, peftops.load, peftops.LoRA, peftops.nn.LoRALinear) == (attach, load, LoRA, LoRALinear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method", [LoRA(), LoRA(rank=40, alpha=3, dropout=0.3, target_modules=Q_AND_UP, use_rslora=True)]
)
def test_identity_at_the_start_to_the_last_bit(dtype, method):
    model, ids = Block(dtype).eval(), tokens()
    expected = model(ids)
    tuning = attach(model, method)
    assert torch.equal(model(ids), expected)
    model.train()
    torch.manual_seed(1)
    with tuning.disabled():
        in_training = model(ids)
    torch.manual_seed(1)
    assert torch.equal(in_training, tuning.detach()(ids))


@pytest.mark.parametrize("name", MODELS)
def test_identity_at_the_start_of_transformers_models(name):
    model = MODELS[name]().eval()
    batch = inputs(model)
    expected = outputs(model, batch)
    tuning = attach(model, LoRA(rank=4))
    assert torch.equal(outputs(model, batch), expected)
    assert type(model) is type(MODELS[name]()) and len(tuning.parameters()) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [False, True])
def test_detach_restores_everything(dtype, merged):
    model = Block(dtype)
    model.layers[1].requires_grad_(False)
    model.norm.eval()
    before = snapshot(model)
    method = LoRA(rank=3, target_modules=Q_AND_UP, modules_to_save=["head"])
    tuning = attach(model, method)
    randomise(tuning)
    if merged:
        tuning.merge()
    assert tuning.detach() is model
    assert_same(before, snapshot(model))
    attach(model, method).detach()
    assert_same(before, snapshot(model))


def test_detach_restores_a_gpt2_with_tied_embeddings():
    model = MODELS["gpt2"]()
    before = snapshot(model)
    tuning = attach(model, LoRA(target_modules=["c_attn", "c_proj", "lm_head"]))
    randomise(tuning)
    tuning.detach()
    assert_same(before, snapshot(model))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_names_classes_hooks_and_what_is_trained():
    model = Block()
    layer, calls = model.layers[0]["up"], []
    layer.register_forward_hook(lambda *_: calls.append(1))
    names = list(model.state_dict())
    tuning = attach(model, LoRA(rank=3, target_modules=["layers.0.up"]))
    assert model.layers[0]["up"] is layer and isinstance(layer, LoRALinear) and type(model) is Block
    model(tokens())
    assert calls == [1]
    added = ["layers.0.up.lora_a.default", "layers.0.up.lora_b.default"]
    assert [name for name, _ in tuning.named_parameters()] == added
    assert [name for name, p in model.named_parameters() if p.requires_grad] == added
    assert [name for name in model.state_dict() if name not in added] == names
    assert not any(name.endswith("lora_scale") for name in model.state_dict())


def test_attach_twice_and_on_a_peft_model_is_an_error():
    model = Block()
    attach(model, LoRA())
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"attach: the model carries an adapter already \(layers.0.q_proj"):
        attach(model, LoRA())
    assert_same(before, snapshot(model))
    theirs = peft.get_peft_model(Block(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(RuntimeError, match="carries Hugging Face PEFT adapters"):
        attach(theirs, LoRA())


BAD_CALLS = [
    (lambda m: attach(m, "lora"), TypeError, "method is 'lora', but it must be a method"),
    (lambda m: attach("model", LoRA()), TypeError, "model is a str"),
    (lambda m: attach(m, LoRA(target_modules=["nothing"])), ValueError, r"chooses no layer of Block.*down \(2\)"),
    (lambda m: attach(m, LoRA(target_modules=["norm"])), TypeError, "norm: LayerNorm is neither"),
    (lambda m: attach(m, LoRA(target_modules=["up", "layers.1"])), TypeError, "layers.1: ModuleDict is neither"),
    (
        lambda m: attach(m, LoRA(modules_to_save=["score"])),
        ValueError,
        "modules_to_save names 'score', which matches no",
    ),
    (lambda m: attach(m, LoRA(modules_to_save=["dropout"])), ValueError, "dropout, which has no parameters"),
    (lambda m: attach(m, LoRA(adapter_dtype=torch.bfloat16)), ValueError, "layers.0.q_proj: adapter_dtype is bfloat16"),
]


@pytest.mark.parametrize("call, error, match", BAD_CALLS)
def test_bad_calls_are_named_and_change_nothing(call, error, match):
    model = Block()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model)
    assert_same(before, snapshot(model))


BAD_METHODS = [
    ({"rank": 0}, "rank is 0"),
    ({"alpha": "8"}, "alpha is '8'"),
    ({"dropout": 1}, "dropout is 1"),
    ({"init": "svd"}, "init is 'svd'"),
    ({"target_modules": "(q"}, "target_modules is .* no regular expression"),
    ({"target_modules": [1]}, "target_modules is .* a list of names"),
    ({"modules_to_save": "head"}, "modules_to_save is 'head', but it must be a list"),
]


@pytest.mark.parametrize("options, match", BAD_METHODS)
def test_bad_hyperparameters_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        LoRA(**options)


def test_a_failure_half_way_is_undone(monkeypatch):
    model = Block()
    before, adapt = snapshot(model), LoRALinear.adapt_.__func__
    seen = []

    def fail_at_the_third(cls, layer, *arguments):
        seen.append(layer)
        if len(seen) == 3:
            raise MemoryError
        return adapt(cls, layer, *arguments)

    monkeypatch.setattr(LoRALinear, "adapt_", classmethod(fail_at_the_third))
    with pytest.raises(MemoryError):
        attach(model, LoRA())
    assert_same(before, snapshot(model))


def test_nothing_works_after_detach():
    tuning = attach(Block(), LoRA())
    tuning.detach()
    calls = [tuning.parameters, tuning.merge, tuning.unmerge, tuning.detach, tuning.summary]
    calls += [lambda: tuning.save("nowhere"), lambda: tuning.optimizer(1e-3), lambda: tuning.disabled().__enter__()]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"this adapter was taken out by detach\(\)"):
            call()


# ---- merging and switching off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_equals_unmerged_and_twenty_cycles_leave_no_trace(dtype):
    model, ids = Block(dtype).eval(), tokens()
    tuning = attach(model, LoRA(rank=3, target_modules=Q_AND_UP))
    randomise(tuning)
    state, separate = {k: v.clone() for k, v in model.state_dict().items()}, model(ids)
    for _ in range(20):
        tuning.merge()
        merged = model(ids)
        tuning.merge()
        assert tuning.merged and torch.equal(model(ids), merged)
        tuning.unmerge()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert distance(merged, separate) <= tolerance
    assert torch.equal(model(ids), separate)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_merged_equals_unmerged_on_transformers_models(name):
    model, ids = MODELS[name]().eval(), tokens()
    tuning = attach(model, LoRA(rank=3))
    randomise(tuning)
    separate = logits(model, ids)
    tuning.merge()
    merged = logits(model, ids)
    with tuning.disabled():
        assert distance(merged, separate) < 1e-5 < 1e-2 < distance(merged, logits(model, ids))


def test_merge_for_good():
    model, ids = Block().eval(), tokens()
    tuning = attach(model, LoRA(rank=3, modules_to_save=["head"]))
    randomise(tuning)
    separate = model(ids)
    tuning.merge(keep_base=False)
    merged = model(ids)
    for action in (tuning.unmerge, lambda: tuning.disabled().__enter__()):
        with pytest.raises(RuntimeError, match=r"base weights were freed by merge\(keep_base=False\)"):
            action()
    assert torch.equal(model(ids), merged)
    plain = tuning.detach()
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())
    assert torch.equal(plain(ids), merged)
    assert distance(merged, separate) < 1e-5


def test_a_tied_weight_is_trained_but_not_merged():
    model, ids = llama(tie_word_embeddings=True).eval(), tokens()
    expected = logits(model, ids)
    tuning = attach(model, LoRA(rank=3, target_modules=["lm_head", "q_proj"]))
    randomise(tuning)
    trained = logits(model, ids)
    with pytest.raises(RuntimeError, match="lm_head.weight is tied to model.embed_tokens.weight"):
        tuning.merge()
    assert not tuning.merged and torch.equal(logits(model, ids), trained) and not torch.equal(trained, expected)
    with tuning.disabled():
        assert torch.equal(logits(model, ids), expected)
    with pytest.raises(ValueError, match="modules_to_save: lm_head.weight is tied to model.embed_tokens.weight"):
        attach(tuning.detach(), LoRA(target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_disabled_is_the_base_model_to_the_last_bit(merged, grad):
    model, ids = Block(torch.bfloat16).eval(), tokens()
    with torch.set_grad_enabled(grad):
        expected = model(ids)
        tuning = attach(model, LoRA(target_modules=Q_AND_UP, modules_to_save=["head"], adapter_dtype=torch.float32))
        randomise(tuning)
        if merged:
            tuning.merge()
        trained = model(ids)
        with tuning.disabled():
            assert torch.equal(model(ids), expected)
            with tuning.disabled():
                assert torch.equal(model(ids), expected)
            assert torch.equal(model(ids), expected)
        assert torch.equal(model(ids), trained) and not torch.equal(trained, expected)
        with pytest.raises(KeyError), tuning.disabled():
            raise KeyError
        assert torch.equal(model(ids), trained) and tuning.merged == merged


def test_inside_disabled_the_state_cannot_be_changed():
    tuning = attach(Block(), LoRA())
    with tuning.disabled():
        for action in (tuning.merge, tuning.unmerge, tuning.detach, lambda: tuning.save("nowhere")):
            with pytest.raises(RuntimeError, match=r"not possible inside disabled\(\)"):
                action()


def test_a_graph_recorded_before_disabled_still_runs_backward():
    """A preference loss asks for the reference model's output between the policy's forward and its backward."""
    grads = []
    for interrupt in (False, True):
        torch.manual_seed(0)
        model = Block().eval()
        tuning = attach(model, LoRA(target_modules=Q_AND_UP, modules_to_save=["head"]))
        randomise(tuning)
        loss = model(tokens()).square().sum()
        if interrupt:
            with tuning.disabled(), torch.no_grad():
                model(tokens())
        loss.backward()
        grads.append([parameter.grad for parameter in tuning.parameters()])
    assert all(torch.equal(plain, interrupted) for plain, interrupted in zip(*grads, strict=True))


def test_modes_change_no_weight():
    model = Block()
    tuning = attach(model, LoRA())
    randomise(tuning)
    tuning.merge()
    before = snapshot(model)["state"]
    model.eval().train()
    assert all(torch.equal(old[2], new[2]) for old, new in zip(before, snapshot(model)["state"], strict=True))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.float32, None), (torch.bfloat16, torch.float32)])
def test_training_lowers_the_loss_and_moves_only_what_is_trained(dtype, adapter_dtype):
    model, ids = Block(dtype), tokens(16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = LoRA(rank=4, dropout=0.1, adapter_dtype=adapter_dtype, target_modules=Q_AND_UP, modules_to_save=["head"])
    tuning = attach(model, method)
    optimizer, losses = tuning.optimizer(lr=2e-2), []
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["params"] == tuning.parameters()
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten() % 5)
        loss.backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    changed = {
        name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    assert changed == {"head.weight", "head.bias"}


def test_optimizer_options():
    tuning = attach(Block(), LoRA())
    group = tuning.optimizer(lr=3e-4, weight_decay=0.1, betas=(0.8, 0.9)).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-4, 0.1, (0.8, 0.9))


def test_summary_counts_what_is_trained():
    model = Block()
    model.fused = nn.MultiheadAttention(16, 2)
    tuning = attach(model, LoRA(rank=2, target_modules=None, modules_to_save=["head"]))
    summary = tuning.summary()
    factors = 2 * (2 * (16 + 16) + 2 * (16 + 24) + 2 * (24 + 16))
    assert summary.parameters == factors + 16 * 5 + 5 == sum(p.numel() for p in tuning.parameters())
    assert summary.bytes == 4 * summary.parameters
    assert summary.model_parameters == sum(p.numel() for p in model.parameters())
    assert [row.name for row in summary.modules][-1] == "head" and summary.modules[0].shape == (16, 16)
    assert list(summary.skipped) == ["fused.out_proj"]
    text = str(summary)
    assert "layers.*.up" in text and "left alone: fused.out_proj: NonDynamicallyQuantizableLinear" in text


# ---- copies, conversions, compilation --------------------------------------------------------------------------------


def test_deepcopy_of_a_tuning_is_independent_and_pickles():
    model, ids = Block().eval(), tokens()
    tuning = attach(model, LoRA(modules_to_save=["head"]))
    randomise(tuning)
    expected = model(ids)
    for twin in (copy.deepcopy(tuning), pickle.loads(pickle.dumps(tuning))):
        assert torch.equal(twin.model(ids), expected)
        twin.detach()
        assert not torch.equal(twin.model(ids), expected)
    assert torch.equal(model(ids), expected)


def test_meta_attach_then_materialise():
    with torch.device("meta"):
        model = Block()
    tuning = attach(model, LoRA(rank=3, target_modules=Q_AND_UP))
    model.to_empty(device="cpu")
    source = Block()
    model.load_state_dict(source.state_dict(), strict=False)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.reset_lora_parameters()
    ids = tokens()
    assert torch.equal(model.eval()(ids), source.eval()(ids))
    assert len(tuning.parameters()) == 8 and all(p.requires_grad and not p.is_meta for p in tuning.parameters())
    assert all(p.requires_grad for p in tuning.detach().parameters())


def test_conversion_of_the_model_after_attach():
    model, ids = Block().eval(), tokens()
    tuning = attach(model, LoRA(alpha=1, rank=3, adapter_dtype=torch.float32, modules_to_save=["head"]))
    before = model(ids)
    randomise(tuning)
    model.to(torch.bfloat16)
    assert model.layers[0]["up"].lora_a.default.dtype == torch.float32 and model(ids).dtype == torch.bfloat16
    with tuning.disabled():
        assert distance(model(ids), before) < 2e-2


def test_compiled_model_and_attach_to_one():
    torch.compiler.reset()
    model, ids = Block().eval(), tokens()
    tuning = attach(torch.compile(model, fullgraph=True, backend="aot_eager"), LoRA())
    assert tuning.model is model
    randomise(tuning)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), model(ids))
    with tuning.disabled():
        assert torch.equal(compiled(ids), model(ids))
