"""The packed weight's own laws: its layout, and what is the same as on the weight itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peftops.ops import lora_linear, lora_linear_packed, pack_weight
from peftops.ops.contract import CONTRACTS, Sample
from peftops.ops.lora_packed import _only_cpu, reference_pack
from peftops.testing import derive, generator
from peftops.testing.laws import assert_rows_permute
from peftops.testing.samples import same_bits
from peftops.testing.values import check_exact, check_values
from torch.nn.functional import linear

CONTRACT = CONTRACTS["peftops::lora_linear_packed"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 97])
RANKS = st.sampled_from([0, 1, 2, 3, 4, 8, 11, 16, 17, 64])
ONE = torch.ones(())

pytestmark = pytest.mark.usefixtures("one_thread")


def operands(m, k, n, r, dtype=torch.float32, factor_dtype=None, bias=True, seed=0):
    """x, weight, bias, lora_a, lora_b with results of order one."""
    source = generator(derive(seed, "packed", m, k, n, r))

    def randn(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)

    factor_dtype = factor_dtype or dtype
    return (
        randn(m, k),
        randn(n, k, scale=max(k, 1) ** -0.5),
        randn(n) if bias else None,
        randn(r, k, dtype=factor_dtype, scale=max(k, 1) ** -0.5),
        randn(n, r, dtype=factor_dtype, scale=max(r, 1) ** -0.5),
    )


def packed_call(x, weight, bias, a, b, scale=ONE):
    return lora_linear_packed(x, pack_weight(weight), bias, a, b, scale, weight.shape[0])


# ---- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_layout_known_answer(dtype):
    packed = pack_weight(torch.arange(17 * 3).to(dtype).view(17, 3))
    assert packed.shape == (2, 2, 16, 2) and packed.dtype == dtype
    # pairs along K, sixteen rows side by side; the third column is alone in its pair, the seventeenth row in its block
    assert packed[0, 0].tolist() == [[3 * j, 3 * j + 1] for j in range(16)]
    assert packed[0, 1].tolist() == [[3 * j + 2, 0] for j in range(16)]
    assert packed[1, 0].tolist() == [[48, 49]] + [[0, 0]] * 15
    assert packed[1, 1].tolist() == [[50, 0]] + [[0, 0]] * 15


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@given(n=SIZES, k=st.one_of(SIZES, st.integers(0, 300)), layout=st.sampled_from(["rows", "columns", "slice"]))
def test_packing_moves_every_bit(dtype, seed, n, k, layout):
    size = dtype.itemsize * 8
    bits = torch.randint(-(2 ** (size - 1)), 2 ** (size - 1) - 1, (n + 3, k + 5), generator=generator(seed, n, k))
    weight = bits.to({16: torch.int16, 32: torch.int32, 64: torch.int64}[size]).view(dtype)
    weight = weight[3:, 5:] if layout == "slice" else weight[:n, :k].contiguous()
    weight = weight.t().contiguous().t() if layout == "columns" else weight
    assert same_bits(pack_weight(weight), reference_pack(weight))


# ---- the product -----------------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """A call of lora_linear_packed: ragged shapes, dtypes, scale."""
    m, k, n, r = draw(SIZES), draw(SIZES), draw(SIZES), draw(RANKS)
    dtype = draw(st.sampled_from(DTYPES))
    factors = draw(st.sampled_from([dtype, torch.float32]))
    x, weight, bias, a, b = operands(m, k, n, r, dtype, factors, draw(st.booleans()), draw(st.integers(0, 2**32)))
    scale = torch.tensor(draw(st.sampled_from([1.0, -0.5, 2.0, 0.0])))
    return Sample((x, pack_weight(weight), bias, a, b, scale, n))


@given(calls())
def test_values_of_any_call(seed, sample):
    check_values(CONTRACT, sample, seed)


@given(calls())
def test_exact_on_integers_for_any_call(seed, sample):
    check_exact(CONTRACT, sample, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1000, 5003])
def test_long_sums_obey_the_law(dtype, k, seed):
    x, weight, bias, a, b = operands(9, k, 50, 8, dtype, seed=seed)
    check_values(CONTRACT, Sample((x, pack_weight(weight), bias, a, b, ONE, 50)), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", ["as x", torch.float32])
@given(m=SIZES, k=SIZES, n=SIZES, r=st.sampled_from([1, 2, 5, 8, 16, 17]), bias=st.booleans())
def test_packed_is_the_linear_on_the_weight_itself(dtype, factors, seed, m, k, n, r, bias):
    factor_dtype = dtype if factors == "as x" else factors
    x, weight, bias, a, b = operands(m, k, n, r, dtype, factor_dtype, bias, seed)
    with torch.no_grad():
        plain = lora_linear(x, weight, bias, a, b, 0.5)
    # two roundings of sums of order one
    bound = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    torch.testing.assert_close(packed_call(x, weight, bias, a, b, ONE / 2), plain, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("factors", ["as x", torch.float32])
def test_a_row_does_not_know_the_rows_beside_it(dtype, factors, seed):
    """The same bits in a batch of any size, at any place: below and above 64 rows, in strips of every size."""
    factor_dtype = dtype if factors == "as x" or dtype == torch.float64 else factors
    x, weight, bias, a, b = operands(150, 1337, 83, 9, dtype, factor_dtype, seed=seed)
    whole = packed_call(x, weight, bias, a, b)
    for rows in (1, 2, 3, 4, 5, 8, 13, 16, 17, 31, 64, 65, 127):
        assert same_bits(packed_call(x[:rows], weight, bias, a, b), whole[:rows]), rows
        assert same_bits(packed_call(x[-rows:], weight, bias, a, b), whole[-rows:]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_permute(dtype, seed):
    x, weight, bias, a, b = operands(29, 67, 45, 8, dtype, seed=seed)
    permutation = torch.randperm(29, generator=generator(seed, "rows"))
    assert_rows_permute(lambda t: packed_call(t, weight, bias, a, b), x, permutation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 150])
def test_thread_count_does_not_change_a_bit(dtype, rows, seed):
    x, weight, bias, a, b = operands(rows, 1259, 331, 9, dtype, seed=seed)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(torch.cat([pack_weight(weight).flatten(), packed_call(x, weight, bias, a, b).flatten()]))
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@given(m=SIZES, k=SIZES, n=SIZES, r=RANKS, bias=st.booleans())
def test_zero_scale_and_zero_up_projection_are_the_packed_linear_alone(dtype, seed, m, k, n, r, bias):
    x, weight, bias, a, b = operands(m, k, n, r, dtype, bias=bias, seed=seed)
    alone = packed_call(x, weight, bias, a[:0], b[:, :0])
    assert same_bits(packed_call(x, weight, bias, a * math.nan, b * math.nan, torch.zeros(())), alone)
    assert torch.equal(packed_call(x, weight, bias, a, torch.zeros_like(b)), alone)


def test_identity_is_exact():
    x = torch.randn(70, 40, generator=generator(0, "identity"))
    y = packed_call(x, torch.eye(40), None, torch.zeros(2, 40), torch.zeros(40, 2))
    assert torch.equal(y, x)


def test_a_weight_of_a_conv1d_is_packed_as_it_lies():
    """transformers' Conv1D keeps [in_features, out_features]."""
    x, weight, bias, a, b = operands(4, 96, 130, 8)
    stored = weight.t().contiguous()
    assert same_bits(packed_call(x, stored.t(), bias, a, b), packed_call(x, weight, bias, a, b))
    torch.testing.assert_close(packed_call(x, stored.t(), bias, a, b), linear(x, weight + b @ a, bias))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "packed", "bias", "lora_a", "lora_b", "scale"])
def test_a_gradient_is_refused_by_name_and_only_where_it_is_recorded(name):
    x, weight, bias, a, b = operands(3, 8, 16, 2)
    call = dict(x=x, packed=pack_weight(weight), bias=bias, lora_a=a, lora_b=b, scale=torch.ones(()), out_features=16)
    wanted = lora_linear_packed(**call)
    call[name] = call[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"lora_linear_packed: {name} asks for a gradient"):
        lora_linear_packed(**call)
    with torch.no_grad():
        assert same_bits(lora_linear_packed(**call), wanted)
    with torch.inference_mode():
        assert same_bits(lora_linear_packed(**call), wanted)


def test_another_device_is_refused_by_name():
    for name, args in (("pack_weight", [torch.zeros(3, 4)]), ("lora_linear_packed", [torch.zeros(3, 4), None])):
        op = CONTRACTS[f"peftops::{name}"].op
        with pytest.raises(RuntimeError, match=f"{name}: has kernels for the CPU only, but is called on meta"):
            _only_cpu(op)(*(arg if arg is None else arg.to("meta") for arg in args))
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"peftops::{name}", "CUDA")
