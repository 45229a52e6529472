"""LoRALinear and LoRAConv1D: the laws of one layer."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from peftops.nn import LoRALinear
from peftops.nn.adapter import ADAPTER, Adapter
from peftops.nn.lora import LoRALayer, lora_class
from peftops.ops import lora_dropout_mask
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

K, N = 24, 17
KINDS = ("linear", "no bias", "conv1d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def base_layer(kind, dtype=torch.float32, k=K, n=N):
    layer = Conv1D(n, k) if kind == "conv1d" else nn.Linear(k, n, bias=kind == "linear")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer.to(dtype)


def adapted(kind="linear", dtype=torch.float32, rank=5, trained=True, **options):
    options.setdefault("alpha", rank)
    layer = base_layer(kind, dtype)
    layer = lora_class(layer).adapt_(layer, Adapter(rank=rank, **options))
    if trained:
        nn.init.normal_(layer.lora_b.default, std=0.3)
    return layer


def wide(tensor):
    return None if tensor is None else tensor.detach().double()


def single(number):
    """The nearest float32: the operator's scale is a float32 tensor."""
    return torch.tensor(number, dtype=torch.float32).item()


def formula(layer, x, kept=None, p=0.0):
    """The layer's output in float64 from its equation."""
    dropped = x if kept is None else x * kept.view(x.shape) / (1 - p)
    weight = wide(layer.weight).t() if isinstance(layer, Conv1D) else wide(layer.weight)
    low = (
        single(layer.adapters[ADAPTER].scaling)
        * dropped
        @ wide(layer.lora_a.default).t()
        @ wide(layer.lora_b.default).t()
    )
    return F.linear(x, weight, wide(layer.bias)) + low


def close(actual, expected, dtype):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()


# ---- values and gradients --------------------------------------------------------------------------------------------


def test_closed_form():
    linear = nn.Linear(2, 2)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    layer = LoRALinear.from_linear(linear, rank=1, alpha=0.5)
    with torch.no_grad():
        layer.lora_a.default.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_b.default.copy_(torch.tensor([[3.0], [4.0]]))
    assert layer(torch.ones(1, 2)).tolist() == [[4.5, 6.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(K,), (0, K), (3, K), (2, 33, K)])
