"""LoRAEmbedding: the laws of a layer, PEFT's layer, and what an embedding has that others have not."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Embedding as PeftEmbedding
from peftops.nn.adapter import Adapter
from peftops.nn.embedding import LoRAEmbedding
from peftops.nn.lora import why_not
from torch import nn

from . import laws

V, D, PAD = 29, 12, 3


def ids(*shape):
    """Ids of which some repeat; the first is the padding's."""
    drawn = torch.randint(V, shape, generator=torch.Generator().manual_seed(1))
    drawn.view(-1)[:2] = PAD
    return drawn


def formula(padding_idx=None, scale_grad_by_freq=False):
    def equation(weight, _bias, parts, x):
        y = F.embedding(x, weight)
        for scale, a, b in parts:
            y = y + scale * F.embedding(x, a.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq) @ b.t()
        return y

    return equation


def kind(shape=(5, 7), **options):
    equation = formula(**{key: value for key, value in options.items() if key != "sparse"})
    return laws.Kind(lambda: nn.Embedding(V, D, **options), lambda _dtype: ids(*shape), equation, lora_bias=False)


KINDS = {
    "plain": kind(),
    "padding": kind(padding_idx=PAD),
    "by frequency": kind(scale_grad_by_freq=True, padding_idx=PAD),
    "sparse": kind(sparse=True),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("law", laws.LAWS + laws.MERGING_LAWS, ids=lambda law: law.__name__)
def test_law(law, name, one_thread):
    law(KINDS[name])


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def peft_twin(layer, **options):
    """PEFT's layer with the same numbers."""
    adapter = layer.adapters["default"]
    base = nn.Embedding(layer.num_embeddings, D, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
    base.weight.data = layer.weight.detach().clone()
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, use_rslora=adapter.use_rslora, **options)
    twin = PeftEmbedding(base, "default", config, r=adapter.rank, lora_alpha=adapter.alpha)
    for held, value in zip((twin.lora_embedding_A, twin.lora_embedding_B), layer.factors("default")[:2], strict=True):
        held.default.data = value.detach().clone()
    return twin


@pytest.mark.parametrize("name", ["plain", "padding", "by frequency"])
@pytest.mark.parametrize("dtype, adapter_dtype", [(torch.float32, None), (torch.bfloat16, torch.float32)])
def test_output_gradients_and_merged_weight_are_those_of_peft(name, dtype, adapter_dtype):
    # Dropout is ignored by both.
    layer = KINDS[name].adapted(dtype, adapter_dtype=adapter_dtype, use_rslora=True, dropout=0.5)
    twin = peft_twin(layer, lora_dropout=0.5)
    x = ids(4, 9)
    ours, theirs = layer(x), twin(x)
    laws.close(ours, theirs, dtype)
    upstream = torch.randn(ours.shape).to(dtype)
    ours.backward(upstream)
    theirs.backward(upstream)
    for parameter, peft in zip(
        layer.factor_parameters("default").values(),
        (twin.lora_embedding_A.default, twin.lora_embedding_B.default),
        strict=True,
    ):
        laws.close(parameter.grad, peft.grad, torch.float32)
    laws.close(layer.delta_weight("default"), twin.get_delta_weight("default"), torch.float32)


def test_starts_as_in_peft():
    base = nn.Embedding(4000, 24)
    for init in ("kaiming", "gaussian"):
        layer = LoRAEmbedding.from_embedding(base, rank=16, init=init)
        b = layer.lora_b.default
        assert layer.lora_a.default.count_nonzero() == 0 and abs(b.mean()) < 0.2 and abs(b.std() - 1) < 0.1
    twin = peft_twin(laws.Kind(lambda: nn.Embedding(V, D), lambda _: ids(3), formula()).adapted())
    twin.reset_lora_parameters("default", True)
    assert twin.lora_embedding_A.default.count_nonzero() == 0 and twin.lora_embedding_B.default.std() > 0.5


def test_peft_has_no_sparse_gradient_of_a_either():
    """`sparse` breaks PEFT's backward: a sparse gradient of the transposed A has no form that torch supports."""
    layer = KINDS["sparse"].adapted()
    twin = peft_twin(layer)
    twin.base_layer.sparse = True
    with pytest.raises((RuntimeError, NotImplementedError)):
        twin(ids(3)).sum().backward()
    layer(ids(3)).sum().backward()
    assert layer.lora_a.default.grad.layout == torch.strided


# ---- an embedding's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (6,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_shape_of_ids(shape, dtype):
    x = torch.randint(V, shape, dtype=dtype)
    layer = KINDS["padding"].adapted()
    y = layer(x)
    assert y.shape == (*shape, D)
    torch.testing.assert_close(
        y, layer.weight[x.long()] + 1.5 * (layer.lora_a.default.t()[x.long()] @ layer.lora_b.default.t())
    )


def test_padding_gets_no_gradient_and_so_keeps_its_vector():
    base = nn.Embedding(V, D, padding_idx=PAD)
    layer = LoRAEmbedding.from_embedding(base, rank=4)
    optimizer = torch.optim.SGD([layer.lora_a.default, layer.lora_b.default], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(ids(40)).square().sum().backward()
        assert layer.lora_a.default.grad[:, PAD].count_nonzero() == 0 < layer.lora_a.default.grad.count_nonzero()
        optimizer.step()
    assert torch.equal(layer(torch.tensor([PAD])), torch.zeros(1, D))


def test_ids_outside_the_table_are_refused_as_by_the_base():
    layer = KINDS["plain"].adapted()
    for bad in (V, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([bad]))


def allocated(call):
    """Bytes that a call allocates in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)


@pytest.mark.parametrize("padding_idx", [None, PAD])
def test_a_step_makes_one_dense_gradient_and_nothing_else_of_the_tables_size(padding_idx):
    vocabulary, rank = 20_000, 4
    base = nn.Embedding(vocabulary, D, padding_idx)
    layer = laws.train(LoRAEmbedding.from_embedding(base, rank=rank), "default")
    x, table, steps = ids(6), 4 * rank * vocabulary, {}
    for name, module in (("ours", layer), ("PEFT", peft_twin(layer))):
        y = []
        steps[name] = allocated(lambda m=module, y=y: y.append(m(x))), allocated(lambda y=y: y[0].sum().backward())
    forward, backward = steps["ours"]
    assert forward < 0.05 * table, "neither [V, d] nor a transposed A"
    assert table <= backward < 1.05 * table
    assert steps["PEFT"][1] > 1.9 * table
    assert layer.lora_a.default.grad.stride() == layer.lora_a.default.stride()


# ---- construction ----------------------------------------------------------------------------------------------------


def test_from_embedding_shares_the_weight_and_leaves_the_layer_its_class():
    base = nn.Embedding(V, D, padding_idx=PAD, scale_grad_by_freq=True, sparse=True).eval()
    layer = LoRAEmbedding.from_embedding(base, rank=4, alpha=8, use_rslora=True)
    assert type(base) is nn.Embedding and layer.weight is base.weight and not layer.training
    assert (layer.padding_idx, layer.scale_grad_by_freq, layer.sparse) == (PAD, True, True)
    assert layer.adapters == {"default": Adapter(4, 8, use_rslora=True)} and "padding_idx=3" in repr(layer)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_a.default", "lora_b.default"]


def test_a_tied_head_keeps_its_weight_and_its_output():
    embedding, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    x = torch.randn(3, D)
    expected = head(x)
    layer = laws.train(LoRAEmbedding.adapt_(embedding, Adapter(rank=4)), "default")
    assert layer.weight is head.weight and torch.equal(head(x), expected)
    layer(ids(5)).sum().backward()
    assert head.weight.grad is None


class ScaledWordEmbedding(nn.Embedding):
    def forward(self, x):
        return 4 * super().forward(x)


def test_subclasses_are_refused():
    message = "ScaledWordEmbedding is a subclass of Embedding"
    assert message in why_not(ScaledWordEmbedding(V, D))
    with pytest.raises(TypeError, match=message):
        LoRAEmbedding.from_embedding(ScaledWordEmbedding(V, D), rank=2)


@pytest.mark.parametrize(
    "options, adapter, message",
    [
        ({"max_norm": 1.5}, {}, "its max_norm is 1.5, which rewrites the weight in every forward"),
        ({}, {"lora_bias": True}, "lora_bias is for linear layers and convolutions"),
        ({}, {"init": "pissa", "rank": D + 1}, r"rank is 13, but init 'pissa' has no more than min\(12, 29\)"),
    ],
)
def test_what_an_embedding_cannot_have_is_named_and_changes_nothing(options, adapter, message):
    base = nn.Embedding(V, D, **options)
    with pytest.raises(ValueError, match=message):
        LoRAEmbedding.adapt_(base, Adapter(**adapter))
    assert type(base) is nn.Embedding and base.weight.requires_grad
