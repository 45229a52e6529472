"""The oracle kit on device="cuda": peftops' CUDA kernels, compiled by the C++ compiler and run by the emulator."""

from __future__ import annotations

import dataclasses

import peftops  # noqa: F401  (registers operators and contracts)
import pytest
import torch
from peftops.ops import lora_dropout_mask, lora_linear
from peftops.ops.contract import CONTRACTS
from peftops.testing import CHECKS, plan, run
from peftops.testing.dispatch import check_errors, check_samples
from peftops.testing.gradients import randn_upstream
from peftops.testing.philox import KNOWN_ANSWERS
from peftops.testing.samples import bind, floating, fresh, same_bits
from peftops.testing.suite import Check, chosen
from peftops.testing.values import check_exact, forward_of, results_of

import tests.gpu
from tests.device import emulate
from tests.device.recording import GPUS, LAUNCHES, Gpu, Runtime
from tests.device.standin import runs_in
from tests.gpu import grouped, lora, multi  # noqa: F401  (named in RANDOM_CALLS)
from tests.gpu.lora import taking

emulated = runs_in("emulator")

CUDA = torch.device("cuda", 0)
#: With one multiprocessor a plan splits nothing, so each block goes over many tiles.
DEVICES = {"A100": GPUS["A100"], "one SM": Gpu(86, 1, 99 * 1024)}
#: Inductor would compile for a GPU.
LEFT_OUT = ("inductor",)
#: Samples for checks that go over each of them many times.
LIMITS = {"gradients": 8, "views": 7, "special": 4, "opcheck": 8}
#: Checks in which the length of a block's loop matters.
LOOPS = ("exact", "poison", "gradients")
#: The plan that these devices run and do not take by themselves.
FORCED = ("gemm_sm80",)
HALVES = (torch.bfloat16, torch.float16)
SHUFFLES = 4
RANDOM_CALLS, MOST_ROWS = {"lora": 60, "grouped": 30, "multi": 30}, 300


def check_of(name: str) -> Check:
    return dataclasses.replace(CHECKS[name], limit=LIMITS.get(name, CHECKS[name].limit))


PLAN = [
    (contract.schema, str(dtype), check.name, gpu, forced)
    for contract, dtype, check in plan(CONTRACTS.values(), CUDA)
    for gpu in DEVICES
    for forced in ("", *FORCED)
    if check.name not in LEFT_OUT and (gpu == "A100" or check.name in LOOPS)
    if not forced or (dtype in HALVES and contract.schema.startswith("peftops::lora_linear"))
]
ON_CUDA = [schema for schema, contract in CONTRACTS.items() if contract.dtypes_on(CUDA)]
SCHEMAS = pytest.mark.parametrize("schema", ON_CUDA, ids=lambda schema: schema.removeprefix("peftops::"))
DTYPES = pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])


def _name(value: str) -> str:
    return value.removeprefix("peftops::").removeprefix("torch.").replace(" ", "-")


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def use(gpu: str, shuffle: int) -> None:
    """Make all devices such a GPU, and its blocks, warps and lanes run in the order that `shuffle` gives."""
    Runtime(emulate.device.runtime).set_devices(DEVICES[gpu])
    emulate.device.set_seed(shuffle)


@pytest.mark.parametrize(
    ("schema", "dtype", "check", "gpu", "forced"), PLAN, ids=["-".join(filter(None, map(_name, case))) for case in PLAN]
)
@emulated
def test_contract(schema, dtype, check, gpu, forced, seed):
    use(gpu, seed)
    with taking(forced):
        run(check_of(check), CONTRACTS[schema], CUDA, dtype_of(dtype), seed)


@SCHEMAS
@emulated
def test_errors(schema):
    check_errors(CONTRACTS[schema], CUDA)


@SCHEMAS
@emulated
def test_samples(schema, seed):
    for dtype in CONTRACTS[schema].dtypes_on(CUDA):
        check_samples(CONTRACTS[schema], CUDA, dtype, seed)


