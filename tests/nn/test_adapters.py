"""Several adapters in one linear layer, and a bias of B."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from peftops.nn import LoRALinear
from peftops.nn.adapter import ADAPTER, Adapter, Factors
from torch import nn
from transformers.pytorch_utils import Conv1D

from .test_lora import DTYPES, KINDS, K, N, adapted, close, formula, single, wide

# ---- a bias of B -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_b_is_scaled_trained_and_merged(kind, dtype):
    layer = adapted(kind, dtype, alpha=7, lora_bias=True)
    x = torch.randn(33, K, dtype=dtype)
    base = F.linear(x, layer._weight(), layer.bias)
    start = LoRALinear.from_linear(nn.Linear(K, N), rank=2, lora_bias=True)
    assert start.lora_bias.default.abs().max() == 0
    nn.init.normal_(layer.lora_bias.default)
    expected = formula(layer, x.double()) + single(7 / 5) * wide(layer.lora_bias.default)
    close(layer(x), expected, dtype)
    layer(x).sum().backward()
    close(layer.lora_bias.default.grad, torch.full((N,), 33 * single(7 / 5), dtype=torch.float64), dtype)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(3):
        layer.merge()
        assert layer.bias is not None
        close(layer(x), expected, dtype)
        layer.unmerge()
        assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())
    layer.set_disabled(True)
    assert torch.equal(layer(x), base)


# ---- several adapters ------------------------------------------------------------------------------------------------


def three(dtype=torch.float32, kind="linear", dropout=0.0):
    """Adapters of different ranks and dtypes of factors, the second with a bias of B, the third not active."""
    layer = adapted(kind, dtype, rank=3, alpha=2, dropout=dropout)
    wider = torch.float32 if dtype in (torch.bfloat16, torch.float16) else None
    layer.add_("wide", Adapter(rank=5, alpha=3, adapter_dtype=wider, lora_bias=True, dropout=dropout))
    layer.add_("off", Adapter(rank=2), capacity=7)
    layer.set_active({"wide": -1.5, ADAPTER: 1.0})
    for parameter in (*layer.lora_b.parameters(), *layer.lora_bias.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return layer


def sum_of(layer, x):
    """The output with every active adapter, in float64."""
    weight = wide(layer.weight).t() if isinstance(layer, Conv1D) else wide(layer.weight)
    y = F.linear(x, weight, wide(layer.bias))
    for name, factor in layer.active.items():
        a, b, bias = (wide(value) for value in layer.factors(name))
        y = y + single(layer.adapters[name].scaling * factor) * F.linear(x @ a.t(), b, bias)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_active_adapters_add_up(kind, dtype):
    layer, x = three(dtype, kind), torch.randn(2, 17, K, dtype=dtype)
    expected = sum_of(layer, x.double())
    close(layer(x), expected, dtype)
    layer(x).square().sum().backward()
    assert layer.lora_a["off"].grad is None and layer.lora_b["wide"].grad is not None
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for _ in range(20):
        layer.merge()
        close(layer(x), expected, dtype)
        layer.unmerge()
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    layer.set_active({})
    assert torch.equal(layer(x), F.linear(x, layer._weight(), layer.bias))


def test_gradients_of_several_adapters_with_and_without_dropout():
    for p in (0.0, 0.5):
        layer, x = three(torch.float64, dropout=p), torch.randn(40, K, dtype=torch.float64)
        torch.manual_seed(5)
        layer(x).square().sum().backward()
        got = {name: (layer.lora_a[name].grad, layer.lora_b[name].grad) for name in layer.active}
        delta = 1e-6
        for name in layer.active:
            for factor, grad in zip((layer.lora_a[name], layer.lora_b[name]), got[name], strict=True):
                values = []
                for sign in (1, -1):
                    with torch.no_grad():
                        factor[0, 0] += sign * delta
                        torch.manual_seed(5)
                        values.append(layer(x).square().sum())
                        factor[0, 0] -= sign * delta
                assert ((values[0] - values[1]) / (2 * delta)).item() == pytest.approx(grad[0, 0].item(), rel=1e-4)


def test_conversion_copies_and_deletion_of_several_adapters():
    layer, x = three(), torch.randn(20, K)
    expected = layer(x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(twin(x), expected)
    assert [parameter.dtype for parameter in three(torch.bfloat16).half().lora_b.parameters()] == [
        torch.float16,
        torch.float32,
        torch.float16,
    ]
    twin.delete_("wide")
    assert list(twin.adapters) == [ADAPTER, "off"] and twin.active == {ADAPTER: 1.0}
    assert list(twin.state_dict()) == ["weight", "bias", *(f"lora_{f}.{n}" for f in "ab" for n in (ADAPTER, "off"))]
    close(twin(x), sum_of(twin, x.double()), torch.float32)


def test_float32_factors_keep_float32_gradients_under_conversion():
    layer = adapted(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    layer(torch.randn(3, K, dtype=torch.bfloat16)).sum().backward()
    layer.half()
    assert layer.lora_b.default.dtype == layer.lora_b.default.grad.dtype == torch.float32


def test_replicas_of_data_parallel_compute_and_pass_gradients_on(monkeypatch):
    """As `nn.DataParallel` makes them, but for the copies to other devices."""
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(
        replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [[t * 1 for t in tensors]] * 2
    )
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    layer, x = three(), torch.randn(20, K)
    outputs = [replica(x) for replica in replicate.replicate(layer, [0, 1])]
    assert all(torch.equal(output, layer(x)) for output in outputs)
    sum(output.sum() for output in outputs).backward()
    shared = [(layer.lora_b[name].grad, layer.lora_a[name].grad) for name in layer.active]
    layer.zero_grad()
    (2 * layer(x).sum()).backward()
    for name, grads in zip(layer.active, shared, strict=True):
        close(grads[0], layer.lora_b[name].grad.double(), torch.float32)
        close(grads[1], layer.lora_a[name].grad.double(), torch.float32)


def test_swap_in_place_and_beyond_the_capacity():
    layer, x = adapted(rank=3), torch.randn(20, K)
    parameter, memory = layer.lora_a.default, layer.lora_a.default.data_ptr()
    layer.swap_(ADAPTER, Adapter(rank=2, alpha=9), Factors(torch.randn(2, K), torch.randn(N, 2)))
    assert layer.lora_a.default.data_ptr() == memory and layer.factors(ADAPTER).a.shape == (2, K)
    close(layer(x), sum_of(layer, x.double()), torch.float32)
    layer.swap_(ADAPTER, Adapter(rank=6, lora_bias=True), Factors(torch.randn(6, K), torch.randn(N, 6), torch.randn(N)))
    assert layer.lora_a.default is parameter and layer.capacity(ADAPTER) == 6
    close(layer(x), sum_of(layer, x.double()), torch.float32)
    layer.swap_(ADAPTER, Adapter(rank=1), Factors(torch.randn(1, K), torch.randn(N, 1)))
    close(layer(x), sum_of(layer, x.double()), torch.float32)
    layer.clear_(ADAPTER)
    close(layer(x), F.linear(x, layer.weight, layer.bias).double(), torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_several_adapters_compile_to_what_eager_gives(dropout, fresh_compiler):
    layer, x = three(dropout=dropout).train(dropout > 0), torch.randn(33, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for active in ({ADAPTER: 1.0, "wide": 2.0}, {"off": 1.0}, {}):
            layer.set_active(active)
            if not dropout:
                close(compiled(x), sum_of(layer, x.double()), torch.float32)
            compiled(x).sum().backward()
        layer.set_disabled(True)
        close(compiled(x), F.linear(x, layer.weight, layer.bias).double(), torch.float32)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_adapter_that_is_not_active_may_hold_nan(dropout, fresh_compiler):
    layer, x = three(dropout=dropout).train(dropout > 0), torch.randn(33, K, requires_grad=True)
    layer.set_active({ADAPTER: 1.0})
    with torch.no_grad():
        for name in ("wide", "off"):
            for parameter in layer.factor_parameters(name).values():
                parameter.fill_(torch.nan)
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        if not dropout:
            close(y, sum_of(layer, x.detach().double()), torch.float32)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert y.isfinite().all() and grad.isfinite().all()
