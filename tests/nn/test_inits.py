"""How adapters start: the published initialisations against PEFT's and against what they promise."""

import math

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.utils.loftq_utils import _low_rank_decomposition
from peftops.nn import inits
from torch import nn

OUT, IN, RANK = 40, 56, 6
KEEPING = ("kaiming", "gaussian", "orthogonal")
CHANGING = ("pissa", "pissa_niter_8", "olora")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_of(dtype=torch.float32, shape=(OUT, IN)):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def started(init, seed, weight=None):
    weight = weight_of() if weight is None else weight
    torch.manual_seed(seed)
    return inits.start(init, weight, RANK, 1.5)


def peft_layer(weight, init, rank=RANK, alpha=9, use_rslora=False):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=init, use_rslora=use_rslora)
    return PeftLinear(linear, "default", config, r=rank, lora_alpha=alpha)


def parts(layer):
    """A, B and the base weight of a PEFT layer."""
    return layer.lora_A.default.weight.data, layer.lora_B.default.weight.data, layer.base_layer.weight.data


# ---- random starts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_b_is_zero_and_a_has_its_distribution(init):
    a, b, residual = inits.start(init, weight_of(shape=(7, 4000)), 16, 2.0)
    assert residual is None and b.shape == (7, 16) and b.count_nonzero() == 0
    if init == "kaiming":
        bound = 1 / math.sqrt(4000)
        assert 0.999 * bound < a.abs().max() <= bound and abs(a.std() / (bound / math.sqrt(3)) - 1) < 0.01
    else:
        assert abs(a.std() * 16 - 1) < 0.02 and abs(a.mean()) < 1e-3


@pytest.mark.parametrize("init, peft_init", [("kaiming", True), ("gaussian", "gaussian")])
def test_random_factors_are_those_of_peft_from_the_same_state(init, peft_init):
    layer = peft_layer(weight_of(), True)
    torch.manual_seed(5)
    layer.reset_lora_parameters("default", peft_init)
    a, b, _ = started(init, 5)
    assert torch.equal(a, parts(layer)[0]) and torch.equal(b, parts(layer)[1])