def test_identity_at_the_start_to_the_last_bit(kind, dtype, shape):
    base = base_layer(kind, dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = base(x)
    layer = lora_class(base).adapt_(base, Adapter(rank=4))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(d, None) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_output_and_gradients_follow_the_formula(kind, dtype, adapter_dtype, p):
    layer = adapted(kind, dtype, alpha=7, dropout=p, adapter_dtype=adapter_dtype)
    x = torch.randn(3, 11, K, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 11, N, dtype=dtype)
    kept = None
    if p:
        torch.manual_seed(7)
        kept = lora_dropout_mask(torch.randint(2**63 - 1, (1,)), 33, K, p)
    torch.manual_seed(7)
    y = layer(x)
    y.backward(upstream)

    oracle = copy.deepcopy(layer).double()
    a, b = (f.default.requires_grad_() for f in (oracle.lora_a, oracle.lora_b))
    x64 = x.detach().double().requires_grad_()
    dropped = x64 if kept is None else x64 * kept.view(x.shape) / (1 - p)
    weight = oracle.weight.t() if kind == "conv1d" else oracle.weight
    expected = F.linear(x64, weight, oracle.bias) + single(7 / 5) * dropped @ a.t() @ b.t()
    expected_grads = torch.autograd.grad(expected, (x64, a, b), upstream.double())

    assert y.dtype == dtype and layer.lora_a.default.grad.dtype == (adapter_dtype or dtype)
    close(y, expected, dtype)
    for actual, grad in zip(
        (x.grad, layer.lora_a.default.grad, layer.lora_b.default.grad), expected_grads, strict=True
    ):
        close(actual, grad, dtype)


def test_only_the_factors_get_gradients_and_at_the_start_only_b():
    layer = adapted(trained=False)
    layer(torch.randn(4, K)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_a.default.grad.abs().max() == 0 and layer.lora_b.default.grad.abs().max() > 0


def test_dropout_only_in_training_and_without_touching_the_generator_otherwise():
    layer = adapted(dropout=0.5)
    x = torch.randn(64, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    state = torch.get_rng_state()
    close(layer(x), formula(layer, x.double()), torch.float32)
    layer.train()
    layer.set_disabled(True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_keeps_x_once_the_low_rank_product_and_a_bit_per_element():
    layer = adapted(dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout=0.1)
    x = torch.randn(64, K, dtype=torch.bfloat16)
    owned = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert kept.pop(x.untyped_storage().data_ptr()) == 2 * x.numel()
    assert (
        sum(size for pointer, size in kept.items() if pointer not in owned)
        <= 4 * 64 * layer.adapters[ADAPTER].rank + x.numel() // 8
    )


# ---- construction ----------------------------------------------------------------------------------------------------


def test_from_linear_shares_the_parameters_and_leaves_the_layer_its_class():
    linear, calls = nn.Linear(K, N).eval(), []
    linear.register_forward_hook(lambda *_: calls.append(1))
    layer = LoRALinear.from_linear(linear, rank=3)
    layer(torch.randn(2, K))
    assert calls == []
    assert type(linear) is nn.Linear and isinstance(layer, nn.Linear) and not layer.training
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert list(linear.state_dict()) == ["weight", "bias"] and linear._modules == {}
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a.default", "lora_b.default"]
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a.default", "lora_b.default"]
    assert layer.adapters[ADAPTER].scaling == 1 and "rank=3" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_gives_the_layer_back(kind):
    base = base_layer(kind)
    before, kind_before, weight = dict(vars(base)), type(base), base.weight
    modules, parameters = list(base._modules), list(base._parameters)
    layer = lora_class(base).adapt_(base, Adapter(rank=3))
    assert layer is base and type(layer) is not kind_before
    assert layer.remove_() is base and type(base) is kind_before and base.weight is weight
    assert vars(base).keys() == before.keys() and not base._buffers and not base._non_persistent_buffers_set
    assert (list(base._modules), list(base._parameters)) == (modules, parameters)


def test_inits_and_scalings():
    a = adapted(rank=400, trained=False).lora_a.default
    assert a.abs().max() <= 1 / math.sqrt(K) and a.abs().max() > 0.95 / math.sqrt(K)
    layer = adapted(rank=400, trained=False, init="gaussian")
    assert layer.lora_a.default.std().item() == pytest.approx(1 / 400, rel=0.05)
    assert layer.lora_b.default.abs().max() == 0
    assert Adapter(rank=16, alpha=8).scaling == 0.5
    assert Adapter(rank=16, alpha=8, use_rslora=True).scaling == 2


def test_one_seed_gives_the_same_factors_in_every_dtype():
    drawn = []
    for dtype in DTYPES:
        base = base_layer("linear", dtype)
        torch.manual_seed(3)
        drawn.append(LoRALinear.adapt_(base, Adapter(rank=4)).lora_a.default)
    assert all(torch.equal(a, drawn[0].to(a.dtype)) for a in drawn)


class Subclass(nn.Linear):
    pass


def integer_weight():
    layer = nn.Linear(K, N)
    layer.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    return layer


def replaced_forward():
    layer = nn.Linear(K, N)
    layer.forward = lambda x: x
    return layer


REFUSED = {
    "a subclass": (lambda: Subclass(K, N), "Subclass is a subclass of Linear"),
    "attention": (lambda: nn.MultiheadAttention(8, 2).out_proj, "NonDynamicallyQuantizableLinear is a subclass"),
    "parametrised": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(K, N)), "is a subclass of Linear"),
    "old weight norm": (lambda: nn.utils.spectral_norm(nn.Linear(K, N)), "weight is computed from other parameters"),
    "integer weight": (integer_weight, "its weight is int8"),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 1), "ConvTranspose1d is neither a linear layer, an embedding nor"),
    "lazy": (lambda: nn.LazyLinear(3), "LazyLinear is a subclass"),
    "replaced forward": (replaced_forward, "forward was replaced on the instance"),
    "adapted already": (lambda: adapted(), "carries an adapter already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_adapted_are_refused(case):
    make, match = REFUSED[case]
    layer = make()
    kind, names = type(layer), [name for name, _ in layer.named_parameters()]
    with pytest.raises(TypeError, match=match):
        LoRALinear.adapt_(layer, Adapter(rank=2))
    with pytest.raises(TypeError, match=match):
        LoRALinear.from_linear(layer, rank=2)
    assert type(layer) is kind and [name for name, _ in layer.named_parameters()] == names


HYPERPARAMETERS = [
    ({"rank": 0}, "rank is 0, but it must be an integer"),
    ({"rank": 2.0}, "rank is 2.0"),
    ({"rank": True}, "rank is True"),
    ({"rank": 2, "alpha": 0}, "alpha is 0, but it must be a positive number"),
    ({"rank": 2, "alpha": math.nan}, "alpha is nan"),
    ({"rank": 2, "dropout": 1.0}, r"dropout is 1.0, but it must be in \[0, 1\)"),
    ({"rank": 2, "dropout": -0.1}, "dropout is -0.1"),
    ({"rank": 2, "init": "svd"}, "init is 'svd', but it must be one of 'kaiming', 'gaussian'"),
    (
        {"rank": 2, "adapter_dtype": torch.bfloat16},
        "adapter_dtype is bfloat16, but over a float32 weight it must be float32",
    ),
]


@pytest.mark.parametrize("options, match", HYPERPARAMETERS)
def test_bad_hyperparameters_are_named_and_change_nothing(options, match):
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match=match):
        LoRALinear.adapt_(linear, Adapter(**options))
    assert type(linear) is nn.Linear and linear.weight.requires_grad


def test_the_classes_are_not_constructed_directly_and_fit_one_kind_of_layer():
    with pytest.raises(TypeError, match="LoRALinear adapts an existing layer"):
        LoRALinear(3, 4)
    with pytest.raises(TypeError, match="adapt_"):
        lora_class(Conv1D(4, 3))(4, 3)
    with pytest.raises(TypeError, match="LoRALinear cannot adapt a Conv1D"):
        LoRALinear.adapt_(Conv1D(4, 3), Adapter(rank=2))


# ---- moves between dtypes and devices --------------------------------------------------------------------------------

MOVES = [  # base dtype, adapter_dtype, conversion, factors afterwards
    (torch.float32, None, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.float64, torch.float64),
    (torch.bfloat16, torch.float32, torch.float16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, None, torch.float32, torch.float32),
]


@pytest.mark.parametrize("dtype, adapter_dtype, target, factors", MOVES)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_conversion_keeps_the_scale_and_float32_factors(kind, dtype, adapter_dtype, target, factors):
    layer = adapted(kind, dtype, rank=3, alpha=1, adapter_dtype=adapter_dtype)
    before = layer.lora_a.default.detach().clone()
    model = nn.Sequential(layer).to(target)
    assert layer.weight.dtype == target and layer.lora_a.default.dtype == layer.lora_b.default.dtype == factors
    assert layer.lora_scale.default.dtype == torch.float32 and layer.lora_scale.default == torch.tensor(1 / 3)
    assert torch.equal(layer.lora_a.default, before.to(factors))
    x = torch.randn(3, K, dtype=target)
    close(model(x), formula(layer, x.double()), target)


def test_meta_device_and_to_empty():
    with torch.device("meta"):
        linear = nn.Linear(K, N)
    layer = LoRALinear.from_linear(linear, rank=3, alpha=1)
    assert layer.lora_a.default.is_meta and layer(torch.empty(2, K, device="meta")).shape == (2, N)
    layer.to_empty(device="cpu")
    trained = adapted(rank=3)
    layer.load_state_dict(trained.state_dict())
    assert layer.lora_scale.default == torch.tensor(1 / 3)
    layer.reset_lora_parameters()
    a = layer.lora_a.default
    assert 0 < a.abs().max() <= 1 / math.sqrt(K) and layer.lora_b.default.abs().max() == 0
    assert torch.equal(layer.weight, trained.weight)


# ---- everything else that a module must survive ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(kind, clone):
    layer = adapted(kind).eval()
    x = torch.randn(3, K)
    expected = layer(x)
    twin = clone(layer)
    assert type(twin) is type(layer) and torch.equal(twin(x), expected)
    nn.init.zeros_(twin.lora_b.default)
    assert torch.equal(layer(x), expected)


def test_state_dict_round_trip():
    source, target = adapted(), adapted()
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compile_without_a_graph_break_gives_the_eager_bits(kind, dropout, fresh_compiler):
    layer, x = adapted(kind, dropout=dropout), torch.randn(33, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (layer, compiled):
        layer.zero_grad()
        torch.manual_seed(1)
        y = call(x)
        y.square().sum().backward()
        grads.append((y.detach(), layer.lora_a.default.grad, layer.lora_b.default.grad))
    assert all(torch.equal(eager, graph) for eager, graph in zip(*grads, strict=True))


def test_compile_inductor(fresh_compiler):
    layer, x = adapted(dropout=0.4).eval(), torch.randn(33, K)
    compiled, expected = torch.compile(layer, fullgraph=True), formula(layer, x.double())
    close(compiled(x), expected, torch.float32)
    layer.merge()
    close(compiled(x), expected, torch.float32)


def test_no_recompilation_when_weights_change_or_the_adapter_is_switched_off_and_on(fresh_compiler):
    layer, x = adapted(dropout=0.1).eval(), torch.randn(33, K)
    frames = []

    def backend(graph, _inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    on = compiled(x)
    layer.set_disabled(True)
    assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))
    layer.set_disabled(False)
    assert torch.equal(compiled(x), on)
    nn.init.normal_(layer.lora_b.default)
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(compiled(x), on)
    assert len(frames) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(reentrant):
    layer = adapted(dropout=0.4)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(2)
        x = torch.linspace(-1, 1, 40 * K).view(40, K).requires_grad_()
        run(x).square().sum().backward()
        grads.append((x.grad, layer.lora_a.default.grad, layer.lora_b.default.grad))
    assert all(torch.equal(plain, replayed) for plain, replayed in zip(*grads, strict=True))


def test_autocast_follows_linear_and_leaves_the_factors_in_float32():
    layer, x = adapted(), torch.randn(20, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer.set_disabled(True)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.set_disabled(False)
    assert y.dtype == torch.bfloat16
    close(y, formula(layer, x.double()), torch.bfloat16)
    y.sum().backward()
    assert layer.lora_a.default.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_double_backward_is_a_clear_error():
    layer, x = adapted(), torch.randn(3, K, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_linear: double backward is not supported"):
        grad.sum().backward()


def test_vmap_is_a_batch():
    layer, x = adapted().eval(), torch.randn(4, 20, K)
    close(torch.func.vmap(layer)(x), formula(layer, x.double()), torch.float32)


def test_inference_mode_and_strided_input():
    layer = adapted()
    x = torch.randn(K, 40).t()[::2]
    with torch.inference_mode():
        close(layer(x), formula(layer, x.double()), torch.float32)


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_sums_in_float32_rounds_once_and_is_undone_to_the_bit(kind, dtype):
    layer = adapted(kind, dtype, alpha=3)
    x = torch.randn(9, K, dtype=dtype)
    base, separate = layer.weight.detach().clone(), layer(x)
    for _ in range(20):
        layer.merge()
        delta = single(3 / 5) * wide(layer.lora_b.default) @ wide(layer.lora_a.default)
        exact = wide(base) + (delta.t() if kind == "conv1d" else delta)
        # One rounding to dtype, and float32's own rounding before it.
        ulp = torch.finfo(dtype).eps * exact.abs() + (1e-6 if dtype != torch.float64 else 1e-14)
        assert ((layer.weight.double() - exact).abs() <= ulp).all()
        once = layer.weight.detach().clone()
        layer.merge()
        assert torch.equal(layer.weight, once)
        layer.unmerge()
        layer.unmerge()
        assert torch.equal(layer.weight, base) and layer._kept is None
    layer.merge()
    close(layer(x), wide(separate), dtype)


def test_merged_forward_is_the_plain_layer_and_modes_change_no_weight():
    layer, x = adapted(dropout=0.5), torch.randn(9, K)
    layer.merge()
    weight = layer.weight.detach().clone()
    for mode in (True, False, True):
        assert torch.equal(layer.train(mode)(x), F.linear(x, weight, layer.bias))
        assert torch.equal(layer.weight, weight)


def test_merge_without_the_base_cannot_be_undone():
    layer = adapted()
    layer.merge(keep_base=False)
    merged = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"base weights were freed by merge\(keep_base=False\)"):
        layer.unmerge()
    assert torch.equal(layer.weight, merged) and layer.merged
    later = adapted()
    later.merge()
    later.merge(keep_base=False)
    with pytest.raises(RuntimeError, match="freed"):
        later.unmerge()


def test_merge_is_not_rounded_by_autocast():
    one, other = adapted(), None
    other = copy.deepcopy(one)
    one.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert torch.equal(one.weight, other.weight)


def test_a_merged_copy_can_be_unmerged():
    layer = adapted()
    base = layer.weight.detach().clone()
    layer.merge()
    twin = pickle.loads(pickle.dumps(layer))
    twin.unmerge()
    assert torch.equal(twin.weight, base) and isinstance(twin, LoRALayer) and layer.merged