@SCHEMAS
@emulated
def test_float64_is_refused(schema, seed):
    contract = CONTRACTS[schema]
    for sample in contract.sample_inputs(CUDA, torch.float64, seed):
        if floating(bind(contract, sample)):
            with pytest.raises(
                RuntimeError, match=r"has dtype float64, but must be float32, bfloat16 or float16 on CUDA"
            ):
                contract.op(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", ["weight", "bias", "lora_a", "lora_b", "scale", "seed"])
@pytest.mark.parametrize("place", ["cpu", "cuda:1"])
@emulated
def test_an_argument_on_another_device_is_named(name, place):
    there = {
        "x": torch.zeros(3, 4, device=CUDA),
        "weight": torch.zeros(5, 4, device=CUDA),
        "bias": torch.zeros(5, device=CUDA),
        "lora_a": torch.zeros(2, 4, device=CUDA),
        "lora_b": torch.zeros(5, 2, device=CUDA),
        "scale": torch.ones((), device=CUDA),
        "dropout_p": 0.5,
        "seed": torch.zeros(1, dtype=torch.int64, device=CUDA),
    }
    lora_linear(**there)
    with pytest.raises(RuntimeError, match=f"{name} is on another device than x"):
        lora_linear(**there | {name: there[name].to(place)})


@DTYPES
@pytest.mark.parametrize("gpu", DEVICES)
@SCHEMAS
@emulated
def test_the_order_of_blocks_warps_and_lanes_does_not_change_a_bit(schema, dtype, gpu, seed):
    contract = CONTRACTS[schema]
    evaluate = results_of(contract.op, contract, randn_upstream(seed))
    for sample in chosen(dataclasses.replace(CHECKS["values"], limit=7), contract, CUDA, dtype_of(dtype), seed):
        results = []
        for shuffle in range(SHUFFLES):
            use(gpu, seed + shuffle)
            results.append(evaluate(fresh(bind(contract, sample))))
        for other in results[1:]:
            for index, (a, b) in enumerate(zip(results[0], other, strict=True)):
                assert a is b or same_bits(a, b), f"sample '{sample.label}': result {index} depends on the order"


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("family", RANDOM_CALLS)
@emulated
def test_random_calls_are_exact_on_integers(gpu, family, seed):
    use(gpu, seed)
    for index in range(RANDOM_CALLS[family]):
        contract, sample = getattr(tests.gpu, family).fuzz(CUDA, seed, index)
        if sample.args[0].shape[0] > MOST_ROWS:
            continue
        try:
            check_exact(contract, sample, seed)
        except Exception as error:
            raise AssertionError(f"call {index}, {sample.label}: {error}") from error


@DTYPES
@pytest.mark.parametrize("factors", ["its own", "torch.float32"])
@emulated
def test_rows_of_any_alignment_give_the_same_bits(dtype, factors, seed):
    """Kernels read rows in chunks of 16 bytes: start, stride and length of the rows decide whether they may."""
    dtype, parts = dtype_of(dtype), {}
    generator = torch.Generator().manual_seed(seed)
    for name, size in {"x": (70, 48), "lora_a": (24, 48), "lora_b": (40, 24), "upstream": (70, 40)}.items():
        wide = factors != "its own" and name.startswith("lora")
        parts[name] = torch.randn(size, generator=generator).to(CUDA, torch.float32 if wide else dtype)

    def evaluate(offset: int, gap: int) -> list:
        def laid_out(t: torch.Tensor) -> torch.Tensor:
            memory = torch.full((offset + len(t) * (t.shape[1] + gap),), torch.nan, dtype=t.dtype, device=CUDA)
            return memory.as_strided(t.shape, (t.shape[1] + gap, 1), offset).copy_(t)

        x, a, b, upstream = map(laid_out, parts.values())
        leaves = [t.requires_grad_() for t in (x, a, b)]
        # Without the vendor GEMM's part, which may sum another layout in another order.
        y = lora_linear(x, torch.zeros(40, 48, dtype=dtype, device=CUDA), None, a, b, 0.5)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    dense = evaluate(0, 0)
    for offset in (0, 1, 4, 8):
        for gap in (0, 1, 4, 8):
            for index, (a, b) in enumerate(zip(dense, evaluate(offset, gap), strict=True)):
                assert same_bits(a, b), f"result {index} with rows {gap} apart from {offset} on"


@emulated
def test_work_goes_to_the_tensors_device_and_the_current_one_stays():
    x, weight, a, b = (torch.randn(size, device="cuda:1") for size in ((9, 20), (11, 20), (3, 20), (11, 3)))
    x.requires_grad_()
    runtime = Runtime(emulate.device.runtime)
    assert runtime.device() == 0
    with runtime.recorded() as calls:
        y = lora_linear(x, weight, None, a, b)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert {call.device for call in calls if call.name in LAUNCHES} == {1}
    assert y.device == grad.device == x.device and runtime.device() == 0
    torch.testing.assert_close(grad, (weight + b @ a).sum(0).expand(9, 20))


# ---- scale -----------------------------------------------------------------------------------------------------------


def _operands(dtype: torch.dtype, seed: int, rows: int = 70, factor_dtype: torch.dtype | None = None) -> list:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, 200), (90, 200), (90,), (5, 200), (90, 5))
    x, weight, bias, a, b = (torch.randn(size, generator=generator).to(CUDA, dtype) for size in sizes)
    return [x, weight, bias, *(factor.to(factor_dtype or dtype) for factor in (a, b))]