@pytest.mark.parametrize("init", KEEPING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_seed_gives_the_same_factors_in_every_dtype(init, dtype):
    for one, other in zip(started(init, 3, weight_of(dtype)), started(init, 3), strict=True):
        assert (one is None and other is None) or (torch.equal(one, other) and one.dtype == torch.float32)


def test_orthogonal_factors_cancel_although_neither_is_zero_as_in_peft():
    torch.manual_seed(11)
    layer = peft_layer(weight_of(), True)
    torch.manual_seed(11)
    layer.orthogonal_init("default")
    torch.manual_seed(11)
    a, b, residual = inits.start("orthogonal", torch.zeros(OUT, IN), RANK, 1.0)
    assert torch.equal(a, parts(layer)[0]) and torch.equal(b, parts(layer)[1]) and residual is None
    assert (b @ a).abs().max() < 1e-6 and a.norm() > 0.5 and b.norm() > 0.5


# ---- starts from the weight ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", CHANGING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [None, torch.bfloat16])
def test_the_sum_is_the_old_weight(init, dtype, factors):
    weight = weight_of(dtype)
    kept = weight.clone()
    scaling = 1.75
    a, b, residual = inits.start(init, weight, RANK, scaling, factors)
    assert torch.equal(weight, kept), "start only reads the weight"
    assert a.shape == (RANK, IN) and b.shape == (OUT, RANK) and residual.shape == (OUT, IN)
    if factors is not None:
        assert torch.equal(a.to(factors).to(a.dtype), a) and torch.equal(b.to(factors).to(b.dtype), b)
    error = (residual.double() + scaling * b.double() @ a.double() - weight.double()).abs().max()
    assert error < (1e-14 if dtype == torch.float64 else 2e-6)
    assert residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8"])
def test_factors_and_base_weight_are_those_of_peft(init, use_rslora):
    weight = weight_of()
    torch.manual_seed(2)
    layer = peft_layer(weight, True, use_rslora=use_rslora)
    torch.manual_seed(2)
    layer.olora_init("default") if init == "olora" else layer.pissa_init("default", init)
    torch.manual_seed(2)
    a, b, residual = inits.start(init, weight, RANK, layer.scaling["default"])
    for ours, theirs in zip((a, b, residual), parts(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_pissa_takes_the_principal_directions_and_leaves_the_others():
    weight = weight_of(torch.float64)
    scaling = 0.5
    a, b, residual = inits.start("pissa", weight, RANK, scaling)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(scaling * b @ a)[:RANK], values[:RANK])
    torch.testing.assert_close(torch.linalg.svdvals(residual)[: OUT - RANK], values[RANK:])
    # The singular values are shared evenly: A and B have the same ones.
    torch.testing.assert_close(torch.linalg.svdvals(a), torch.linalg.svdvals(b))
    torch.testing.assert_close(torch.linalg.svdvals(a), (values[:RANK] / scaling).sqrt())


def test_randomised_pissa_comes_close_to_the_exact_one():
    weight = weight_of() @ torch.diag(0.8 ** torch.arange(IN))
    rough, fine, exact = (
        start.b @ start.a
        for start in (inits.start(init, weight, RANK, 1.0) for init in ("pissa_niter_0", "pissa_niter_16", "pissa"))
    )
    assert (fine - exact).norm() < 1e-3 * exact.norm() < 0.1 * (rough - exact).norm()


def test_a_weight_of_low_rank_moves_into_the_factors_whole():
    weight = weight_of(shape=(OUT, RANK)) @ weight_of(shape=(RANK, IN))
    assert inits.start("pissa", weight, RANK, 2.0).residual.abs().max() < 1e-4
    assert inits.start("pissa_niter_2", weight, RANK, 2.0).residual.abs().max() < 1e-4


def test_olora_has_orthonormal_columns_in_b_whatever_the_scaling():
    for scaling in (0.1, 4.0):
        _, b, _ = inits.start("olora", weight_of(), RANK, scaling)
        torch.testing.assert_close(b.t() @ b, torch.eye(RANK), rtol=0, atol=1e-6)


def test_peft_decomposes_a_transposed_weight_by_its_wrong_side():
    """OLoRA in PEFT 0.21 does not look at `fan_in_fan_out`, so its factors do not fit GPT-2's Conv1D; on the view
    [out, in] they do.
    """
    stored = weight_of(shape=(IN, OUT))
    layer = peft_layer(stored, True)
    layer.olora_init("default")
    assert parts(layer)[0].shape == (RANK, OUT)
    a, b, _ = inits.start("olora", stored.t(), RANK, 1.0)
    assert a.shape == (RANK, IN) and b.shape == (OUT, RANK)


def test_autocast_and_default_device_change_nothing():
    for init in (*KEEPING, "pissa", "olora"):
        plain = started(init, 4, torch.eye(OUT, IN) * torch.arange(1, IN + 1))
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            weight = (torch.eye(OUT, IN, device="cpu") * torch.arange(1, IN + 1, device="cpu")).float()
            inside = started(init, 4, weight)
        for one, other in zip(plain, inside, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


# ---- the hook --------------------------------------------------------------------------------------------------------


def test_callable_gets_a_copy_in_float32_and_its_values_are_taken():
    seen = {}

    def init(weight, rank, scaling):
        seen.update(dtype=weight.dtype, shape=weight.shape, rank=rank, scaling=scaling)
        a, b = torch.ones(rank, weight.shape[1], dtype=torch.float16), torch.full((weight.shape[0], rank), 2.0)
        return a, b, weight.sub_(scaling * rank * 2)

    for dtype in DTYPES[:3]:
        weight = weight_of(dtype)
        kept = weight.clone()
        a, b, residual = inits.start(init, weight, RANK, 0.5)
        assert seen == dict(dtype=torch.float32, shape=(OUT, IN), rank=RANK, scaling=0.5)
        assert torch.equal(weight, kept) and a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(residual + 0.5 * b @ a, weight.float())
    unchanged = inits.start(lambda w, r, s: (torch.zeros(r, IN), torch.zeros(OUT, r), None), weight, RANK, 1.0)
    assert unchanged.residual is None


def test_loftq_fits_the_hook():
    """LoftQ with one alternation over a 4-bit grid. The hook is told the scaling, which PEFT leaves out of the factors,
    so that the sum is right for any alpha.
    """

    def loftq(weight, rank, scaling):
        step = weight.abs().amax(1, keepdim=True) / 7
        quantised = (weight / step).round() * step
        low_rank = _low_rank_decomposition(weight - quantised, rank)
        return low_rank["R"], low_rank["L"] / scaling, quantised

    weight, scaling = weight_of(), 2.0
    a, b, residual = inits.start(loftq, weight, RANK, scaling)
    values = torch.linalg.svdvals(weight - residual)
    torch.testing.assert_close((weight - residual - scaling * b @ a).norm(), values[RANK:].norm())
    assert len((residual[0] / residual[0].abs().max() * 7).round().unique()) <= 15


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b, w: a, "returned Tensor, but it must return"),
        (lambda a, b, w: (a, b), "returned tuple, but it must return"),
        (lambda a, b, w: (a.t(), b, w), r"returned A \[56, 6\], but it must be \[6, 56\]"),
        (lambda a, b, w: (a, b[:1], w), r"returned B \[1, 6\], but it must be \[40, 6\]"),
        (lambda a, b, w: (a, b, w.t()), r"returned residual \[56, 40\], but it must be \[40, 56\]"),
        (lambda a, b, w: (a.int(), b, w), "returned torch.int32 as A"),
        (lambda a, b, w: (a, None, w), "returned NoneType as B"),
        (lambda a, b, w: (a, b / 0, w), "returned B with values that are not finite"),
    ],
)
def test_a_callable_that_returns_something_else_is_told_what_is_wrong(change, message):
    def init(weight, rank, scaling):
        return change(torch.ones(rank, IN), torch.ones(OUT, rank), weight)

    with pytest.raises(ValueError, match=message):
        inits.start(init, weight_of(), RANK, 1.0)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("shape", [(3, 2), (0, 4), (4, 0)])
