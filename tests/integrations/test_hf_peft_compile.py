"""Compiled models after `accelerate`: one graph, and how often PEFT's changes of state make a new one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from .models import assert_close, batch, config, fill, layer_pair, pair, run

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Compiled:
    """The first feed-forward block of a model with two adapters, compiled; counts graphs."""

    def __init__(self, model: peft.PeftModel, gradients: bool, frozen: bool):
        model.add_adapter("b", config(r=3, lora_alpha=2))
        fill(model, "b", seed=9)
        self.model, self.frozen = model.eval(), frozen
        if frozen:
            model.requires_grad_(False)
        self.block = model.get_base_model().model.layers[0].mlp
        self.compiled = torch.compile(self.block, backend="eager", fullgraph=True)
        self.mode = nullcontext if gradients else torch.no_grad

    def new_graphs(self) -> int:
        """Call it; the graphs that this compiled. The result must be the eager one."""
        before = counters["stats"]["unique_graphs"]
        x = torch.linspace(-1, 1, 3 * 7 * 32).view(3, 7, 32)
        with self.mode():
            assert_close({"y": self.compiled(x)}, {"y": self.block(x)}, 1e-5)
        return counters["stats"]["unique_graphs"] - before

    def set_scale(self, scale: float) -> int:
        for module in self.model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", scale)
        return self.new_graphs()

    def activate(self, names) -> int:
        self.model.base_model.set_adapter(names, inference_mode=self.frozen)
        return self.new_graphs()

    def disabled(self) -> int:
        with self.model.disable_adapter():
            return self.new_graphs()

    def merged(self) -> int:
        self.model.merge_adapter()
        graphs = self.new_graphs()
        self.model.unmerge_adapter()
        return graphs + self.new_graphs()

    def story(self) -> dict[str, int]:
        return {
            "first": self.new_graphs(),
            "scales": sum(self.set_scale(scale) for scale in (0.5, 3.0, 0.0, 2.0)),
            "b": self.activate("b"),
            "default": self.activate("default"),
            "both": self.activate(["default", "b"]),
            "default again": self.activate("default"),
            "merged": self.merged(),
            "disabled": self.disabled(),
            "after": self.new_graphs(),
        }


# Without gradients and with frozen factors nothing recompiles but PEFT's own change of requires_grad at the end of
# disable_adapter(). Where PEFT changes requires_grad with every activation, each state is compiled once.
STORIES = {
    "frozen": (
        {"gradients": False, "frozen": True},
        {"first": 1, "scales": 0, "b": 0, "default": 0, "both": 0, "default again": 0, "merged": 0, "disabled": 0,
         "after": 1},
    ),
    "no gradients": (
        {"gradients": False, "frozen": False},
        {"first": 1, "scales": 0, "b": 1, "default": 0, "both": 1, "default again": 0, "merged": 0, "disabled": 1,
         "after": 0},
    ),
    "training": (
        {"gradients": True, "frozen": False},
        {"first": 1, "scales": 0, "b": 1, "default": 1, "both": 1, "default again": 0, "merged": 1, "disabled": 1,
         "after": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STORIES)
def test_graphs_that_a_change_of_state_costs(name):
    how, wanted = STORIES[name]
    oracle, fused = pair("llama")
    assert Compiled(fused, **how).story() == wanted
    if name == "frozen":
        torch._dynamo.reset()
        theirs = Compiled(oracle, **how).story()
        assert theirs["scales"] >= 1 and sum(theirs.values()) >= 8


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_model_is_one_graph(kind):
    _, fused = pair(kind)
    model = fused.get_base_model().eval()
    inputs = {"input_ids": batch(kind)["input_ids"], "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        wanted, got = (call(**inputs).logits for call in (model, compiled))
    assert counters["stats"]["unique_graphs"] == 1
    assert_close({"y": got}, {"y": wanted}, 1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"lora_dropout": 0.3}, {"lora_bias": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_training_is_one_graph(changes):
    _, layer = layer_pair(**changes)
    x = torch.randn(6, 24).to(layer.weight.dtype)
    wanted = run(layer, x)
    got = run(Call(torch.compile(layer, backend="aot_eager", fullgraph=True), layer), x)
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(got, wanted, 1e-2 if layer.weight.dtype == torch.bfloat16 else 1e-5)


def test_a_variant_compiles_as_in_peft():
    oracle, fused = layer_pair(use_dora=True)
    x = torch.randn(6, 24)
    compiled = torch.compile(fused, backend="eager")  # PEFT's DoRA is not one graph
    assert_close({"y": compiled(x)}, {"y": oracle(x)}, 1e-5)


class Call(nn.Module):
    """A compiled layer under its plain parameter names."""

    def __init__(self, call: Callable, layer: nn.Module):
        super().__init__()
        self._call, self._plain = [call], [layer]

    def forward(self, x):
        return self._call[0](x)

    def named_parameters(self, *args, **kwargs):
        return self._plain[0].named_parameters(*args, **kwargs)


def test_autocast_is_one_graph():
    _, layer = layer_pair()
    x = torch.randn(6, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = layer(x), compiled(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, wanted)
    assert_close({"y": compiled(x)}, {"y": layer(x)}, 1e-5)


def test_an_inactive_adapter_may_hold_anything():
    _, layer = layer_pair()
    layer.update_layer("broken", r=2, lora_alpha=2, config=peft.LoraConfig(lora_bias=True))
    for parameter in (*layer.lora_A["broken"].parameters(), *layer.lora_B["broken"].parameters()):
        parameter.data.fill_(float("nan"))
    x = torch.randn(6, 24)
    with torch.no_grad():
        assert_close({"y": torch.compile(layer, backend="eager", fullgraph=True)(x)}, {"y": layer(x)}, 1e-5)
        layer.enable_adapters(False)
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer.base_layer(x))


def test_an_adapter_that_is_active_twice_counts_twice():
    oracle, layer = layer_pair(lora_bias=True)
    for twin in (oracle, layer):
        twin.set_adapter(["default", "default"], inference_mode=True)
    x = torch.randn(6, 24)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert_close({"y": compiled(x)}, {"y": oracle(x)}, 1e-5)
        assert_close({"y": layer(x)}, {"y": oracle(x)}, 1e-5)


def test_merged_and_then_disabled_unmerges_as_peft_does():
    oracle, fused = layer_pair()
    x = torch.randn(20, 24)
    compiled = torch.compile(fused, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        for layer in (oracle, fused):
            layer.merge()
            layer.enable_adapters(False)
        assert torch.equal(compiled(x), oracle(x))
        assert not fused.merged_adapters and not oracle.merged_adapters
        fused.enable_adapters(True)
        assert_close({"y": compiled(x)}, {"y": plain}, 1e-5)


def test_inductor_runs_it():
    _, layer = layer_pair(lora_bias=True)
    layer.update_layer("b", r=3, lora_alpha=6, config=peft.LoraConfig(init_lora_weights=False))
    x = torch.randn(20, 24)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for names in ("default", "b", ["default", "b"], []):
            layer.set_adapter(names, inference_mode=True)
            assert_close({"y": compiled(x)}, {"y": layer(x)}, 1e-5)
    assert counters["stats"]["unique_graphs"] <= 2  # the factors' requires_grad changes once


def test_export_takes_the_operator():
    _, layer = layer_pair()
    x = torch.randn(20, 24)
    with torch.no_grad():
        program = torch.export.export(layer.requires_grad_(False), (x,))
        assert any("lora_linear" in str(node.target) for node in program.graph.nodes)
        assert_close({"y": program.module()(x)}, {"y": layer(x)}, 1e-5)
