"""Several projections of one x in the emulator, beyond the oracle kit: which share a pass, and what each one keeps."""

from __future__ import annotations

import pytest
import torch
from peftops.ops import lora_linear, lora_linear_multi
from peftops.ops.contract import CONTRACTS
from peftops.testing.samples import same_bits

from tests.device import emulate
from tests.device.recording import LAUNCHES, Runtime
from tests.device.standin import runs_in
from tests.device.test_emulated_operators import CUDA, DEVICES, DTYPES, dtype_of, use

emulated = runs_in("emulator")


def operands(dtype: torch.dtype, seed: int, ranks: tuple, rows: int = 70, factors: torch.dtype | None = None) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(CUDA, kind)

    widths = [40 + 8 * j for j in range(len(ranks))]
    return {
        "x": randn(rows, 200),
        "weights": [randn(n, 200) for n in widths],
        "biases": [randn(n) for n in widths],
        "lora_a": [randn(r, 200, kind=factors or dtype) for r in ranks],
        "lora_b": [randn(n, r, kind=factors or dtype) for n, r in zip(widths, ranks, strict=True)],
        "scales": torch.tensor([0.5 + j for j in range(len(ranks))], device=CUDA),
    }


def kernels_of(call) -> list[str]:
    with Runtime(emulate.device.runtime).recorded() as calls:
        call()
    names = [call.kernel for call in calls if call.name in LAUNCHES]
    return [name.partition("<")[0].rpartition("::")[2] for name in names]


@pytest.mark.parametrize("ranks", [(4, 8), (16, 16, 16), (8, 3, 8, 8), (8, 8, 8, 8, 9), (40, 8, 64)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@emulated
def test_x_is_read_once_for_two_or_three_projections_and_never_for_one_alone(ranks, p, seed):
    use("A100", seed)
    parts = operands(torch.bfloat16, seed, ranks)
    seeds = torch.arange(len(ranks), device=CUDA)
    leaves = [t.requires_grad_() for t in (parts["x"], *parts["lora_a"])]
    ys: list = []
    forward = kernels_of(lambda: ys.extend(lora_linear_multi(*parts.values(), p, seeds)))
    reads = -(-len(ranks) // 3)
    assert forward.count("multi_shrink") == reads and "shrink" not in forward
    assert forward.count("expand") == len(ranks)
    backward = kernels_of(lambda: torch.autograd.grad([y.sum() for y in ys], leaves))
    assert backward.count("multi_expand") == reads and "expand" not in backward


@pytest.mark.parametrize(
    ("dtype", "factors", "ranks", "shrinks", "expands"),
    [
        ("torch.float32", None, (8, 8), "shrink", "expand"),
        ("torch.bfloat16", "torch.float32", (8, 8), "shrink", "expand"),
        ("torch.bfloat16", None, (8,), "shrink", "expand"),
        ("torch.bfloat16", None, (8, 65), "multi_shrink", "expand"),
    ],
)
@emulated
def test_projections_that_cannot_share_a_pass_go_one_by_one(dtype, factors, ranks, shrinks, expands, seed):
    use("A100", seed)
    parts = operands(dtype_of(dtype), seed, ranks, factors=factors and dtype_of(factors))
    leaf = parts["x"].requires_grad_()
    ys: list = []
    forward = kernels_of(lambda: ys.extend(lora_linear_multi(*parts.values())))
    backward = kernels_of(lambda: torch.autograd.grad([y.sum() for y in ys], leaf))
    assert shrinks in forward and ({"shrink", "multi_shrink"} - {shrinks}).isdisjoint(forward)
    assert expands in backward and ({"expand", "multi_expand"} - {expands}).isdisjoint(backward)


@DTYPES
@pytest.mark.parametrize("gpu", DEVICES)
@emulated
def test_each_projection_keeps_what_lora_linear_keeps_for_its_seed(dtype, gpu, seed):
    use(gpu, seed)
    parts = operands(dtype_of(dtype), seed, (4, 9, 16), rows=130)
    seeds = torch.tensor([7, -3, 2**40], device=CUDA)
    contract = CONTRACTS["peftops::lora_linear_multi_forward"]
    masks = contract.op(*parts.values(), 0.3, seeds)[2]
    one = CONTRACTS["peftops::lora_linear_forward"]
    for j in range(3):
        own = [parts[name][j] for name in ("weights", "biases", "lora_a", "lora_b")]
        assert same_bits(masks[j], one.op(parts["x"], *own, 1.0, None, 0.3, seeds[j : j + 1])[2])


@DTYPES
@emulated
def test_a_scale_of_0_is_the_base_linear_and_the_others_keep_their_bits(dtype, seed):
    use("A100", seed)
    parts = operands(dtype_of(dtype), seed, (8, 8, 8))
    seeds = torch.arange(3, device=CUDA)
    for p in (0.0, 0.5):
        plain = lora_linear_multi(*parts.values(), p, seeds)
        off = parts | {"scales": parts["scales"] * torch.tensor([1.0, 0.0, 1.0], device=CUDA)}
        for name in ("lora_a", "lora_b"):
            off[name] = [t.clone() for t in parts[name]]
            off[name][1].fill_(torch.nan)
        ys = lora_linear_multi(*off.values(), p, seeds)
        assert same_bits(ys[0], plain[0]) and same_bits(ys[2], plain[2])
        assert same_bits(ys[1], torch.nn.functional.linear(parts["x"], parts["weights"][1], parts["biases"][1]))
        leaves = [parts["x"].clone().requires_grad_(), *(t.requires_grad_() for t in (*off["lora_a"], *off["lora_b"]))]
        ys = lora_linear_multi(leaves[0], *list(off.values())[1:], p, seeds)
        grads = torch.autograd.grad([y.sum() for y in ys], leaves)
        assert all(grad.isfinite().all() for grad in grads) and not grads[2].any() and not grads[5].any()


@DTYPES
@emulated
def test_a_projection_without_a_gradient_takes_no_part_in_backward(dtype, seed):
    use("A100", seed)
    parts = operands(dtype_of(dtype), seed, (8, 3, 16))
    x = parts["x"].requires_grad_()
    (grad,) = torch.autograd.grad(lora_linear_multi(*parts.values())[1].sum(), x)
    own = [parts[name][1] for name in ("weights", "biases", "lora_a", "lora_b")]
    (wanted,) = torch.autograd.grad(lora_linear(x, *own, parts["scales"][1]).sum(), x)
    torch.testing.assert_close(grad, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