def test_random_starts_take_any_rank_and_empty_weights(init, shape):
    a, b, residual = inits.start(init, torch.zeros(shape), 8, 1.0)
    assert a.shape == (8, shape[1]) and b.shape == (shape[0], 8) and residual is None


@pytest.mark.parametrize("init", CHANGING)
def test_a_decomposition_has_no_rank_above_the_smaller_side(init):
    message = rf"rank is 4, but init '{init}' has no more than min\(3, 5\) directions"
    assert inits.why_not(init, torch.zeros(3, 5), 3) is None
    with pytest.raises(ValueError, match=message):
        inits.start(init, torch.zeros(3, 5), 4, 1.0)


def test_meta_weights():
    weight = torch.empty(OUT, IN, device="meta")
    for init in KEEPING:
        a, b, residual = inits.start(init, weight, RANK, 1.0)
        assert a.is_meta and b.is_meta and a.shape == (RANK, IN) and b.shape == (OUT, RANK) and residual is None
    for init in (*CHANGING, lambda w, r, s: None):
        with pytest.raises(ValueError, match="reads the base weight, but that is on the meta device"):
            inits.start(init, weight, RANK, 1.0)


def test_a_weight_that_is_not_finite_is_refused():
    weight = weight_of()
    weight[3, 4] = math.nan
    for init in CHANGING:
        with pytest.raises(ValueError, match=f"init is '{init}', but the base weight has values that are not finite"):
            inits.start(init, weight, RANK, 1.0)


@pytest.mark.parametrize("init", ["Kaiming", "pissa_niter_<k>", "pissa_niter_", "pissa_niter_-1", "loftq", True, None])
def test_unknown_name(init):
    with pytest.raises(ValueError, match="init is .*, but it must be one of 'kaiming', .* or a callable"):
        inits.check(init, RANK)


def test_odd_rank_is_not_orthogonal():
    inits.check("orthogonal", 4)
    with pytest.raises(ValueError, match="rank is 5, but init 'orthogonal' needs an even rank"):
        inits.check("orthogonal", 5)
