"""LoRA's own laws, over shapes that no list of samples foresees."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peftops import _C
from peftops.ops import lora_dropout_mask, lora_linear
from peftops.ops.contract import CONTRACTS, Sample
from peftops.testing import derive, dropout_mask, generator
from peftops.testing.gradients import check_gradients
from peftops.testing.laws import assert_linear, assert_rows_independent, assert_rows_permute, assert_zero_rows, split
from peftops.testing.philox import KNOWN_ANSWERS
from peftops.testing.samples import same_bits
from peftops.testing.values import check_exact, check_values
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

CONTRACT = CONTRACTS["peftops::lora_linear"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 97])
RANKS = st.sampled_from([1, 2, 3, 4, 8, 11, 16, 17, 64])

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(m, k, n, r, dtype=torch.float32, factor_dtype=None, bias=True, seed=0, lead=None):
    """x, weight, bias, lora_a, lora_b with results of order one."""
    source = generator(derive(seed, "operands", m, k, n, r))

    def randn(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)

    factor_dtype = factor_dtype or dtype
    return (
        randn(*(lead or (m,)), k),
        randn(n, k, scale=max(k, 1) ** -0.5),
        randn(n) if bias else None,
        randn(r, k, dtype=factor_dtype, scale=max(k, 1) ** -0.5),
        randn(n, r, dtype=factor_dtype, scale=r**-0.5),
    )


@st.composite
def calls(draw):
    """A call of lora_linear: ragged shapes, strides, dtypes, dropout, scale."""
    m, k, n, r = draw(SIZES), draw(SIZES), draw(SIZES), draw(RANKS)
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from([dtype, torch.float32]))
    x, weight, bias, a, b = operands(m, k, n, r, dtype, factors, draw(st.booleans()), draw(st.integers(0, 2**32)))

    def laid_out(t):
        kind = draw(st.sampled_from(["contiguous", "transposed", "sliced"]))
        if kind == "transposed":
            return t.t().contiguous().t()
        if kind == "sliced":
            return torch.nn.functional.pad(t, (draw(st.integers(1, 16)), 3))[:, -3 - t.shape[1] : -3]
        return t

    p = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
    seed = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))]) if p else None
    scale = draw(st.sampled_from([1.0, -0.5, 2.0, 0.3]))
    return Sample((laid_out(x), laid_out(weight), bias, laid_out(a), laid_out(b), scale, p, seed))


@given(calls())
def test_values_of_any_call(seed, sample):
    check_values(CONTRACT, sample, seed)


@given(calls())
def test_gradients_of_any_call(seed, sample):
    check_gradients(CONTRACT, sample, seed)


@given(calls())
def test_exact_on_integers_for_any_call(seed, sample):
    check_exact(CONTRACT, sample, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@given(m=SIZES, k=SIZES, n=SIZES, r=RANKS, bias=st.booleans(), p=st.sampled_from([0.0, 0.3]))
def test_zero_up_projection_is_the_base_linear(dtype, seed, m, k, n, r, bias, p):
    x, weight, bias, a, b = operands(m, k, n, r, dtype, bias=bias, seed=seed)
    a.requires_grad_()
    y = lora_linear(x, weight, bias, a, torch.zeros_like(b), 2.0, p, torch.tensor([1]))
    assert torch.equal(y, linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [True, False])
@given(m=SIZES, k=SIZES, n=SIZES, r=RANKS, bias=st.booleans(), tensor=st.booleans())
def test_zero_scale_is_the_base_linear(dtype, grad, seed, m, k, n, r, bias, tensor):
    x, weight, bias, a, b = operands(m, k, n, r, dtype, bias=bias, seed=seed)
    a = torch.full_like(a, math.nan).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = lora_linear(x, weight, bias, a, b, torch.zeros(()) if tensor else 0.0)
    assert same_bits(y, linear(x, weight, bias))


@given(m=SIZES, k=SIZES, n=SIZES, r=RANKS, scale=st.sampled_from([1.0, 0.25, -3.0]), p=st.sampled_from([0.0, 0.3]))
def test_tensor_scale_gives_the_bits_of_the_number(seed, m, k, n, r, scale, p):
    parts = operands(m, k, n, r, seed=seed)
    key = torch.tensor([3])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            leaves = [t.clone().requires_grad_(grad) for t in parts]
            assert same_bits(lora_linear(*leaves, scale, p, key), lora_linear(*leaves, torch.tensor(scale), p, key))


@pytest.mark.parametrize("which", ["lora_a", "lora_b"])
@given(m=SIZES, k=SIZES, n=SIZES, r=RANKS, p=st.sampled_from([0.0, 0.5]))
def test_linear_in_each_factor(which, seed, m, k, n, r, p):
    x, weight, bias, a, b = operands(m, k, n, r, torch.float64, seed=seed)
    key = torch.tensor([9])

    def function(factor):
        chosen = (factor, b) if which == "lora_a" else (a, factor)
        return lora_linear(x, weight, bias, *chosen, 0.5, p, key)

    assert_linear(function, *split(a if which == "lora_a" else b), bound=1e-12)


@given(m=SIZES, k=SIZES, n=SIZES, r=RANKS)
def test_merged_weight_gives_the_same_output(seed, m, k, n, r):
    x, weight, bias, a, b = operands(m, k, n, r, torch.float64, seed=seed)
    torch.testing.assert_close(
        lora_linear(x, weight, bias, a, b, 0.7), linear(x, weight + 0.7 * b @ a, bias), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_know_their_place(dtype, seed):
    # without the vendor GEMM's part: it may sum the rows at the edge of a block in another order
    x, weight, _, a, b = operands(29, 67, 45, 8, dtype, seed=seed)
    permutation = torch.randperm(29, generator=generator(seed, "rows"))
    with torch.no_grad():
        assert_rows_permute(lambda t: lora_linear(t, torch.zeros_like(weight), None, a, b), x, permutation)


def test_a_batch_is_its_rows(seed):
    x, weight, bias, a, b = operands(29, 67, 45, 8, seed=seed)
    with torch.no_grad():
        # one row takes the few-row kernel, 29 the vendor GEMM: other orders of summation
        assert_rows_independent(lambda t: lora_linear(t, weight, bias, a, b), x, bound=5e-6)


def test_no_rows():
    x, weight, bias, a, b = operands(3, 5, 4, 2)
    assert_zero_rows(lambda t: lora_linear(t, weight, bias, a, b, 1.0, 0.5, torch.tensor([1])), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 150])
def test_thread_count_does_not_change_a_bit_of_the_adapter(dtype, rows, seed):
    # the base product belongs to the vendor GEMM, which promises less: a zero weight takes it out
    x, weight, _, a, b = operands(rows, 259, 131, 9, dtype, seed=seed)
    key, upstream = torch.tensor([5]), torch.randn(rows, 131, generator=generator(seed, "up")).to(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = lora_linear(leaves[0], torch.zeros_like(weight), None, leaves[1], leaves[2], 1.5, 0.2, key)
        with torch.no_grad():
            inference = lora_linear(x, torch.zeros_like(weight), None, a, b, 1.5, 0.2, key)
        results.append([y.detach(), inference, *torch.autograd.grad(y, leaves, upstream)])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert tuple(_C.philox4x32(counter, key)) == words


def test_mask_known_answer():
    # counter 0, key 0 is Random123's first vector: columns 0..7 of row 0
    words = KNOWN_ANSWERS[0][2]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for p in (0.1, 0.5, 0.9):
        assert lora_dropout_mask(torch.tensor([0]), 1, 8, p)[0].tolist() == [
            half >= round(65536 * p) for half in halves
        ]


@given(
    key=st.integers(-(2**63), 2**63 - 1),
    rows=SIZES,
    cols=st.one_of(SIZES, st.integers(0, 300)),
    p=st.one_of(st.sampled_from([0.0, 1e-5, 0.5, 0.99999]), st.floats(0, 1, exclude_max=True)),
)
def test_mask_equals_an_independent_philox(key, rows, cols, p):
    assert torch.equal(lora_dropout_mask(torch.tensor([key]), rows, cols, p), dropout_mask(key, rows, cols, p))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_mask_statistics(p, seed):
    rows, cols = 512, 1000
    mask = lora_dropout_mask(torch.tensor([derive(seed, "mask")]), rows, cols, p).double()

    def sigmas(kept, count):
        return (kept - count * (1 - p)).abs() / math.sqrt(count * p * (1 - p))

    assert sigmas(mask.sum(), rows * cols) < 5
    assert sigmas(mask.sum(0), rows).max() < 6 and sigmas(mask.sum(1), cols).max() < 6
    centred = mask - (1 - p)
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred[:, 8:], centred[:, :-8])):
        assert abs((a * b).mean()) / (p * (1 - p)) * math.sqrt(a.numel()) < 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 50])
def test_dropped_elements_reach_neither_output_nor_gradient(dtype, rows, seed):
    x, weight, _, a, b = operands(rows, 70, 20, 4, dtype, seed=seed)
    key = torch.tensor([derive(seed, "key")])
    kept = lora_dropout_mask(key, rows, 70, 0.5)
    poisoned = torch.where(kept, x, torch.nan)
    weight, a = torch.zeros(20, 70, dtype=dtype), a.requires_grad_()
    clean = lora_linear(x, weight, None, a, b, 1.0, 0.5, key)
    (grad,) = torch.autograd.grad(clean.sum(), a)
    dirty_s = torch.ops.peftops.lora_linear_forward(poisoned, weight, None, a, b, 1.0, None, 0.5, key)[1]
    clean_s = torch.ops.peftops.lora_linear_forward(x, weight, None, a, b, 1.0, None, 0.5, key)[1]
    assert same_bits(dirty_s, clean_s)
    y = lora_linear(poisoned, weight, None, a, b, 1.0, 0.5, key)
    (dirty,) = torch.autograd.grad(y, a, torch.ones_like(y))
    assert same_bits(dirty, grad)


def test_checkpointing_replays_the_mask(seed):
    x, weight, bias, a, b = operands(40, 33, 17, 4, seed=seed)

    def block(x, a, b):
        return lora_linear(x, weight, bias, a, b, 1.0, 0.5, torch.randint(2**62, (1,)))

    def grads(run):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(seed)
        y = run(*leaves)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))

    plain = grads(block)
    again = grads(lambda *leaves: checkpoint(block, *leaves, use_reentrant=False))
    assert all(same_bits(p, q) for p, q in zip(plain, again, strict=True))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("tensor_scale", [False, True])
def test_saved_for_backward_is_x_and_s_and_one_bit_per_element(dtype, p, tensor_scale):
    m, k, n, r = 64, 100, 48, 8
    x, weight, bias, a, b = operands(m, k, n, r, dtype)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, weight, bias, a, b, torch.tensor(2.0) if tensor_scale else 2.0, p, torch.tensor([1]))
    parameters = {t.untyped_storage().data_ptr() for t in (weight, bias, a, b)}
    assert x.untyped_storage().data_ptr() in storages, "x is copied"
    saved = sum(size for pointer, size in storages.items() if pointer not in parameters)
    bits = m * ((k + 7) // 8) if p else 0
    assert saved <= x.untyped_storage().nbytes() + m * r * 4 + bits + (4 if tensor_scale else 0)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("way", ["plain", "checkpoint", "no grad"])
def test_no_leak_over_200_steps(way):
    x, weight, bias, a, b = operands(128, 512, 256, 8)
    a, b = a.requires_grad_(), b.requires_grad_()
    alive = []

    def step():
        inputs = x.clone().requires_grad_()

        def block(t):
            return lora_linear(t, weight, bias, a, b, 1.0, 0.1, torch.tensor([1]))

        if way == "no grad":
            with torch.no_grad():
                y = block(inputs)
        else:
            y = checkpoint(block, inputs, use_reentrant=False) if way == "checkpoint" else block(inputs)
            alive.append(weakref.ref(y.grad_fn))
            y.sum().backward()
        alive.append(weakref.ref(inputs))
        alive.append(weakref.ref(y))
        a.grad = b.grad = None

    for _ in range(40):
        step()
    gc.collect()
    before = resident_bytes()
    for _ in range(200):
        step()
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    # a leak of x or y alone would be 25 MB and more
    assert resident_bytes() - before < 8 * 2**20


# ---- what users do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_float32_factors_keep_their_precision_on_a_16_bit_base(base, seed):
    x, weight, bias, a, b = operands(40, 64, 48, 8, base, torch.float32, seed=seed)
    a, b = a.requires_grad_(), b.requires_grad_()
    y = lora_linear(x, weight, bias, a, b)
    assert y.dtype == base
    y.float().sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
    # a step far below 16-bit resolution of the factor must not be lost
    with torch.no_grad():
        s = torch.ops.peftops.lora_linear_forward(x, weight, bias, a, b, 1.0, None, 0.0, None)[1]
        moved = torch.ops.peftops.lora_linear_forward(x, weight, bias, a * (1 + 2**-14), b, 1.0, None, 0.0, None)[1]
    torch.testing.assert_close(moved - s, s * 2**-14, rtol=0.05, atol=1e-6)


def test_changing_the_scale_tensor_does_not_recompile(seed):
    parts = operands(6, 16, 12, 4, seed=seed)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (1.0, 0.5, 0.0, -2.0):
            assert same_bits(compiled(*parts, torch.tensor(scale)), lora_linear(*parts, torch.tensor(scale)))
    torch._dynamo.reset()


def test_host_offsets_are_64_bit():
    from peftops.testing.laws import assert_offsets

    assert_offsets(_C.offset_of)
