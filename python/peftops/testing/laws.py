"""Metamorphic laws: what must hold between results of an operator, without any reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from peftops.testing.samples import same_bits

Function = Callable[[torch.Tensor], torch.Tensor]


def assert_linear(function: Function, a: torch.Tensor, b: torch.Tensor, bound: float) -> None:
    """f(a + b) - f(0) = (f(a) - f(0)) + (f(b) - f(0)) up to `bound`; `a + b` must be exact in the tensors' dtype (see
    `split`).
    """
    zero = function(torch.zeros_like(a)).double()
    whole = function(a + b).double() - zero
    parts = (function(a).double() - zero) + (function(b).double() - zero)
    error = (whole - parts).abs().max().item() if whole.numel() else 0.0
    assert error <= bound, f"not linear: f(a + b) differs from f(a) + f(b) by {error:.3e}, allowed {bound:.3e}"


def split(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors whose sum is `tensor` exactly: its even and its odd elements."""
    even = (torch.arange(tensor.numel(), device=tensor.device) % 2 == 0).reshape(tensor.shape)
    return tensor * even, tensor * ~even


def assert_rows_permute(function: Function, x: torch.Tensor, permutation: torch.Tensor) -> None:
    """Permuting tokens permutes results, bit for bit."""
    assert same_bits(function(x[permutation]), function(x)[permutation]), "permuting rows does not permute the results"


def assert_rows_independent(function: Function, x: torch.Tensor, bound: float = 0.0) -> None:
    """A batch of n equals n batches of one: to the bit, or up to `bound` where the two take different kernels."""
    batch = function(x)
    single = torch.cat([function(row) for row in x.split(1)]) if len(x) else batch
    if bound == 0:
        assert same_bits(batch, single), "a batch differs from its rows one by one"
        return
    error = (batch.double() - single.double()).abs().max().item() if batch.numel() else 0.0
    assert error <= bound, f"a batch differs from its rows one by one by {error:.3e}, allowed {bound:.3e}"


def assert_zero_rows(function: Function, x: torch.Tensor) -> None:
    """No tokens: the result has no rows and the gradient of x is empty."""
    empty = x[:0].detach().requires_grad_()
    result = function(empty)
    assert result.shape[0] == 0, f"no tokens in, shape {tuple(result.shape)} out"
    (grad,) = torch.autograd.grad(result.sum(), empty)
    assert grad.shape == empty.shape, f"gradient of {tuple(empty.shape)} has shape {tuple(grad.shape)}"


#: (row, stride, column) at the corners of 31 and 32 bits, where arithmetic in 32 bits goes wrong.
OFFSET_CORNERS = tuple(
    (row, stride, column)
    for row, stride in (
        (0, 0),
        (1, 1),
        (2**15, 2**16 - 1),
        (2**16, 2**15),
        (87_383, 24_576),
        (2**16, 2**16),
        (2**31 - 1, 2),
        (3, 2**31),
    )
    for column in (0, 1, 2**31 - 1, 2**32)
)


def assert_offsets(
    offset: Callable[[int, int, int], int], corners: Iterable[tuple[int, int, int]] = OFFSET_CORNERS
) -> None:
    """A host-callable offset function agrees with Python's integers: row * stride + column."""
    for row, stride, column in corners:
        got, wanted = offset(row, stride, column), row * stride + column
        assert got == wanted, f"offset of row {row}, stride {stride}, column {column} is {got}, not {wanted}"