@DTYPES
@emulated
def test_tensor_scale_gives_the_bits_of_the_number(dtype, seed):
    parts = _operands(dtype_of(dtype), seed)
    key = torch.tensor([3], device=CUDA)
    for scale, p in ((1.0, 0.0), (0.25, 0.3), (-3.0, 0.5)):
        results = []
        for given in (scale, torch.tensor(scale, device=CUDA)):
            leaves = [t.clone().requires_grad_() for t in parts]
            y = lora_linear(*leaves, given, p, key)
            with torch.no_grad():
                inference = lora_linear(*parts, given, p, key)
            upstream = torch.ones((), dtype=y.dtype, device=CUDA).expand_as(y)
            results.append([y, inference, *torch.autograd.grad(y, leaves, upstream)])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), f"scale {scale}, dropout {p}"


@DTYPES
@pytest.mark.parametrize("tensor", [False, True])
@emulated
def test_zero_scale_is_the_base_linear(dtype, tensor, seed):
    x, weight, bias, a, b = _operands(dtype_of(dtype), seed)
    scale = torch.zeros((), device=CUDA) if tensor else 0.0
    leaves = [t.requires_grad_() for t in (torch.full_like(a, torch.nan), torch.full_like(b, torch.nan))]
    base = torch.nn.functional.linear(x, weight, bias)
    y = lora_linear(x, weight, bias, *leaves, scale, 0.5, torch.tensor([1], device=CUDA))
    assert same_bits(y, base)
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), leaves))
    with torch.no_grad():
        assert same_bits(lora_linear(x, weight, bias, *leaves, scale), base)


@pytest.mark.parametrize("forced", FORCED)
@pytest.mark.parametrize("dtype", map(str, HALVES))
@pytest.mark.parametrize("factors", ["its own", "torch.float32"])
@emulated
def test_an_adapter_whose_scale_is_zero_has_no_part_in_a_gemm(dtype, factors, forced, seed):
    """The bits of factors that are zero, even where the factors are NaN."""
    if dtype == "torch.float16" and factors != "its own":
        return
    x, weight, bias, a, b = _operands(dtype_of(dtype), seed, 70, torch.float32 if factors != "its own" else None)
    x.requires_grad_()
    results = []
    for value, scale in ((torch.nan, 0.0), (0.0, 1.0)):
        with taking(forced):
            factor_a, factor_b = torch.full_like(a, value), torch.full_like(b, value)
            y = lora_linear(x, weight, bias, factor_a, factor_b, torch.tensor(scale, device=CUDA))
            results.append([y, *torch.autograd.grad(y.float().square().sum(), x)])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


