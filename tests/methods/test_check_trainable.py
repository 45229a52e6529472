"""check_trainable: each reason why a parameter is not trained."""

import copy

import peft
import peftops
import pytest
import torch
import transformers
from peftops.methods.check_trainable import check_trainable
from torch import nn
from torch.utils.checkpoint import checkpoint

from .models import Block, llama, randomise, tokens


def batch():
    return {"input_ids": tokens(), "labels": tokens()}


def peft_llama(**options):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(llama(), config)


def kinds(report):
    return {finding.parameter: finding.kind for finding in report.findings}


def only(report):
    """The one finding of the report."""
    assert len(report.findings) == 1, str(report)
    return report.findings[0]


class Net(nn.Module):
    """Two linears and a way to spoil the second one: `spoil` gets the second linear and its input."""

    def __init__(self, spoil):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.side = nn.Module()
        self.side.second = nn.Linear(4, 4, bias=False)
        self.side.forward = lambda x: spoil(self.side.second, x)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.side(x))


def second_of(spoil):
    report = check_trainable(Net(spoil), torch.randn(3, 4))
    finding = only(report)
    assert finding.parameter == "side.second.weight" and not report.ok
    assert (report.trained, report.trainable) == (4, 5)
    return finding


def no_grad(layer, x):
    with torch.no_grad():
        return layer(x)


def inference(layer, x):
    with torch.inference_mode():
        out = layer(x)
    return out.clone()


# ---- healthy models --------------------------------------------------------------------------------------------------


def test_a_model_that_is_trained_whole():
    report = check_trainable(Block(), tokens())
    assert report.ok and not report.findings and report.trained == report.trainable == 15
    assert str(report).endswith("ok: every trainable parameter is trained")


def test_the_batch_may_be_positional_arguments_or_keywords():
    model = nn.Bilinear(3, 4, 2)
    parts = torch.randn(5, 3), torch.randn(5, 4)
    reports = [
        check_trainable(model, parts),
        check_trainable(model, list(parts)),
        check_trainable(model, {"input1": parts[0], "input2": parts[1]}),
    ]
    assert all(report.ok and report.loss == reports[0].loss for report in reports)


def test_loss_of_a_transformer_is_its_own():
    model = peft_llama().eval()
    data = batch()
    report = check_trainable(model, data)
    assert report.ok and report.loss == pytest.approx(model(**data).loss.item())


def test_loss_can_be_a_function():
    report = check_trainable(nn.Linear(3, 2), torch.ones(1, 3), loss=lambda output: output[0, 0] * 0 + 7)
    assert report.loss == 7 and set(kinds(report).values()) == {"zero"}


@pytest.mark.parametrize("loss", [lambda output: output, lambda output: 3.0, lambda output: output.sum().long()])
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises(ValueError, match="the loss is .* but it must be a floating tensor of one element"):
        check_trainable(nn.Linear(3, 2), torch.ones(1, 3), loss=loss)


def test_an_output_without_floating_tensors_needs_a_loss():
    class Ids(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    with pytest.raises(ValueError, match="no floating tensor; pass loss="):
        check_trainable(Ids(3, 2), torch.ones(1, 3))


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model is a dict"):
        check_trainable({}, torch.ones(1))


@pytest.mark.parametrize("head", ["zero", "norm"])
def test_default_loss_reaches_what_a_sum_of_squares_would_not(head):
    """At a head that starts at zero, and behind a layer norm, sum(y^2) has no gradient."""
    last = nn.Linear(4, 4) if head == "zero" else nn.LayerNorm(4, elementwise_affine=False)
    if head == "zero":
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    model = nn.Sequential(nn.Linear(4, 4), last)
    found = kinds(check_trainable(model, torch.randn(3, 4)))
    assert set(found) == ({"0.weight", "0.bias"} if head == "zero" else set())


# ---- reasons ---------------------------------------------------------------------------------------------------------


def test_nothing_trainable():
    finding = only(check_trainable(Block().requires_grad_(False), tokens()))
    assert (finding.parameter, finding.kind) == ("", "nothing trainable")


def test_frozen_adapter_names_the_way_to_load_it(tmp_path):
    peft_llama().save_pretrained(tmp_path)
    report = check_trainable(peft.PeftModel.from_pretrained(llama(), tmp_path), batch())
    assert not report.ok and "is_trainable=True" in only(report).advice


def test_module_that_is_not_called():
    finding = second_of(lambda layer, x: x)
    assert finding.kind == "not called" and "side.second was not called" in finding.reason


def test_output_that_is_not_used():
    finding = second_of(lambda layer, x: (layer(x), x)[1])
    assert finding.kind == "cut" and "lost inside side," in finding.reason


@pytest.mark.parametrize("cut", [lambda y: y.detach(), lambda y: y.argmax(-1, keepdim=True).float()])
def test_output_that_is_cut_off(cut):
    finding = second_of(lambda layer, x: cut(layer(x)) + x)
    assert finding.kind == "cut" and "detach()" in finding.advice


def test_output_cut_in_the_forward_of_the_model():
    class Cut(Net):
        def forward(self, x):
            return self.last(self.first(x).detach())

    report = check_trainable(Cut(lambda layer, x: x), torch.randn(3, 4))
    found = {finding.parameter: finding for finding in report.findings}
    assert found["first.weight"].kind == "cut" and "forward of the model itself" in found["first.weight"].reason
    assert found["side.second.weight"].kind == "not called" and "last.weight" not in found


@pytest.mark.parametrize("spoil", [no_grad, inference])
def test_call_under_no_grad(spoil):
    assert second_of(spoil).kind == "no_grad"


def test_parameter_that_its_module_does_not_use():
    class Replaced(nn.Linear):
        def forward(self, x):
            return x @ self.weight.detach().T + self.bias

    finding = only(check_trainable(nn.Sequential(nn.Linear(4, 4), Replaced(4, 4)), torch.randn(2, 4)))
    assert (finding.parameter, finding.kind) == ("1.weight", "unused")


def test_function_that_returns_no_gradient():
    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x @ weight

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    class Layer(nn.Linear):
        def forward(self, x):
            return Silent.apply(x, self.weight)

    finding = only(check_trainable(nn.Sequential(nn.Linear(4, 4), Layer(4, 4, bias=False)), torch.randn(2, 4)))
    assert (finding.parameter, finding.kind) == ("1.weight", "no gradient")


def test_tied_weight_counts_once_and_is_trained_by_either_use():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model.forward = lambda x: model["b"](x)
    assert kinds(check_trainable(model, torch.randn(2, 4))) == {"a.bias": "not called"}


def test_zero_gradient():
    finding = second_of(lambda layer, x: torch.relu(layer(x) - 1e6))
    assert finding.kind == "zero" and not finding.expected


def test_gradient_that_is_not_finite_names_where_it_starts():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].bias[0] = float("inf")
    report = check_trainable(model, torch.randn(2, 4))
    assert set(kinds(report).values()) == {"not finite"}
    assert all("that of 1" in finding.reason for finding in report.findings)


