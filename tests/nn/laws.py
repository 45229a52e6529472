"""Laws that hold for a LoRA layer of any kind: each takes a Kind and says what must be true of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peftops.nn.adapter import Adapter, Factors
from peftops.nn.lora import LoRALayer, lora_class
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Kind:
    """base: a fresh layer of torch's. x: an input for it; its dtype counts only where it is a floating one.
    formula: output in float64 of (weight, bias, [(scale, A, B)], x) in float64, differentiable.
    """

    base: Callable[[], nn.Module]
    x: Callable[[torch.dtype], Tensor]
    formula: Callable[[Tensor, Tensor | None, list[tuple[float, Tensor, Tensor]], Tensor], Tensor]
    mergeable: bool = True
    lora_bias: bool = True

    def layer(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        layer = self.base()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
        return layer.to(dtype)

    def adapted(self, dtype: torch.dtype = torch.float32, **options) -> LoRALayer:
        """A layer with a trained adapter."""
        base = self.layer(dtype)
        layer = lora_class(base).adapt_(base, Adapter(**{"rank": 4, "alpha": 6, **options}))
        return train(layer, "default")


def train(layer: LoRALayer, name: str) -> LoRALayer:
    """Random values in all factors of one adapter."""
    with torch.no_grad():
        for parameter in layer.factor_parameters(name).values():
            parameter.normal_(std=0.3)
    return layer


def add(layer: LoRALayer, name: str, **options) -> LoRALayer:
    layer.add_(name, Adapter(**{"rank": 8, "alpha": 2, **options}))
    return train(layer, name)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    difference = (actual.detach().double() - expected.detach().double()).norm()
    assert difference <= TOLERANCE[dtype] * expected.detach().double().norm(), difference / expected.double().norm()


def expected_of(kind: Kind, layer: LoRALayer, x: Tensor, weights: dict[str, float]) -> Tensor:
    """The output in float64 with these adapters from the kind's equation."""
    bias, parts = getattr(layer, "bias", None), []
    bias = None if bias is None else bias.detach().double()
    for name, weight in weights.items():
        scale = torch.tensor(weight * layer.adapters[name].scaling, dtype=torch.float32).item()
        a, b, lora_bias = (None if f is None else f.detach().double() for f in layer.factors(name))
        parts.append((scale, a, b))
        if lora_bias is not None:
            bias = scale * lora_bias + (0 if bias is None else bias)
    return kind.formula(layer.weight.detach().double(), bias, parts, wide(x))


def wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def gradients(layer: LoRALayer, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, then gradients of the factors and of x from one run with a fixed seed and upstream gradient."""
    layer.zero_grad()
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(2)
    y = call(x)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape).to(y.dtype))
    grads = [p.grad for name in layer.adapters for p in layer.factor_parameters(name).values()]
    return [y.detach(), *grads, *([x.grad] if x.is_floating_point() else [])]


# ---- laws ------------------------------------------------------------------------------------------------------------


def identity_at_the_start_to_the_last_bit(kind: Kind) -> None:
    for dtype in DTYPES:
        base, x = kind.layer(dtype), kind.x(dtype)
        expected = base(x)
        layer = lora_class(base).adapt_(base, Adapter(rank=4, lora_bias=kind.lora_bias))
        assert torch.equal(layer(x), expected) and layer(x).requires_grad


def output_and_gradients_follow_the_formula(kind: Kind) -> None:
    pairs = [(dtype, None) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    for dtype, adapter_dtype in pairs:
        layer = kind.adapted(dtype, adapter_dtype=adapter_dtype)
        y, grad_a, grad_b, *grad_x = gradients(layer, layer, kind.x(dtype))
        assert y.dtype == dtype and grad_a.dtype == grad_b.dtype == (adapter_dtype or dtype)
        assert layer.weight.grad is None
        a, b, _ = (None if f is None else f.detach().double().requires_grad_() for f in layer.factors("default"))
        x = wide(kind.x(dtype))
        x = x.requires_grad_() if x.is_floating_point() else x
        bias = getattr(layer, "bias", None)
        bias = None if bias is None else bias.detach().double()
        expected = kind.formula(layer.weight.detach().double(), bias, [(1.5, a, b)], x)
        torch.manual_seed(3)
        expected.backward(torch.randn(expected.shape).to(dtype).double())
        close(y, expected, dtype)
        for actual, oracle in zip((grad_a, grad_b, *grad_x), (a.grad, b.grad, x.grad), strict=False):
            close(actual, oracle, dtype)


def several_active_adapters_add_up_with_their_weights(kind: Kind) -> None:
    layer = add(add(kind.adapted(), "b", use_rslora=True, lora_bias=kind.lora_bias), "c")
    x = kind.x(torch.float32)
    for weights in ({"default": 1.0, "b": 1.0}, {"b": 0.7, "c": 0.3, "default": -2.0}, {"c": 1.0}):
        layer.set_active(weights)
        close(layer(x), expected_of(kind, layer, x, weights), torch.float32)
    layer.delete_("b")
    assert not any(name.endswith(".b") for name in layer.state_dict())
    close(layer(x), expected_of(kind, layer, x, {"c": 1.0}), torch.float32)


def disabled_is_the_base_layer_and_leaves_the_generator_alone(kind: Kind) -> None:
    for dtype in DTYPES:
        layer, x = kind.adapted(dtype, dropout=0.5, lora_bias=kind.lora_bias), kind.x(dtype)
        base = kind.base().to(dtype)
        base.load_state_dict({name: value for name, value in layer.state_dict().items() if "lora" not in name})
        layer.set_disabled(True)
        state = torch.get_rng_state()
        assert torch.equal(layer(x), base(x)) and torch.equal(torch.get_rng_state(), state)
        layer.set_disabled(False)
        assert not torch.equal(layer(x), base(x))


def remove_gives_the_layer_back(kind: Kind) -> None:
    base = kind.layer()
    kind_before, before, weight = type(base), set(vars(base)), base.weight
    layer = lora_class(base).adapt_(base, Adapter(rank=4))
    assert layer is base and type(layer) is not kind_before and isinstance(layer, kind_before)
    assert not weight.requires_grad
    assert layer.remove_() is base and type(base) is kind_before and base.weight is weight
    assert set(vars(base)) == before and "lora" not in str(list(base.state_dict()))


def copies_are_equal_and_independent(kind: Kind) -> None:
    for clone in (copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))):
        layer, x = kind.adapted(), kind.x(torch.float32)
        expected = layer(x)
        twin = clone(layer)
        assert type(twin) is type(layer) and torch.equal(twin(x), expected)
        nn.init.zeros_(twin.lora_b.default)
        assert torch.equal(layer(x), expected) and not torch.equal(twin(x), expected)


def state_dict_round_trip(kind: Kind) -> None:
    source = add(kind.adapted(lora_bias=kind.lora_bias), "b")
    target, x = add(kind.adapted(lora_bias=kind.lora_bias), "b"), kind.x(torch.float32)
    names = [name for name in source.state_dict() if "lora" in name]
    bias = ["lora_bias.default"] if kind.lora_bias else []
    assert sorted(names) == sorted(["lora_a.default", "lora_a.b", "lora_b.default", "lora_b.b", *bias])
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def meta_device_and_to_empty(kind: Kind) -> None:
    with torch.device("meta"):
        base = kind.base()
    layer = lora_class(base).adapt_(base, Adapter(rank=4, alpha=6))
    x = kind.x(torch.float32)
    assert layer.lora_a.default.is_meta and layer(x.to("meta")).is_meta
    layer.to_empty(device="cpu")
    trained = kind.adapted()
    layer.load_state_dict(trained.state_dict())
    assert torch.equal(layer(x), trained(x))
    layer.reset_lora_parameters()
    assert torch.equal(layer(x), super(LoRALayer, layer).forward(x))
    assert layer.lora_a.default.count_nonzero() + layer.lora_b.default.count_nonzero() > 0


def conversion_keeps_float32_factors_and_the_scale(kind: Kind) -> None:
    layer = kind.adapted(adapter_dtype=torch.float32, alpha=1.3)
    layer.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.lora_a.default.dtype == layer.lora_b.default.dtype == torch.float32
    x = kind.x(torch.bfloat16)
    close(layer(x), expected_of(kind, layer, x, {"default": 1.0}), torch.bfloat16)


def compiles_without_a_graph_break_and_recompiles_for_nothing(kind: Kind) -> None:
    torch.compiler.reset()
    layer, x, graphs = add(kind.adapted(lora_bias=kind.lora_bias), "b"), kind.x(torch.float32), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for weights in ({"default": 1.0}, {"b": 1.0}, {"default": 0.3, "b": 2.0}):
        layer.set_active(weights)
        close(compiled(x), layer(x), torch.float32)
        layer.set_disabled(True)
        close(compiled(x), layer(x), torch.float32)
        layer.set_disabled(False)
    train(layer, "default")
    close(compiled(x), layer(x), torch.float32)
    assert len(graphs) == 1


def compiled_gradients_are_the_eager_ones(kind: Kind) -> None:
    torch.compiler.reset()
    layer, x = kind.adapted(dropout=0.3), kind.x(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(gradients(layer, layer, x), gradients(layer, compiled, x), strict=True):
        close(graph, eager, torch.float32)


def checkpointing_replays_the_mask(kind: Kind) -> None:
    layer, x = kind.adapted(dropout=0.4), kind.x(torch.float32)
    plain = gradients(layer, layer, x)
    for reentrant in (False, True)[: 1 + x.is_floating_point()]:
        replayed = gradients(layer, lambda x, mode=reentrant: checkpoint(layer, x, use_reentrant=mode), x)
        assert all(torch.equal(one, other) for one, other in zip(plain, replayed, strict=True))


def autocast_gives_the_base_layers_dtype(kind: Kind) -> None:
    layer, x = kind.adapted(), kind.x(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, base = layer(x), super(LoRALayer, layer).forward(x)
    assert y.dtype == base.dtype
    close(y, expected_of(kind, layer, x, {"default": 1.0}), torch.bfloat16)
    y.sum().backward()
    assert layer.lora_a.default.grad.dtype == torch.float32


def a_merged_layer_gives_the_same_output(kind: Kind) -> None:
    for dtype in DTYPES:
        layer = add(kind.adapted(dtype, lora_bias=kind.lora_bias), "b", use_rslora=True)
        layer.set_active({"default": 1.0, "b": 0.5})
        x = kind.x(dtype)
        expected = layer(x)
        before, delta = layer.weight.detach().clone(), layer.delta_weight("default") + layer.delta_weight("b")
        layer.merge()
        close(layer(x), expected, dtype)
        assert torch.equal(layer.weight, (before + delta).to(dtype)), "summed in float32 and rounded once"
        layer.unmerge()
        assert torch.equal(layer.weight, before) and torch.equal(layer(x), expected)


def twenty_merge_cycles_leave_no_trace(kind: Kind) -> None:
    layer, x = (
        kind.adapted(torch.bfloat16, adapter_dtype=torch.float32, lora_bias=kind.lora_bias),
        kind.x(torch.bfloat16),
    )
    before, expected = copy.deepcopy(layer.state_dict()), layer(x)
    for _ in range(20):
        layer.merge()
        assert layer.merged and not torch.equal(layer.weight, before["weight"])
        layer.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), expected)


def an_init_from_the_weight_keeps_the_sum_and_gives_the_base_back(kind: Kind) -> None:
    for init in ("pissa", "pissa_niter_4", "olora", "orthogonal"):
        for dtype, adapter_dtype in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)):
            base, x = kind.layer(dtype), kind.x(dtype)
            before, expected = base.weight.detach().clone(), base(x)
            layer = lora_class(base).adapt_(base, Adapter(4, 6, init=init, adapter_dtype=adapter_dtype))
            assert torch.equal(layer.weight, before) == (init == "orthogonal")
            close(layer(x), expected, dtype)
            layer.set_disabled(True)
            assert torch.equal(layer(x), expected)
            twin = copy.deepcopy(layer)
            twin.set_disabled(False)
            close(twin(x), expected, dtype)
            assert torch.equal(layer.remove_().weight, before) and torch.equal(twin.remove_().weight, before)


def a_smaller_adapter_swaps_into_a_larger_place(kind: Kind) -> None:
    other, x = kind.adapted(), kind.x(torch.float32)
    base = kind.base()
    base.load_state_dict({name: value for name, value in other.state_dict().items() if "lora" not in name})
    layer = train(lora_class(base).adapt_(base, Adapter(rank=8, alpha=3)), "default")
    values = Factors(*(None if f is None else f.detach() for f in other.factors("default")))
    layer.swap_("default", other.adapters["default"], values)
    close(layer(x), other(x), torch.float32)


def what_is_not_active_has_no_part_in_the_output_not_even_as_nan(kind: Kind) -> None:
    torch.compiler.reset()
    layer, x = kind.adapted(), kind.x(torch.float32)
    layer.add_("broken", Adapter(rank=4, lora_bias=kind.lora_bias))
    with torch.no_grad():
        for parameter in layer.factor_parameters("broken").values():
            parameter.fill_(torch.nan)
    expected, compiled = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")
    for weights in ({"default": 1.0}, {"default": 1.0, "broken": 0.0}):
        layer.set_active(weights)
        close(layer(x), expected.detach().double(), torch.float32)
        layer.zero_grad()
        y = compiled(x)
        close(y, expected.detach().double(), torch.float32)
        y.sum().backward()
        own = layer.factor_parameters("default").values()
        assert all(parameter.grad.isfinite().all() for parameter in own)


LAWS = (
    what_is_not_active_has_no_part_in_the_output_not_even_as_nan,
    identity_at_the_start_to_the_last_bit,
    output_and_gradients_follow_the_formula,
    several_active_adapters_add_up_with_their_weights,
    disabled_is_the_base_layer_and_leaves_the_generator_alone,
    remove_gives_the_layer_back,
    copies_are_equal_and_independent,
    state_dict_round_trip,
    meta_device_and_to_empty,
    conversion_keeps_float32_factors_and_the_scale,
    compiles_without_a_graph_break_and_recompiles_for_nothing,
    compiled_gradients_are_the_eager_ones,
    checkpointing_replays_the_mask,
    autocast_gives_the_base_layers_dtype,
    a_smaller_adapter_swaps_into_a_larger_place,
)
MERGING_LAWS = (
    a_merged_layer_gives_the_same_output,
    twenty_merge_cycles_leave_no_trace,
    an_init_from_the_weight_keeps_the_sum_and_gives_the_base_back,
)
