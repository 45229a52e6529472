"""The report of a merge against float64."""

import math

import peft
import peftops
import pytest
import torch
from peftops.methods import merge_report
from peftops.methods.merge_report import (
    LayerError,
    MergeReport,
    OutputChange,
    compare_outputs,
    measure_layer,
    run_probe,
)
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from .models import Block, Net, gpt2, logits, tokens


def merged(dtype, shape=(24, 16), scale=1e-2):
    """A weight, a LoRA update in float64, and the stored sum."""
    before = torch.randn(shape).to(dtype)
    flat = torch.randn(shape[0], 4).double() @ torch.randn(4, math.prod(shape[1:])).double()
    delta = scale * flat.reshape(shape)
    return before, delta, (before.double() + delta).to(dtype)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 16), (6, 4, 3, 3)])
def test_layer_against_float64(dtype, shape):
    before, delta, after = merged(dtype, shape)
    found = measure_layer("layer", before, delta, after)
    error = (after.double() - (before.double() + delta)).abs()
    assert found.largest == pytest.approx(error.max().item()) and found.mean == pytest.approx(error.mean().item())
    assert found.delta == pytest.approx(delta.norm().item())
    assert found.lost == pytest.approx((error.norm() / delta.norm()).item())
    assert found.unchanged == (after == before).double().mean().item()
    assert (found.name, found.dtype, found.elements) == ("layer", dtype, before.numel())
    # Half a unit in the last place of the largest weight at most, and not all of it is zero.
    assert 0 < found.largest <= torch.finfo(dtype).eps / 2 * 2 ** math.ceil(math.log2(after.abs().max().item()))


def test_chunks_change_nothing(monkeypatch):
    parts = merged(torch.bfloat16)
    whole = measure_layer("layer", *parts)
    monkeypatch.setattr(merge_report, "_CHUNK", 7)
    chunked = measure_layer("layer", *parts)
    assert (chunked.largest, chunked.unchanged) == (whole.largest, whole.unchanged)
    assert (chunked.mean, chunked.lost) == pytest.approx((whole.mean, whole.lost))


def test_known_values():
    """1 + 2^-9 is no bfloat16 (its steps above 1 are 2^-7): the whole update is lost; 1 + 2^-7 is one."""
    before = torch.ones(4, dtype=torch.bfloat16)
    delta = torch.tensor([2**-9, 2**-7, 0, 0])
    found = measure_layer("layer", before, delta, (before.float() + delta).bfloat16())
    assert (found.largest, found.mean, found.unchanged) == (2**-9, 2**-11, 0.5)
    assert found.lost == pytest.approx(2**-9 / math.hypot(2**-9, 2**-7))
    # Twice the rounding, as by a sum that is rounded to half the precision first, is seen.
    assert measure_layer("layer", before, delta, before).lost == pytest.approx(1)


@pytest.mark.parametrize(("stored", "lost"), [(0.0, 0.0), (1.0, math.inf)])
def test_no_update(stored, lost):
    zero = torch.zeros(2, 2)
    found = measure_layer("layer", zero, zero, zero + stored)
    assert (found.largest, found.lost, found.unchanged) == (stored, lost, 0.0)


def test_empty_layer_and_values_that_are_not_finite():
    empty = torch.zeros(0, 3)
    assert measure_layer("layer", empty, empty, empty).mean == 0.0
    bad = measure_layer("layer", torch.zeros(2), torch.ones(2), torch.tensor([math.nan, 1.0]))
    assert math.isnan(bad.largest) and math.isnan(bad.lost)
    assert math.isnan(MergeReport((bad, bad)).largest)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"q_proj has before \[2\], delta \[1\], after \[2\]"):
        measure_layer("q_proj", torch.zeros(2), torch.zeros(1), torch.zeros(2))


# ---- output ----------------------------------------------------------------------------------------------------------


def test_change_of_logits_against_float64():
    old, new = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    new[0] = old[0]
    found = compare_outputs(CausalLMOutput(logits=old), CausalLMOutput(logits=new))
    difference = (new - old).double()
    assert found.largest == pytest.approx(difference.abs().max().item())
    assert found.mean == pytest.approx(difference.abs().mean().item())
    assert found.relative == pytest.approx((difference.norm() / old.double().norm()).item())
    p, q = old.double().softmax(-1), new.double().softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert found.changed == (old.argmax(-1) != new.argmax(-1)).double().mean().item() > 0


def test_other_outputs_have_no_divergence():
    old, new = (torch.zeros(3), torch.ones(2, dtype=torch.long)), (torch.ones(3), torch.zeros(2, dtype=torch.long))
    assert compare_outputs(old, new) == OutputChange(1.0, 1.0, math.inf)
    assert compare_outputs(torch.zeros(1, 3), torch.zeros(1, 3), logits=True).kl == 0
    assert compare_outputs({"logits": torch.zeros(1, 3)}, {"logits": torch.zeros(1, 3)}).changed == 0


def test_masked_logits_add_nothing():
    old, new = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 0.0, -math.inf]])
    found = compare_outputs({"logits": old}, {"logits": new})
    unmasked = compare_outputs(old[:, :2], new[:, :2], logits=True)
    assert found.kl == pytest.approx(unmasked.kl) and found.changed == 1.0
    assert (found.largest, found.relative) == (1.0, unmasked.relative)