def test_labels_that_are_all_ignored():
    """The mean over no label is NaN, and every gradient is zero."""
    report = check_trainable(peft_llama(), {"input_ids": tokens(), "labels": torch.full((3, 9), -100)})
    assert kinds(report)[""] == "not finite" and "ignored" in report.findings[0].advice
    assert report.trained == 0 and len(report.findings) == 1 + report.trainable


# ---- checkpointing ---------------------------------------------------------------------------------------------------


def test_reentrant_checkpointing_over_frozen_embeddings():
    """The classic: the loss falls, because the head is trained, and the adapter never moves."""
    model = peft_llama(modules_to_save=["lm_head"])
    assert check_trainable(model, batch()).ok
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        report = check_trainable(model, batch())
    assert not report.ok and (report.trained, report.trainable) == (1, 9)
    assert set(kinds(report).values()) == {"checkpoint"}
    for finding in report.findings:
        block = finding.parameter.partition(".self_attn")[0]
        assert f"{block} is checkpointed" in finding.reason
        assert '"use_reentrant": False' in finding.advice and "enable_input_require_grads()" in finding.advice
    assert "base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight (2)" in str(report)


@pytest.mark.parametrize("cure", ["inputs", "not reentrant"])
def test_the_advice_about_checkpointing_helps(cure):
    model = peft_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": cure == "inputs"})
    if cure == "inputs":
        model.enable_input_require_grads()
    assert check_trainable(model, batch()).ok


def test_nothing_at_all_is_trained_under_checkpointing():
    """The loss has no graph then, and backward itself would fail."""
    model = peft_llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.warns(UserWarning, match="None of the inputs"):
        report = check_trainable(model, batch())
    assert report.trained == 0 and set(kinds(report).values()) == {"checkpoint"}


class Checkpointed(nn.Module):
    """A plain checkpointed block; `inside` says what happens in it."""

    def __init__(self, inside):
        super().__init__()
        self.embed, self.block, self.last = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.inside = inside

    def forward(self, x):
        return self.last(checkpoint(lambda x: self.inside(self.block, x), self.embed(x), use_reentrant=True))


def test_plain_function_under_checkpointing():
    model = Checkpointed(lambda layer, x: layer(x))
    assert check_trainable(model, torch.randn(2, 4)).ok
    model.embed.requires_grad_(False)
    with pytest.warns(UserWarning, match="None of the inputs"):
        finding = only(check_trainable(model, torch.randn(2, 4)))
    assert (finding.parameter, finding.kind) == ("block.weight", "checkpoint")


def test_branch_that_is_cut_inside_a_checkpointed_block():
    finding = only(check_trainable(Checkpointed(lambda layer, x: x + layer(x).detach()), torch.randn(2, 4)))
    assert (finding.parameter, finding.kind) == ("block.weight", "cut")


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_lora_at_its_start_is_expected_to_train_b_alone():
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    report = check_trainable(model, batch())
    assert report.ok and report.trained == 3 and "PROBLEM" not in str(report)
    assert str(report).endswith("ok: every trainable parameter is trained from the second step on")
    names = set(kinds(report))
    # PEFT starts an embedding with A = 0, a linear layer with B = 0.
    assert {name.partition(".default")[0].rpartition(".")[2] for name in names} == {"lora_A", "lora_embedding_B"}
    assert all(finding.expected and finding.kind == "zero" for finding in report.findings)


