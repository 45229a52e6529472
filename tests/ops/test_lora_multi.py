"""lora_linear_multi's own laws: it is lora_linear, projection by projection, at the cost of one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peftops.ops import lora_dropout_mask, lora_linear, lora_linear_multi
from peftops.ops.contract import CONTRACTS, Sample
from peftops.ops.lora import bytes_of
from peftops.testing import derive, generator
from peftops.testing.gradients import check_gradients
from peftops.testing.samples import same_bits
from peftops.testing.values import check_exact, check_values
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CONTRACT = CONTRACTS["peftops::lora_linear_multi"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = st.sampled_from([0, 1, 2, 7, 16, 17, 33, 64, 65, 97])
SIZES = st.sampled_from([0, 1, 3, 8, 9, 17, 31, 64, 65, 97])
RANKS = st.sampled_from([1, 2, 3, 8, 11, 16, 17, 64, 70])
SCALES = st.sampled_from([1.0, -0.5, 2.0, 0.3, 0.0])

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(m, k, projections, dtype=torch.float32, factor_dtype=None, seed=0):
    """x, weights, biases (every second is None), lora_a, lora_b for (N, r) of each projection; results of order one."""
    source = generator(derive(seed, "operands", m, k, *projections))
    factor_dtype = factor_dtype or dtype

    def randn(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)

    narrow = max(k, 1) ** -0.5
    return (
        randn(m, k),
        [randn(n, k, scale=narrow) for n, _ in projections],
        [randn(n) if j % 2 == 0 else None for j, (n, _) in enumerate(projections)],
        [randn(r, k, dtype=factor_dtype, scale=narrow) for _, r in projections],
        [randn(n, r, dtype=factor_dtype, scale=r**-0.5) for n, r in projections],
    )


@st.composite
def calls(draw):
    """A call of lora_linear_multi: number of projections, ragged shapes, strides, dtypes, dropout, scales."""
    m, k = draw(ROWS), draw(SIZES)
    projections = draw(st.lists(st.tuples(SIZES, RANKS), min_size=1, max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from([dtype, torch.float32]))
    x, weights, biases, a, b = operands(m, k, projections, dtype, factors, draw(st.integers(0, 2**32)))

    def laid_out(t):
        kind = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
        if kind == "transposed":
            return t.t().contiguous().t()
        if kind == "sliced":
            return torch.nn.functional.pad(t, (draw(st.integers(1, 16)), 3))[:, -3 - t.shape[1] : -3]
        return t

    p = draw(st.sampled_from([0.0, 0.1, 0.5]))
    count = len(projections)
    keys = [draw(st.integers(-(2**63), 2**63 - 1)) for _ in range(count)]
    scales = torch.tensor([draw(SCALES) for _ in range(count)])
    lists = ([laid_out(t) for t in tensors] for tensors in (weights, a, b))
    weights, a, b = lists
    return Sample((laid_out(x), weights, biases, a, b, scales, p, torch.tensor(keys) if p else None))


@given(calls())
def test_values_of_any_call(seed, sample):
    check_values(CONTRACT, sample, seed)


@given(calls())
def test_gradients_of_any_call(seed, sample):
    check_gradients(CONTRACT, sample, seed)


@given(calls())
def test_exact_on_integers_for_any_call(seed, sample):
    check_exact(CONTRACT, sample, seed)


# ---- lora_linear, projection by projection ---------------------------------------------------------------------------


def one_by_one(x, weights, biases, lora_a, lora_b, scales, p, seeds):
    return [
        lora_linear(
            x, weights[j], biases[j], lora_a[j], lora_b[j], scales[j], p, None if seeds is None else seeds[j : j + 1]
        )
        for j in range(len(weights))
    ]


def gradients(function, sample, seed):
    """Results, gradient of x, gradients of weights, biases and factors."""
    x, weights, biases, a, b, *rest = sample.args
    leaves = [[t if t is None else t.detach().requires_grad_() for t in ts] for ts in ([x], weights, biases, a, b)]
    ys = function(leaves[0][0], *leaves[1:], *rest)
    wanted = [t for ts in leaves for t in ts if t is not None]
    source = generator(seed, "upstream")
    upstream = [torch.randn(y.shape, generator=source).to(y.dtype) for y in ys]
    return ys, torch.autograd.grad(ys, wanted, upstream)


@given(calls())
def test_results_have_the_bits_of_lora_linear(sample):
    for grad in (True, False):
        x, *rest = sample.args
        x = x.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            for got, wanted in zip(lora_linear_multi(x, *rest), one_by_one(x, *rest), strict=True):
                assert same_bits(got, wanted)


@given(calls())
def test_gradients_of_weights_and_factors_have_the_bits_of_lora_linear(seed, sample):
    ys, (_, *got) = gradients(lora_linear_multi, sample, seed)
    wanted_ys, (_, *wanted) = gradients(one_by_one, sample, seed)
    assert all(same_bits(a, b) for a, b in zip((*ys, *got), (*wanted_ys, *wanted), strict=True))


@given(calls())
def test_forward_keeps_what_lora_linear_keeps(sample):
    x, weights, biases, a, b, scales, p, seeds = sample.args
    _, s, masks = torch.ops.peftops.lora_linear_multi_forward(*sample.args)
    for j, part in enumerate(s.split([t.shape[0] for t in a], dim=1)):
        key = None if seeds is None else seeds[j : j + 1]
        _, wanted, mask = torch.ops.peftops.lora_linear_forward(
            x, weights[j], biases[j], a[j], b[j], 1.0, scales[j], p, key
        )
        assert same_bits(part, wanted)
        assert same_bits(masks[j] if p else masks, mask)


def test_one_projection_is_lora_linear(seed):
    for p in (0.0, 0.4):
        parts = operands(70, 129, [(65, 17)], seed=seed)
        sample = Sample((*parts, torch.tensor([0.5]), p, torch.tensor([7])))
        multi, alone = gradients(lora_linear_multi, sample, seed), gradients(one_by_one, sample, seed)
        assert all(same_bits(a, b) for a, b in zip((*multi[0], *multi[1]), (*alone[0], *alone[1]), strict=True))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_zero_scale_is_the_base_linear(grad, rows, p, seed):
    x, weights, biases, a, b = operands(rows, 20, [(9, 2), (30, 3), (9, 4)], seed=seed)
    a[1] = torch.full_like(a[1], math.nan)
    a = [t.requires_grad_(grad) for t in a]
    with torch.set_grad_enabled(grad):
        ys = lora_linear_multi(x, weights, biases, a, b, torch.tensor([1.0, 0.0, -1.0]), p, torch.tensor([1, 2, 3]))
    assert same_bits(ys[1], linear(x, weights[1], biases[1]))
    assert not same_bits(ys[0], linear(x, weights[0], biases[0])) and all(y.isfinite().all() for y in ys)
    if grad:
        grads = torch.autograd.grad(ys, a, [torch.ones_like(y) for y in ys])
        assert not grads[1].any() and grads[0].any() and grads[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_thread_count_does_not_change_a_bit_of_the_adapters(dtype, p, seed):
    # the base product belongs to the vendor GEMM, which promises less: zero weights take it out
    x, weights, _, a, b = operands(150, 259, [(131, 9), (64, 40), (131, 9)], dtype, seed=seed)
    weights = [torch.zeros_like(weight) for weight in weights]
    sample = Sample((x, weights, [None] * 3, a, b, torch.tensor([1.5, 0.5, 1.0]), p, torch.tensor([5, 6, 7])))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        ys, grads = gradients(lora_linear_multi, sample, seed)
        factors = grads[4:]
        results.append((*ys, grads[0], *factors))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


# ---- independence ----------------------------------------------------------------------------------------------------


def test_each_projection_has_its_own_mask(seed):
    x, weights, biases, a, b = operands(50, 37, [(9, 2), (30, 3), (9, 2)], seed=seed)
    keys = torch.tensor([11, 12, -13])
    *_, masks = torch.ops.peftops.lora_linear_multi_forward(x, weights, biases, a, b, torch.ones(3), 0.5, keys)
    assert masks.shape == (3, 50, 5)
    for mask, key in zip(masks, keys.split(1), strict=True):
        assert torch.equal(mask, bytes_of(lora_dropout_mask(key, 50, 40, 0.5)))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]])
def test_an_unused_result_has_no_part(p, used, seed):
    x, weights, biases, a, b = operands(40, 33, [(9, 2), (30, 3), (9, 4)], seed=seed)
    rest = torch.tensor([1.0, 0.5, -1.0]), p, torch.tensor([1, 2, 3])
    unused = [j for j in range(3) if j not in used]

    def grads(function):
        leaves = [[t.clone().requires_grad_() for t in tensors] for tensors in (weights, a, b)]
        given = x.clone().requires_grad_()
        ys = function(given, leaves[0], biases, *leaves[1:], *rest)
        wanted = [given, *(t for tensors in leaves for t in tensors)]
        return torch.autograd.grad(
            [ys[j] for j in used], wanted, [torch.ones_like(ys[j]) for j in used], allow_unused=True
        )

    got, wanted = grads(lora_linear_multi), grads(one_by_one)
    for place in range(1, 10):
        assert (got[place] is None) == ((place - 1) % 3 in unused)
        assert got[place] is None or same_bits(got[place], wanted[place])
    torch.testing.assert_close(got[0], wanted[0])


def test_an_unused_result_costs_no_work_in_backward(seed):
    x, weights, biases, a, b = operands(40, 33, [(9, 2), (30, 3)], seed=seed)
    a[1] = torch.full_like(a[1], math.nan)
    x = x.requires_grad_()
    ys = lora_linear_multi(x, weights, biases, a, b, torch.ones(2))
    (grad,) = torch.autograd.grad(ys[0].sum(), x)
    assert grad.isfinite().all()


def test_checkpointing_replays_the_masks(seed):
    x, weights, biases, a, b = operands(40, 33, [(17, 4), (9, 2)], seed=seed)

    def block(x, *factors):
        seeds = torch.randint(2**62, (2,))
        return lora_linear_multi(x, weights, biases, factors[:2], factors[2:], torch.ones(2), 0.5, seeds)

    def grads(run):
        leaves = [t.clone().requires_grad_() for t in (x, *a, *b)]
        torch.manual_seed(seed)
        ys = run(*leaves)
        return (*(y.detach() for y in ys), *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves))

    plain = grads(block)
    again = grads(lambda *leaves: checkpoint(block, *leaves, use_reentrant=False))
    assert all(same_bits(p, q) for p, q in zip(plain, again, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [False, True])
def test_saved_for_backward_is_one_x_and_s_and_one_bit_per_element_and_projection(dtype, p, frozen):
    m, k, projections = 64, 100, [(48, 8), (16, 8), (16, 4)]
    x, weights, biases, a, b = operands(m, k, projections, dtype)
    x = x.requires_grad_()
    a, b = ([t.requires_grad_(not frozen) for t in factors] for factors in (a, b))
    scales, storages = torch.ones(3), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear_multi(x, weights, biases, a, b, scales, p, torch.tensor([1, 2, 3]))
    given = {t.untyped_storage().data_ptr() for t in (*weights, *a, *b, scales)}
    assert (x.untyped_storage().data_ptr() in storages) != frozen, "x is copied, or kept for nothing"
    saved = sum(size for pointer, size in storages.items() if pointer not in given)
    kept_x = 0 if frozen else x.untyped_storage().nbytes()
    bits = 3 * m * ((k + 7) // 8) if p else 0
    assert saved <= kept_x + 4 * m * (8 + 8 + 4) + bits


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_changing_the_scales_does_not_recompile(seed):
    x, weights, biases, a, b = operands(20, 16, [(12, 4), (8, 2)], seed=seed)
    x = x.requires_grad_()
    compiled = torch.compile(lora_linear_multi, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scales in ((1.0, 0.5), (0.0, 2.0), (0.0, 0.0), (-2.0, 1.0)):
            results = []
            for function in (compiled, lora_linear_multi):
                ys = function(x, weights, biases, a, b, torch.tensor(scales))
                results.append([*ys, *torch.autograd.grad([y.sum() for y in ys], x)])
            assert all(same_bits(got, wanted) for got, wanted in zip(*results, strict=True))
    torch._dynamo.reset()
