"""The laws of LoRA with an adapter for each token, over shapes that no list of samples foresees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peftops.ops import grouped_lora_linear, lora_linear
from peftops.ops.contract import CONTRACTS, Sample
from peftops.testing import generator
from peftops.testing.gradients import check_gradients
from peftops.testing.laws import assert_zero_rows
from peftops.testing.samples import same_bits
from peftops.testing.values import check_exact, check_values
from torch.nn.functional import linear

from tests.ops.test_lora import DTYPES, SIZES

CONTRACT = CONTRACTS["peftops::grouped_lora_linear"]
ROWS = st.sampled_from([0, 1, 2, 5, 15, 16, 17, 40, 130])
RANKS = st.sampled_from([1, 2, 3, 8, 11, 16, 17, 70])
ADAPTERS = st.sampled_from([1, 2, 3, 7, 20])
ORDERS = st.sampled_from(["any", "sorted", "one", "all", "none"])

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(m, k, n, r, adapters, dtype=torch.float32, factor_dtype=None, bias=True, seed=0):
    """x, weight, bias, lora_a, lora_b, scales with results of order one."""
    source = generator(seed, "operands", m, k, n, r, adapters)

    def randn(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)

    factor_dtype = factor_dtype or dtype
    return (
        randn(m, k),
        randn(n, k, scale=max(k, 1) ** -0.5),
        randn(n) if bias else None,
        randn(adapters, r, k, dtype=factor_dtype, scale=max(k, 1) ** -0.5),
        randn(adapters, n, r, dtype=factor_dtype, scale=r**-0.5),
        torch.rand(adapters, generator=source) + 0.5,
    )


def ids_of(order, m, adapters, seed=0, dtype=torch.int64):
    """An adapter for each of m tokens: any with -1 among them, sorted, all the same, each in turn, none."""
    source = generator(seed, "ids", m, adapters)
    ids = torch.randint(-1, adapters, (m,), generator=source)
    return {
        "any": ids,
        "sorted": ids.sort().values,
        "one": torch.full((m,), adapters - 1),
        "all": torch.arange(m) % adapters,
        "none": torch.full((m,), -1),
    }[order].to(dtype)


def ranks_of(rank, adapters, seed=0):
    return torch.randint(0, rank + 1, (adapters,), generator=generator(seed, "ranks", rank, adapters))


def one_adapter(x, weight, bias, a, b, scales, adapter, rank=None):
    """`lora_linear` of the whole batch with one adapter alone."""
    return lora_linear(x, weight, bias, a[adapter, :rank], b[adapter, :, :rank], scales[adapter])


def few_row_base(x, weight, bias, a, b):
    """The base product as the plan for few rows sums it: that of an adapter that adds nothing."""
    return lora_linear(x, weight, bias, a[0], torch.zeros_like(b[0]), 1.0)


@st.composite
def calls(draw):
    """A call of grouped_lora_linear: ragged shapes, strides, dtypes, ids, ranks."""
    m, k, n, r, adapters = draw(ROWS), draw(SIZES), draw(SIZES), draw(RANKS), draw(ADAPTERS)
    dtype = draw(st.sampled_from(DTYPES))
    factors, seed = draw(st.sampled_from([dtype, torch.float32])), draw(st.integers(0, 2**32))
    x, weight, bias, a, b, scales = operands(m, k, n, r, adapters, dtype, factors, draw(st.booleans()), seed)

    def laid_out(t):
        kind = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
        if kind == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "sliced":
            return torch.nn.functional.pad(t, (draw(st.integers(1, 16)), 3))[..., -3 - t.shape[-1] : -3]
        return t

    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    ids = ids_of(draw(ORDERS), m, adapters, seed, integer)
    ranks = ranks_of(r, adapters, seed).to(integer) if draw(st.booleans()) else None
    if draw(st.booleans()):
        x, ids = x.unsqueeze(0), ids.unsqueeze(0)
    return Sample((laid_out(x), laid_out(weight), bias, laid_out(a), laid_out(b), scales, ids, ranks))


@given(calls())
def test_exact_on_integers_for_any_call(seed, sample):
    check_exact(CONTRACT, sample, seed)


@given(calls())
def test_values_of_any_call_in_half_precision(seed, sample):
    # in float32 the sums of a few elements say nothing about what an honest error is
    if sample.args[0].dtype != torch.float32:
        check_values(CONTRACT, sample, seed)
        check_gradients(CONTRACT, sample, seed)


# ---- one adapter at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [True, False])
@given(m=ROWS, k=SIZES, n=SIZES, r=RANKS, adapters=ADAPTERS, order=ORDERS, ragged=st.booleans(), wide=st.booleans())
def test_each_row_is_that_of_its_adapter_alone(dtype, grad, seed, m, k, n, r, adapters, order, ragged, wide):
    x, weight, bias, a, b, scales = operands(m, k, n, r, adapters, dtype, torch.float32 if wide else dtype, seed=seed)
    ids, ranks = ids_of(order, m, adapters, seed), ranks_of(r, adapters, seed) if ragged else None
    a.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = grouped_lora_linear(x, weight, bias, a, b, scales, ids, ranks)
        for adapter in range(adapters):
            rank = int(ranks[adapter]) if ragged else r
            if rank:
                wanted = one_adapter(x, weight, bias, a, b, scales, adapter, rank)
                assert same_bits(y[ids == adapter], wanted[ids == adapter])
    real = torch.tensor([r if ranks is None else int(ranks[i]) for i in range(adapters)])[ids] * (ids >= 0)
    few = m <= 16 and not grad and bool(real.any())
    base = few_row_base(x, weight, bias, a, b) if few else linear(x, weight, bias)
    assert same_bits(y[real == 0], base[real == 0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(m=ROWS, k=SIZES, n=SIZES, r=RANKS, adapters=ADAPTERS, order=ORDERS, ragged=st.booleans(), wide=st.booleans())
def test_gradients_are_those_of_one_adapter_at_a_time(dtype, seed, m, k, n, r, adapters, order, ragged, wide):
    parts = operands(m, k, n, r, adapters, dtype, torch.float32 if wide else dtype, seed=seed)
    x, weight, bias, a, b = (t.requires_grad_() for t in parts[:5])
    scales, ids = parts[5], ids_of(order, m, adapters, seed)
    ranks = ranks_of(r, adapters, seed) if ragged else None
    upstream = torch.randn(m, n, generator=generator(seed, "up")).to(dtype)

    y = grouped_lora_linear(x, weight, bias, a, b, scales, ids, ranks)
    grad_x, grad_weight, grad_bias, grad_a, grad_b = torch.autograd.grad(y, (x, weight, bias, a, b), upstream)
    base = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), upstream)
    # the vendor's own gradients belong to the base
    assert same_bits(grad_weight, upstream.t() @ x.detach()) and same_bits(grad_bias, base[2])
    for adapter in range(adapters):
        rank, rows = int(ranks[adapter]) if ragged else r, ids == adapter
        assert not grad_a[adapter, rank:].any() and not grad_b[adapter, :, rank:].any()
        if not rank or not rows.any():
            assert not grad_a[adapter].any() and not grad_b[adapter].any()
            continue
        whole = one_adapter(x, weight, bias, a, b, scales, adapter, rank)
        (wanted_x,) = torch.autograd.grad(whole, x, upstream)
        assert same_bits(grad_x[rows], wanted_x[rows])
        alone = one_adapter(x[rows], weight, bias, a, b, scales, adapter, rank)
        wanted_a, wanted_b = torch.autograd.grad(alone, (a, b), upstream[rows])
        assert same_bits(grad_a[adapter], wanted_a[adapter]) and same_bits(grad_b[adapter], wanted_b[adapter])
    assert same_bits(grad_x[ids < 0], (upstream @ weight.detach())[ids < 0])


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [7, 16, 50])
def test_without_an_adapter_nothing_of_the_adapters_is_read(grad, rows, seed):
    x, weight, bias, a, b, scales = operands(rows, 33, 29, 6, 3, seed=seed)
    nothing = (torch.full_like(a, math.nan).requires_grad_(grad), torch.full_like(b, math.nan))
    wanted = linear(x, weight, bias)
    with torch.set_grad_enabled(grad):
        for scales_, ids, ranks in (
            (scales, ids_of("none", rows, 3), None),
            (torch.zeros(3), ids_of("any", rows, 3), None),
            (scales, ids_of("any", rows, 3), torch.zeros(3, dtype=torch.int64)),
        ):
            assert same_bits(grouped_lora_linear(x, weight, bias, *nothing, scales_, ids, ranks), wanted)
        a[1], b[2], a[0, 4:], b[0, :, 4:] = (math.nan,) * 4
        ids, ranks = ids_of("one", rows, 1), torch.tensor([4, 6, 6])
        y = grouped_lora_linear(x, weight, bias, a, b, scales, ids, ranks)
        assert y.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [13, 16, 90])
def test_permuting_the_tokens_permutes_the_result(dtype, rows, seed):
    # without the vendor GEMM's part: it may sum the rows at the edge of a block in another order
    x, weight, _, a, b, scales = operands(rows, 67, 45, 8, 4, dtype, seed=seed)
    weight, ids = torch.zeros_like(weight), ids_of("any", rows, 4, seed)
    for trial in range(3):
        order = torch.randperm(rows, generator=generator(seed, "rows", trial))
        with torch.no_grad():
            y = grouped_lora_linear(x, weight, None, a, b, scales, ids)
            assert same_bits(grouped_lora_linear(x[order], weight, None, a, b, scales, ids[order]), y[order])
        leaves = [x.clone().requires_grad_(), x[order].clone().requires_grad_()]
        y = grouped_lora_linear(leaves[0], weight, None, a, b, scales, ids)
        moved = grouped_lora_linear(leaves[1], weight, None, a, b, scales, ids[order])
        assert same_bits(moved, y[order])
        (grad,), (grad_moved,) = torch.autograd.grad(y, leaves[0], y), torch.autograd.grad(moved, leaves[1], moved)
        assert same_bits(grad_moved, grad[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_do_not_know_of_each_other(dtype, seed):
    x, weight, bias, a, b, scales = operands(16, 2100, 45, 8, 5, dtype, seed=seed)
    ids = ids_of("any", 16, 5, seed)
    with torch.no_grad():
        whole = grouped_lora_linear(x, weight, bias, a, b, scales, ids)
        for i in range(16):
            if ids[i] >= 0:
                alone = grouped_lora_linear(x[i : i + 1], weight, bias, a, b, scales, ids[i : i + 1])
                assert same_bits(alone, whole[i : i + 1])


# ---- threads, memory, compile ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "adapters"), [(5, 3), (16, 16), (300, 2), (150, 70)])
def test_thread_count_does_not_change_a_bit_of_the_adapters(dtype, rows, adapters, seed):
    # the base product belongs to the vendor GEMM, which promises less: a zero weight takes it out
    x, weight, _, a, b, scales = operands(rows, 259, 131, 9, adapters, dtype, seed=seed)
    weight, ids = torch.zeros_like(weight), ids_of("any", rows, adapters, seed)
    upstream = torch.randn(rows, 131, generator=generator(seed, "up")).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = grouped_lora_linear(leaves[0], weight, None, *leaves[1:], scales, ids)
        with torch.no_grad():
            inference = grouped_lora_linear(x, weight, None, a, b, scales, ids)
        results.append([y.detach(), inference, *torch.autograd.grad(y, leaves, upstream)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


def test_no_rows():
    x, weight, bias, a, b, scales = operands(3, 5, 4, 2, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert_zero_rows(lambda t: grouped_lora_linear(t, weight, bias, a, b, scales, none), x)


def test_saved_for_backward_is_x_and_s():
    m, k, n, r = 64, 100, 48, 8
    x, weight, bias, a, b, scales = operands(m, k, n, r, 4, torch.bfloat16)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    ids, ranks, storages = ids_of("any", m, 4), torch.full((4,), r), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_lora_linear(x, weight, bias, a, b, scales, ids, ranks)
    given = {t.untyped_storage().data_ptr() for t in (weight, bias, a, b, scales, ids, ranks)}
    assert x.untyped_storage().data_ptr() in storages, "x is copied"
    saved = sum(size for pointer, size in storages.items() if pointer not in given)
    assert saved == x.untyped_storage().nbytes() + m * r * 4


@pytest.mark.parametrize("grad", [True, False])
def test_changing_ids_scales_and_ranks_does_not_recompile(grad, seed):
    x, weight, bias, a, b, scales = operands(24, 16, 12, 4, 3, seed=seed)
    a.requires_grad_(grad)
    compiled = torch.compile(grouped_lora_linear, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for trial, order in enumerate(("any", "sorted", "one", "none", "all")):
            args = (x, weight, bias, a, b, scales * (trial - 1), ids_of(order, 24, 3, trial), ranks_of(4, 3, trial))
            assert same_bits(compiled(*args), grouped_lora_linear(*args))
    torch._dynamo.reset()


def test_a_refused_id_leaves_everything_as_it_was(seed):
    x, weight, bias, a, b, scales = operands(20, 16, 12, 4, 3, seed=seed)
    ids = ids_of("any", 20, 3, seed)
    ids[7] = 3
    before = [t.clone() for t in (x, weight, bias, a, b, scales, ids)]
    for grad in (True, False):
        a.requires_grad_(grad)
        with pytest.raises(
            RuntimeError, match=r"^grouped_lora_linear: adapter_ids\[7\] is 3, but lora_a has 3 adapters"
        ):
            grouped_lora_linear(x, weight, bias, a, b, scales, ids)
    assert all(same_bits(t, u) for t, u in zip((x, weight, bias, a, b, scales, ids), before, strict=True))