def test_rows_in_chunks_change_nothing(monkeypatch):
    old, new = torch.randn(5, 6), torch.randn(5, 6)
    whole = compare_outputs(old, new, logits=True)
    monkeypatch.setattr(merge_report, "_CHUNK", 13)
    chunked = compare_outputs(old, new, logits=True)
    assert chunked.kl == pytest.approx(whole.kl) and chunked.changed == whole.changed


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), "no floating tensor"),
        (torch.zeros(2), torch.zeros(3), r"shapes \[\[2\]\] and \[\[3\]\]"),
    ],
)
def test_outputs_that_cannot_be_compared(old, new, message):
    with pytest.raises(ValueError, match=message):
        compare_outputs(old, new)


def test_probe_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    state, values = torch.get_rng_state(), {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(3, 4)
    torch.set_rng_state(state)
    output = run_probe(model, x)
    assert not output.requires_grad and all(module.training for module in model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    torch.testing.assert_close(output, model.eval()(x))


# ---- whole -----------------------------------------------------------------------------------------------------------


def layer(name, lost, elements=10):
    return LayerError(name, torch.bfloat16, elements, lost / 2, lost / 4, 2.0, lost, 0.25)


def test_table_has_the_worst_layer_first():
    report = MergeReport((layer("good", 0.01), layer("bad", 0.5, 30), layer("nan", math.nan)))
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "nan", "bad", "good", "all"]
    assert "50.00%" in lines[2] and "bfloat16" in lines[2]
    report = MergeReport(report.layers[:2], OutputChange(0.5, 0.25, 0.125, 1e-3, 0.02))
    assert report.largest == 0.25 and report.mean == pytest.approx((0.0025 * 10 + 0.125 * 30) / 40)
    assert report.lost == pytest.approx(math.hypot(0.02, 1.0) / math.hypot(2, 2))
    assert str(report).splitlines()[-1] == (
        "output: largest change 0.5, mean 0.25, relative 0.125; KL divergence 0.001 nats, most likely entry changed at "
        "2.00% of positions"
    )


def test_long_tables_are_cut():
    report = MergeReport(tuple(layer(f"layers.{index}", index / 100) for index in range(25)))
    lines = str(report).splitlines()
    assert len(lines) == 1 + 20 + 1 + 1 and lines[-2] == "and 5 more" and lines[1].startswith("layers.24 ")
    assert MergeReport(()).largest == MergeReport(()).mean == MergeReport(()).lost == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gpt2, Block])
def test_a_merge_of_a_whole_model(make, dtype):
    """As a caller uses it, here over the layers of Hugging Face PEFT."""
    targets = ["c_attn", "c_fc"] if make is gpt2 else ["q_proj", "up"]
    model = peft.get_peft_model(
        make().to(dtype).eval(), peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    )
    layers = {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    ids = tokens()
    before = {name: m.base_layer.weight.detach().clone() for name, m in layers.items()}
    deltas = {name: m.get_delta_weight("default").double() for name, m in layers.items()}
    unmerged = run_probe(model, ids)
    model.merge_adapter()
    found = tuple(measure_layer(name, before[name], deltas[name], m.base_layer.weight) for name, m in layers.items())
    report = MergeReport(found, compare_outputs(unmerged, run_probe(model, ids), logits=True))
    assert 0 < report.lost < (1e-5 if dtype == torch.float32 else 5e-2)
    for error, (name, m) in zip(report.layers, layers.items(), strict=True):
        exact = before[name].double() + deltas[name]
        assert error.largest == pytest.approx((m.base_layer.weight.double() - exact).abs().max().item())
    assert report.output.relative < (1e-5 if dtype == torch.float32 else 0.2)
    difference = (logits(model, ids).double() - getattr(unmerged, "logits", unmerged).double()).abs()
    assert report.output.largest == pytest.approx(difference.max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_report_of_a_tuning(dtype):
    """Two active adapters in an embedding, a convolution and a linear layer, against float64."""
    model = Net().to(dtype)
    tuning = peftops.attach(model, peftops.LoRA(target_modules=["embed", "conv", "up"], adapter_dtype=torch.float32))
    tuning.add("other", peftops.LoRA(target_modules=["up"], use_rslora=True, adapter_dtype=torch.float32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    tuning.activate({"default": 1.0, "other": 0.5})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids, state = tokens(), torch.get_rng_state()
    unmerged = run_probe(model, ids)
    report = tuning.merge(report=True, probe=ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert {layer.name for layer in report.layers} == {"embed", "conv", "up"}
    for error in report.layers:
        exact = before[f"{error.name}.weight"].double()
        for name, scaling in (("default", 1.0), ("other", 0.5 * math.sqrt(8))):
            if name == "default" or error.name == "up":
                a, b = (before[f"{error.name}.lora_{x}.{name}"].double().flatten(1) for x in "ab")
                product = scaling * b @ a
                exact = exact + (product.T if error.name == "embed" else product).reshape(exact.shape)
        wrong = (model.get_parameter(f"{error.name}.weight").double() - exact).abs()
        update = (exact - before[f"{error.name}.weight"].double()).norm()
        tolerance = 5e-2 if dtype == torch.float32 else 1e-3  # the float32 products round as well
        assert error.largest == pytest.approx(wrong.max().item(), rel=5 * tolerance)
        assert error.mean == pytest.approx(wrong.mean().item(), rel=tolerance)
        assert error.lost == pytest.approx((wrong.norm() / update).item(), rel=tolerance)
    assert report.output == compare_outputs(unmerged, run_probe(model, ids)) and report.output.largest > 0
    assert tuning.merge() is None
    tuning.unmerge()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
