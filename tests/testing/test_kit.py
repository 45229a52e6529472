"""The parts of the oracle kit by themselves: tolerance law, layouts, special values, seeds, laws."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from peftops.ops.contract import Contract, ErrorSample, Sample
from peftops.testing import (
    Oracle,
    assert_law,
    derive,
    dropout_mask,
    oracle,
    philox4x32,
    poisoned_allocations,
    suite,
    ulp,
)
from peftops.testing import laws as law
from peftops.testing.dispatch import check_errors, check_samples
from peftops.testing.gradients import integer_upstream, randn_upstream
from peftops.testing.philox import KNOWN_ANSWERS
from peftops.testing.samples import (
    asking,
    bind,
    call,
    call_grouped,
    carrying,
    clone_layout,
    expansions,
    integers,
    power_of_two,
    redraw,
    relayouts,
    same_bits,
    storage_bytes,
)
from peftops.testing.tolerance import assert_masks

from tests.testing import faults, list_faults


def expect(*values, low_error=0.0, dtype=torch.float32):
    ref64 = torch.tensor(values, dtype=torch.float64)
    return Oracle((ref64,), ((ref64 + low_error).to(dtype),))


def test_ulp_is_the_distance_to_the_next_number():
    for dtype in (torch.float32, torch.float64):
        for value in (1.0, 1.5, 3.0, 1e-3, 1e30):
            number = torch.tensor(value, dtype=dtype)
            assert ulp(value, dtype) == (torch.nextafter(number, torch.tensor(math.inf, dtype=dtype)) - number).item()
    assert ulp(1.0, torch.bfloat16) == 2**-7 and ulp(1.0, torch.float16) == 2**-10
    assert ulp(0.0, torch.float16) == 2**-24 and ulp(1e308, torch.float64) > 0


def test_law_allows_twice_the_honest_error_and_one_rounding():
    expected = expect(1.0, 2.0, low_error=1e-3)
    assert_law((torch.tensor([1.0, 2.0 + 1.9e-3]),), expected)
    with pytest.raises(AssertionError, match=r"error 2.1\d*e-03 at \[1\] exceeds"):
        assert_law((torch.tensor([1.0, 2.0 + 2.1e-3]),), expected)
    assert_law((torch.tensor([1.0, 2.0 + 2e-7]),), expect(1.0, 2.0))
    with pytest.raises(AssertionError, match="exceeds"):
        assert_law((torch.tensor([1.0, 2.0 + 5e-7]),), expect(1.0, 2.0))


def test_law_sees_a_wrong_row_of_small_numbers():
    ref64 = torch.ones(2, 32, dtype=torch.float64)
    ref64[1] *= 1e-6
    expected = Oracle((ref64,), ((ref64 * (1 + 1e-5)).float(),))
    out = ref64.float()
    assert_law((out,), expected)
    out[1] *= 1.5
    with pytest.raises(AssertionError, match=r"1 rows break the law, first \[1\]"):
        assert_law((out,), expected)


def test_law_demands_dtype_shape_count_and_equal_integers():
    one = expect(1.0)
    with pytest.raises(AssertionError, match="dtype torch.float16, reference torch.float32"):
        assert_law((torch.ones(1, dtype=torch.float16),), one)
    with pytest.raises(AssertionError, match="shape"):
        assert_law((torch.ones(1, 1),), one)
    with pytest.raises(AssertionError, match="2 tensors, reference returns 1"):
        assert_law((torch.ones(1), torch.ones(1)), one)
    mask = torch.tensor([True, False])
    with pytest.raises(AssertionError, match=r"1 of 2 elements differ, first at \[1\]"):
        assert_law((torch.tensor([True, True]),), Oracle((mask,), (mask,)))


@pytest.mark.parametrize("wrong", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("right", [1.0, math.inf, -math.inf, math.nan])
def test_masks_of_nan_and_inf(right, wrong):
    assert_law((torch.tensor([right]),), expect(right))
    if not (math.isfinite(right) and math.isfinite(wrong)) and str(right) != str(wrong):
        with pytest.raises(AssertionError, match="differ in NaN or inf"):
            assert_law((torch.tensor([wrong]),), expect(right))


def test_masks_are_not_judged_where_the_reference_is_undecided():
    undecided = Oracle((torch.tensor([1e5], dtype=torch.float64),), (torch.tensor([math.nan], dtype=torch.float16),))
    for value in (math.inf, math.nan, -math.inf, 5.0):
        assert_law((torch.tensor([value], dtype=torch.float16),), undecided)
    inf, nan = torch.tensor([math.inf]), torch.tensor([math.nan])
    assert_masks(nan, [inf], "output", signs=False)
    with pytest.raises(AssertionError, match="differ"):
        assert_masks(torch.zeros(1), [inf], "output", signs=False)


def test_small_results_are_judged_with_redraws():
    def evaluate(bound):
        return ((bound["x"] * bound["x"]).sum().reshape(1),)

    few = oracle(evaluate, {"x": torch.rand(1000)}, seed=0)
    many = oracle(lambda bound: (bound["x"] * 2,), {"x": torch.rand(100, 20)}, seed=0)
    assert (len(few.redraws), len(many.redraws)) == (16, 0)
    bound = {"x": torch.full((50,), torch.finfo(torch.float32).max), "seed": torch.tensor([7])}
    again = redraw(bound, 0, 1)
    assert torch.isfinite(again["x"]).all() and again["seed"] is bound["seed"]
    assert not torch.equal(again["x"], redraw(bound, 0, 2)["x"])


def test_relayouts_keep_values_and_surround_them_with_nan():
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    views = dict(relayouts(tensor))
    assert {"offset 1", "offset 16", "gaps between elements", "gaps between rows", "transposed"} <= set(views)
    for label, view in views.items():
        assert torch.equal(view, tensor), label
        surroundings = torch.empty(0).set_(view.untyped_storage())
        assert torch.isnan(surroundings).sum() == surroundings.numel() - tensor.numel(), label
        assert view.storage_offset() or not view.is_contiguous(), label
        assert clone_layout(view).stride() == view.stride()
    assert [view.stride() for _, view in expansions(torch.ones(2, 1, 3))] == [(0, 3, 1), (1, 1, 0)]
    integers = dict(relayouts(torch.tensor([5])))["offset 3"]
    assert integers.item() == 5 and storage_bytes(integers).numel() == 7 * 8


def test_same_bits_tells_signed_zeros_and_accepts_nan():
    assert same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.float64))


def test_power_of_two_rounds_to_the_nearest():
    assert [power_of_two(v) for v in (0.0, 1.0, 0.75, 3.1, -2.0, 0.26)] == [0.0, 1.0, 1.0, 4.0, -2.0, 0.25]


def test_scales_stay_powers_of_two_among_integers():
    bound = {"scales": torch.tensor([0.75, 9.0, -0.26, 7.0, 0.0])[::2], "x": torch.full((64,), 0.5)}
    changed = integers(bound, 0, density=0.5, magnitude=2)
    assert changed["scales"].tolist() == [1.0, -0.25, 0.0] and changed["scales"].stride() == (2,)
    assert 0 < changed["x"].count_nonzero() < 64


def test_lists_are_walked_tensor_by_tensor():
    sample = next(s for s in list_faults.samples("cpu", torch.float32, 0) if s.label == "three")
    bound = bind(list_faults.CLEAN, sample)
    names = asking(list_faults.CLEAN, bound)
    assert names == ("x", *(f"{name}[{j}]" for name in ("weights", "biases") for j in range(3)))
    (results,) = groups = call_grouped(list_faults.reference, list_faults.CLEAN, bound)
    assert [y.shape[-1] for y in results] == [4, 17, 4] and carrying(list_faults.CLEAN, groups) == list(results)
    assert len(call(list_faults.reference, list_faults.CLEAN, bound)) == 3


@pytest.mark.parametrize("upstream", [randn_upstream, integer_upstream])
def test_results_of_one_shape_get_gradients_of_their_own(upstream):
    result = torch.zeros(50)
    assert not torch.equal(upstream(0)(result, 0), upstream(0)(result, 1))


def test_poison_fills_and_is_taken_back():
    with poisoned_allocations():
        assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(2).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_are_fixed_numbers():
    assert derive(0, "a") == derive(0, "a") != derive(1, "a") != derive(0, "b")
    assert derive(0, "redraw", 1) == 3359044280334809087
    assert 0 <= derive(0) < 2**63


def test_philox_known_answers():
    for counter, key, words in KNOWN_ANSWERS:
        got = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
        assert tuple(int(word) for word in got) == words


def test_dropout_mask_takes_halves_low_first():
    mask = dropout_mask(0, 1, 8, 0.5)[0]
    halves = [half for word in KNOWN_ANSWERS[0][2] for half in (word & 0xFFFF, word >> 16)]
    assert mask.tolist() == [half >= 32768 for half in halves]
    assert dropout_mask(-1, 4, 13, 0.0).all() and dropout_mask(5, 3, 0, 0.5).shape == (3, 0)


def test_laws_hold_and_fail():
    a, b = law.split(torch.arange(1.0, 7.0).reshape(2, 3))
    law.assert_linear(lambda t: 3 * t + 1, a, b, 0.0)
    with pytest.raises(AssertionError, match="not linear"):
        law.assert_linear(lambda t: (t.sum() + 1) ** 2, a, b, 1e-3)
    x, order = torch.arange(12.0).reshape(4, 3), torch.tensor([2, 0, 3, 1])
    law.assert_rows_permute(lambda t: t * 2, x, order)
    with pytest.raises(AssertionError, match="permuting"):
        law.assert_rows_permute(lambda t: t.cumsum(0), x, order)
    law.assert_rows_independent(lambda t: t * 2, x)
    with pytest.raises(AssertionError, match="one by one"):
        law.assert_rows_independent(lambda t: t - t.mean(0), x, bound=0.1)
    law.assert_zero_rows(lambda t: t * 2, x)
    with pytest.raises(AssertionError, match="no tokens in"):
        law.assert_zero_rows(lambda t: torch.cat([t, t.new_zeros(1, 3)]), x)


def test_errors_must_be_raised_with_their_text():
    def contract(error_sample):
        return Contract(
            faults.CLEAN.schema, faults.reference, faults.samples, lambda device: [error_sample], (torch.float32,)
        )

    good = next(iter(faults.samples("cpu", torch.float32, 0)))
    with pytest.raises(AssertionError, match="no error like 'weight'"):
        check_errors(contract(ErrorSample(good, "weight")), torch.device("cpu"))
    (first, *_) = faults.errors("cpu")
    with pytest.raises(AssertionError, match="expected an error like 'bias', got 'weight has 3"):
        check_errors(contract(ErrorSample(first.sample, "bias")), torch.device("cpu"))


def test_samples_must_cover_layouts():
    def only_plain(device, dtype, seed):
        yield next(iter(faults.samples(device, dtype, seed)))

    contract = Contract(faults.CLEAN.schema, faults.reference, only_plain, faults.errors, (torch.float32,))
    with pytest.raises(AssertionError, match="no empty tensor"):
        check_samples(contract, torch.device("cpu"), torch.float32, 0)
    with pytest.raises(AssertionError, match="no sample is fit"):
        nothing = suite.Check("nothing", lambda *a: None, wants=lambda contract, bound: False)
        suite.run(nothing, contract, torch.device("cpu"), torch.float32, 0)
    with pytest.raises(TypeError, match="unknown or repeated"):
        list(
            suite.chosen(
                suite.CHECKS["values"], _with(contract, Sample((torch.ones(1),), {"x": 1})), "cpu", torch.float32, 0
            )
        )


def _with(contract, sample):
    return Contract(contract.schema, contract.reference, lambda *a: [sample], contract.error_inputs, contract.dtypes)


def test_kit_needs_torch_alone():
    code = (
        "import sys, peftops.testing; print([m for m in ('pytest', 'hypothesis', 'numpy.testing') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
