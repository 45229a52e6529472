"""`LoRAFusedLinear` gives what its projections give one by one."""

import copy
import pickle

import peftops
import pytest
import torch
from peftops.nn import LoRAFusedLinear, LoRALinear, fused
from torch import nn
from torch.utils.checkpoint import checkpoint

from .laws import train
from .sharing import assert_same, train_step


@pytest.fixture
def calls(monkeypatch):
    """The number of projections of each call for several."""
    found, real = [], fused.lora_linear_multi

    def counted(x, weights, *rest):
        found.append(len(weights))
        return real(x, weights, *rest)

    monkeypatch.setattr(fused, "lora_linear_multi", counted)
    return found


def layers(dtype=torch.float32, trained=True, **options):
    """A fused layer of three projections with different widths, ranks and scales."""
    torch.manual_seed(1)
    linears = [nn.Linear(20, width, bias=width != 8, dtype=dtype) for width in (16, 8, 24)]
    parts = [
        LoRALinear.from_linear(linear, rank=rank, alpha=3 + rank, **options)
        for linear, rank in zip(linears, (4, 2, 7), strict=True)
    ]
    for part in parts:
        if trained:
            train(part, "default")
    return LoRAFusedLinear(parts)


def one_by_one(fused, x):
    return [layer(x) for layer in fused.projections]


def compare(fused, x, tolerance=1e-5, **how):
    """One step of the fused layer against one of its projections, called one by one."""
    x = x.clone().requires_grad_()
    parameters = {"x": x, **dict(fused.named_parameters())}
    expected = train_step(lambda: torch.cat(one_by_one(fused, x), -1), parameters)
    got = train_step(lambda: torch.cat(fused(x), -1), parameters)
    assert_same(got, expected, tolerance=tolerance, **how)
    return got


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float64, None)],
    ids=str,
)
def test_as_the_projections_one_by_one(calls, p, dtype, factors):
    fused = layers(dtype, dropout=p, adapter_dtype=factors)
    x = torch.randn(2, 9, 20).to(dtype)
    compare(fused, x, {torch.bfloat16: 2e-2, torch.float64: 1e-12}.get(dtype, 1e-5))
    assert calls == [3]
    with torch.no_grad():
        for rows in (x, x[:1, :1], x[:0], x[0, 0]):
            assert all(map(torch.equal, fused.eval()(rows), one_by_one(fused, rows)))
    assert len(calls) == 5


def test_the_start_is_the_base_to_the_bit(calls):
    fused, x = layers(trained=False, dropout=0.5), torch.randn(5, 20)
    expected = [nn.functional.linear(x, layer.weight, layer.bias) for layer in fused.projections]
    assert all(map(torch.equal, fused(x), expected)) and calls == [3]


def test_from_linears_and_names():
    linears = [nn.Linear(6, 5), nn.Linear(6, 3, bias=False)]
    fused = LoRAFusedLinear.from_linears(linears, rank=2, dropout=0.1)
    assert [layer.weight for layer in fused.projections] == [linear.weight for linear in linears]
    assert "projections.1.lora_b.default" in fused.state_dict() and type(linears[0]) is nn.Linear
    assert [y.shape for y in fused(torch.randn(2, 6))] == [(2, 5), (2, 3)]


def test_attach_finds_the_projections(calls):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = LoRAFusedLinear([nn.Linear(8, 8) for _ in range(3)])

        def forward(self, x):
            return sum(self.qkv(x))

    model, x = Attention(), torch.randn(4, 8)
    expected = model(x)
    assert not calls
    tuning = peftops.attach(model, peftops.LoRA(rank=2))
    assert torch.equal(model(x), expected) and calls == [3]
    with tuning.disabled():
        assert torch.equal(model(x), expected)
    tuning.merge()
    model(x)
    tuning.unmerge()
    assert len(calls) == 1
    tuning.detach()
    assert torch.equal(model(x), expected) and len(calls) == 1


def _hook(fused):
    fused.projections[1].register_forward_hook(lambda module, args, y: 2 * y)


def _rates(fused):
    fused.projections[0].adapters["default"] = peftops.nn.adapter.Adapter(rank=4, alpha=7, dropout=0.2)


def _second(fused):
    for layer in fused.projections:
        layer.add_("b", peftops.nn.adapter.Adapter(rank=3))
        train(layer, "b")
        layer.set_active({"default": 1.0, "b": 0.5})


CHANGES = {
    "a hook": _hook,
    "other dropout": _rates,
    "two active adapters": _second,
    "one is off": lambda fused: fused.projections[2].set_active({}),
    "one is merged": lambda fused: fused.projections[0].merge(),
    "one is plain": lambda fused: fused.projections[1].remove_(),
    "one in float64": lambda fused: fused.projections[1].lora_a.double() and fused.projections[1].lora_b.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_one_call_cannot_say_goes_layer_by_layer(calls, change):
    fused, x = layers(dropout=0.1), torch.randn(6, 20)
    CHANGES[change](fused)
    if change == "one in float64":
        with pytest.raises(RuntimeError, match="lora_linear: lora_a has dtype float64"):
            fused(x)
    else:
        compare(fused, x, exact=("y", "next number"))
    assert not calls


def test_dtypes_of_the_call(calls):
    fused, x = layers(dropout=0.2), torch.randn(7, 20)
    with torch.autocast("cpu", torch.bfloat16):
        compare(fused, x, 2e-2)
    assert calls == [3]
    with pytest.raises(RuntimeError):
        fused(x.double())
    assert calls == [3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_masks(reentrant):
    fused, x = layers(dropout=0.4), torch.randn(40, 20, requires_grad=True)  # more than the few-row kernels take
    parameters = {"x": x, **dict(fused.named_parameters())}
    expected = train_step(lambda: torch.cat(fused(x), -1), parameters)
    expected = {name: value.clone() for name, value in expected.items()}
    got = train_step(lambda: checkpoint(lambda x: torch.cat(fused(x), -1), x, use_reentrant=reentrant), parameters)
    assert_same(got, expected, exact=expected)


def test_copies():
    fused, x = layers(), torch.randn(3, 20)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert all(map(torch.equal, other(x), fused(x)))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in fused.parameters()}


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_in_one_graph():
    fused, x = layers(dropout=0.3), torch.randn(4, 20, requires_grad=True)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.cat(compiled(x), -1).square().sum().backward() is None and x.grad is not None
    compiled.eval()
    with torch.no_grad():
        first = compiled(x)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, one_by_one(fused, x), strict=True))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for layer in fused.projections:
                layer.set_active({"default": 0.5})
            assert not torch.allclose(compiled(x)[0], first[0])
            layer.set_disabled(True)
            assert torch.equal(compiled(x)[2], nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ([nn.Linear(3, 4), nn.ReLU()], TypeError, r"projections\[1\] is a ReLU, but it must be an nn.Linear"),
        ([nn.Linear(3, 4), nn.Linear(4, 4)], ValueError, r"projections have in_features \[3, 4\], but these must be"),
        ([], ValueError, r"projections have in_features \[\], .* of at least one layer"),
    ],
)
def test_wrong_projections(given, error, match):
    with pytest.raises(error, match=match):
        LoRAFusedLinear(given)