# ---- float32 factors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", ["", *FORCED])
@emulated
def test_float32_factors_of_any_size_beside_bfloat16(forced):
    """They are multiplied as sums of bfloat16 numbers: none of those may overflow, and infinity times a number whose
    later terms are zero stays infinity."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 24, generator=generator).to(torch.bfloat16)
    x[1, 3], x[2, 4], x[3] = torch.inf, -torch.inf, 0
    a = torch.randn(3, 24, generator=generator)
    a[0] = a[0].bfloat16().float()  # one term
    a[:, 3:5] = a[:, 3:5].abs()
    b = torch.randn(40, 3, generator=generator)
    b[0] = 1.0
    weight = torch.full((40, 24), 2.0**-9, dtype=torch.bfloat16)
    for size in (1.0, torch.finfo(torch.float32).max / 64, 1e-30):
        factors = a * (size / a.abs().max())
        operands = [t.to(CUDA) for t in (x, weight, factors, b)]
        with taking(forced):
            y, s, _ = torch.ops.peftops.lora_linear_forward(*operands[:2], None, *operands[2:], 1.0, None, 0.0, None)
        wanted, found = x.double() @ factors.double().T, s.cpu().double()
        assert (found[1] == torch.inf).all() and (found[2] == -torch.inf).all() and (found[3] == 0).all()
        assert y[1, 0] == torch.inf and y[2, 0] == -torch.inf
        for row in (0, 4):
            error = (found[row] - wanted[row]).abs()
            assert (error <= 1e-6 * (x[row].double().abs() @ factors.double().abs().T)).all()
            result = x[row].double() @ weight.double().T + wanted[row] @ b.double().T
            most = x[row].double().abs() @ weight.double().T + wanted[row].abs() @ b.double().abs().T
            bound = 2**-8 * result.abs() + 2**-15 * most + (0 if forced else 2**-8 * most)
            assert ((y.cpu()[row].double() - result).abs() <= bound).all()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@emulated
def test_mask_known_answer():
    # counter 0, key 0 is Random123's first vector: columns 0..7 of row 0
    halves = [half for word in KNOWN_ANSWERS[0][2] for half in (word & 0xFFFF, word >> 16)]
    key = torch.zeros(1, dtype=torch.int64, device=CUDA)
    for p in (0.1, 0.5, 0.9):
        assert lora_dropout_mask(key, 1, 8, p)[0].tolist() == [half >= round(65536 * p) for half in halves]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@emulated
def test_mask_has_the_bits_of_the_cpu(key, seed):
    use("A100", seed)
    for rows, cols in ((1, 1), (3, 7), (2, 8), (5, 9), (129, 64), (7, 1031)):
        for p in (0.0, 1e-5, 0.3, 0.5, 0.99999, 1 - 1e-12):
            there = lora_dropout_mask(torch.tensor([key], device=CUDA), rows, cols, p)
            assert torch.equal(there.cpu(), lora_dropout_mask(torch.tensor([key]), rows, cols, p)), (rows, cols, p)


@DTYPES
@pytest.mark.parametrize("factors", ["its own", "torch.float32"])
@pytest.mark.parametrize("gpu", DEVICES)
@emulated
def test_forward_saves_the_keep_bits_of_the_cpu(dtype, factors, gpu, seed):
    use(gpu, seed)
    dtype = dtype_of(dtype)
    factor_dtype = dtype if factors == "its own" else torch.float32
    for rows in (1, 63, 130):
        parts = _operands(dtype, seed, rows, factor_dtype)
        key = torch.tensor([seed - 5], device=CUDA)
        contract = CONTRACTS["peftops::lora_linear_forward"]
        call = dict(zip(("x", "weight", "bias", "lora_a", "lora_b"), parts, strict=True))
        call |= {"scale": 1.0, "tensor_scale": None, "dropout_p": 0.3, "seed": key}
        there = forward_of(contract.op, contract)(call)[2]
        here = forward_of(contract.op, contract)(
            {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in call.items()}
        )[2]
        assert torch.equal(there.cpu(), here), f"{rows} rows"