def test_both_factors_zero():
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    report = check_trainable(model, batch())
    assert not report.ok and all("both factors are zero" in finding.reason for finding in report.findings)
    assert report.trained == 0 and len(report.findings) == 4


def test_peft_adapter_that_is_not_active():
    model = peft_llama()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    report = check_trainable(model, batch())
    assert not report.ok and set(kinds(report).values()) == {"inactive"}
    assert {name for name in kinds(report)} == {name for name, _ in model.named_parameters() if ".other." in name}
    assert "model.set_adapter('other')" in report.findings[0].advice


def test_peft_adapter_that_is_merged_or_disabled():
    model = peft_llama()
    with model.disable_adapter():
        report = check_trainable(model, batch())
    assert not report.ok and "leave disabled() or disable_adapter()" in only(report).advice
    with model.disable_adapter():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        report = check_trainable(model, batch())
    assert set(kinds(report).values()) == {"disabled"} and report.trained == 0
    model = peft_llama()
    model.merge_adapter()
    report = check_trainable(model, batch())
    assert set(kinds(report).values()) == {"merged"} and report.trained == 0


def test_peft_layers_whose_forward_was_replaced():
    """A layer that reads its factors without calling their modules."""
    model = peft_llama()
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
            layer.forward = lambda x, layer=layer, a=a, b=b: layer.base_layer(x) + x @ a.T @ b.T
    assert check_trainable(model, batch()).ok
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.forward = layer.base_layer.forward
    assert set(kinds(check_trainable(model, batch())).values()) == {"unused"}


def attached(**options):
    """Our own adapter, as after some training."""
    model = llama()
    tuning = peftops.attach(model, peftops.LoRA(target_modules=["q_proj", "embed_tokens"], **options))
    randomise(tuning)
    return model, tuning


def test_our_adapter_at_its_start():
    model = llama()
    peftops.attach(model, peftops.LoRA(target_modules=["q_proj", "embed_tokens"]))
    report = check_trainable(model, batch())
    assert report.ok and report.trained == 3 and all(finding.expected for finding in report.findings)
    parts = {name.rpartition(".default")[0] for name in kinds(report)}
    assert parts == {
        "model.embed_tokens.lora_b",
        "model.layers.0.self_attn.q_proj.lora_a",
        "model.layers.1.self_attn.q_proj.lora_a",
    }


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"bias": "all"}, {"init": "pissa"}])
def test_our_adapter_after_some_training(options):
    model, tuning = attached(**options)
    report = check_trainable(model, batch())
    assert report.ok and not report.findings and report.trained == len(tuning.parameters())


def test_our_adapter_that_is_merged_or_disabled():
    model, tuning = attached()
    with tuning.disabled():
        assert set(kinds(check_trainable(model, batch())).values()) == {"disabled"}
    tuning.merge()
    report = check_trainable(model, batch())
    assert set(kinds(report).values()) == {"merged"} and report.trained == 0
    tuning.unmerge()
    assert check_trainable(model, batch()).ok


def test_our_adapter_that_is_not_active():
    model, tuning = attached()
    tuning.add("other", peftops.LoRA(target_modules=["q_proj"]), trainable=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    report = check_trainable(model, batch())
    assert set(kinds(report)) == {name for name, _ in model.named_parameters() if name.endswith(".other")}
    assert set(kinds(report).values()) == {"inactive"} and "tuning.activate('other')" in report.findings[0].advice


def test_our_adapter_under_reentrant_checkpointing():
    model = llama()
    tuning = peftops.attach(model, peftops.LoRA(target_modules=["q_proj"]))
    randomise(tuning)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.warns(UserWarning, match="None of the inputs"):
        assert set(kinds(check_trainable(model, batch())).values()) == {"checkpoint"}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert check_trainable(model, batch()).ok


def test_our_adapter_that_was_loaded_to_be_used(tmp_path):
    model, tuning = attached()
    tuning.save(tmp_path)
    tuning.detach()
    peftops.load(model, tmp_path)
    assert "trainable=True (peftops.load)" in only(check_trainable(model, batch())).advice


def test_compiled_model_runs_eagerly():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.requires_grad_(False)
    x = torch.randn(2, 4)
    expected = check_trainable(copy.deepcopy(model), x)
    assert check_trainable(torch.compile(model, backend="eager"), x) == expected
    model.compile(backend="eager")
    assert check_trainable(model, x) == expected


def test_sequence_classification_head():
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.BertForSequenceClassification(config)
    model.classifier.requires_grad_(False)
    model.add_module("classifier_2", nn.Linear(16, 3))
    report = check_trainable(model, {"input_ids": tokens(), "labels": torch.tensor([0, 1, 0])})
    assert kinds(report) == {"classifier_2.weight": "not called", "classifier_2.bias": "not called"}
