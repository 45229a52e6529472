"""The tolerance law: an operator errs at most twice as much as the plain composition, plus one rounding.

    ref64 = reference in float64
    low   = reference in the sample's dtype: what an honest user would write
    max|out - ref64|          <= 2 max|low - ref64| + ulp(max|ref64|)
    per row, relative l2(out) <= 2 max over rows (relative l2(low)) + one ulp

The second line sees rows of small numbers beside rows of large ones. Two refinements keep the law sharp without false
alarms. A maximum over a few elements or rows is often zero by luck, so outputs of fewer than :data:`SMALL` elements or
:data:`ROWS` rows also take the error of `low` on redraws of the same call. In float64 there is no finer oracle: `low`
is then the composition in float32, its error is scaled by the ratio of the units in the last place, and the reference's
own error is added (factor 3 in place of 2).

Non-finite values are compared first, as masks. Where ref64 (rounded to the output's dtype) and `low` agree about NaN,
+inf, -inf or finite, the operator must agree with them; where they disagree - an intermediate overflowed in one and not
in the other - the element is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from peftops.testing.samples import Bound, cast, floating, redraw

Tensors = tuple

#: Outputs with fewer elements than this are judged by the honest error over redraws too.
SMALL = 256
#: So many rows, redraws included, stand behind the largest relative error of a row: a row's elements may share one
#: wrong factor.
ROWS = 64
#: Never more redraws than this.
REDRAWS = 16
#: Results of this size are not told from zero, except in float64: matrix instructions for bfloat16 flush subnormal
#: float32 numbers.
FLUSH = 2**10 * torch.finfo(torch.float32).smallest_normal
#: Rows shorter than this are judged by the law of the maximum alone: a relative norm of a few elements is luck.
ROW = 16


@dataclass(frozen=True)
class Oracle:
    """What the reference says about one call: `ref64`, `low`, and (ref64, low) of the redraws."""

    ref64: Tensors
    low: Tensors
    redraws: Sequence[tuple[Tensors, Tensors]] = field(default=())

    def select(self, indices: Sequence[int]) -> Oracle:
        """The oracle of some of the results."""

        def chosen(results: Tensors) -> Tensors:
            return tuple(results[index] for index in indices)

        return Oracle(chosen(self.ref64), chosen(self.low), [(chosen(ref), chosen(low)) for ref, low in self.redraws])


def oracle(evaluate: Callable[[Bound], Tensors], bound: Bound, seed: int, redraws: int = REDRAWS) -> Oracle:
    """Evaluate the reference (bound arguments -> tuple of tensors) in float64 and in the call's dtypes.

    redraws: at most so many redraws where the results are small.
    """

    def pair(call: Bound) -> tuple[Tensors, Tensors]:
        # A float64 call has no finer oracle; its composition in float32 tells the honest error in units of the last
        # place.
        honest = cast(call, torch.float32) if _is_double(call) else call
        return evaluate(cast(call, torch.float64)), evaluate(honest)

    ref64, low = pair(bound)
    judged = [t for t in ref64 if t is not None and t.is_floating_point() and t.numel()]
    few = min((t.numel() / SMALL for t in judged), default=1.0)
    rows = [t.numel() / t.shape[-1] for t in judged if t.ndim and t.shape[-1] >= ROW]
    few = min([few] + [count / ROWS for count in rows])
    count = min(redraws, math.ceil(1 / few)) if few < 1 else 0
    return Oracle(ref64, low, [pair(redraw(bound, seed, index)) for index in range(count)])


def _is_double(bound: Bound) -> bool:
    return any(t.dtype == torch.float64 for t in floating(bound).values())


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` at `magnitude`."""
    info = torch.finfo(dtype)
    magnitude = min(max(abs(magnitude), info.smallest_normal), info.max)
    return info.eps * 2.0 ** (math.frexp(magnitude)[1] - 1)


def assert_law(out: Tensors, expected: Oracle, what: str = "output") -> None:
    """Raise AssertionError unless every tensor of `out` obeys the law (bool and integer tensors: equality)."""
    assert len(out) == len(expected.ref64), f"{what}: {len(out)} tensors, reference returns {len(expected.ref64)}"
    for index, tensor in enumerate(out):
        name = what if len(out) == 1 else f"{what} {index}"
        ref64, low = expected.ref64[index], expected.low[index]
        if ref64 is None or tensor is None:
            assert ref64 is None or (tensor is None and not bool(ref64.any())), (
                f"{name}: missing, reference is {_about(ref64)}"
            )
            assert tensor is None or not bool(tensor.any()), f"{name}: {_about(tensor)}, reference has none"
            continue
        assert tensor.shape == ref64.shape, f"{name}: shape {tuple(tensor.shape)}, reference {tuple(ref64.shape)}"
        if not ref64.is_floating_point():
            _assert_equal(tensor, ref64, name)
            continue
        double = tensor.dtype == torch.float64
        wanted = torch.float64 if low.dtype == torch.float32 and double else low.dtype
        assert tensor.dtype == wanted, f"{name}: dtype {tensor.dtype}, reference {wanted}"
        pairs = [(ref64, low)] + [(r[index], lo[index]) for r, lo in expected.redraws]
        _assert_tensor(tensor.detach(), [(r.detach(), lo.detach()) for r, lo in pairs], name)


def _assert_equal(out: torch.Tensor, ref: torch.Tensor, name: str) -> None:
    assert out.dtype == ref.dtype, f"{name}: dtype {out.dtype}, reference {ref.dtype}"
    wrong = (out != ref).nonzero()
    assert len(wrong) == 0, f"{name}: {len(wrong)} of {out.numel()} elements differ, first at {wrong[0].tolist()}"


def _assert_tensor(out, pairs, name) -> None:
    dtype = out.dtype
    double = dtype == torch.float64
    ref64, low = pairs[0]
    comparable = assert_masks(out, [ref64] if double else [ref64, low], name)
    factor, scale = (3.0, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps) if double else (2.0, 1.0)

    honest = 0.0
    for ref, low in pairs:
        error = (low.detach().double() - ref.detach()).abs()
        error = error[torch.isfinite(error)]
        honest = max(honest, error.max().item() if error.numel() else 0.0)
    error = torch.where(comparable, (out.double() - ref64).abs(), 0.0)
    size = torch.where(comparable, ref64.abs(), 0.0)
    if error.numel() == 0:
        return
    flush = 0.0 if double else FLUSH
    bound = factor * scale * honest + ulp(size.max().item(), dtype) + flush
    worst = error.max().item()
    if worst > bound:
        at = torch.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{name}: error {worst:.3e} at {[int(i) for i in at]} exceeds {bound:.3e} "
            f"(composition errs by {honest * scale:.3e}): got {out[at].item():.9g}, reference {ref64[at].item():.9g}"
        )
    if out.ndim and out.shape[-1] >= ROW:
        _assert_rows(error, torch.where(comparable, ref64, 0.0), pairs, factor * scale, flush, torch.finfo(dtype), name)


def _assert_rows(error, ref64, pairs, factor, flush, info, name) -> None:
    relative = 0.0
    for ref, low in pairs:
        error_low = low.detach().double() - ref.detach()
        finite = torch.isfinite(error_low)
        length = torch.where(finite, ref.detach(), 0.0).norm(dim=-1)
        honest = torch.where(finite, error_low, 0.0).norm(dim=-1)
        relative = max(relative, torch.where(length > 0, honest / length, 0.0).max().item())
    norm = ref64.norm(dim=-1)
    # below the normal range an ulp does not shrink with the number
    floor = max(info.smallest_normal * info.eps, flush) * math.sqrt(error.shape[-1])
    bound = (factor * relative + info.eps) * norm + floor
    bad = (error.norm(dim=-1) > bound).nonzero()
    if len(bad):
        row = tuple(bad[0].tolist())
        raise AssertionError(
            f"{name}: {len(bad)} rows break the law, first {list(row)}: l2 error {error[row].norm().item():.3e}, "
            f"allowed {bound[row].item():.3e} at norm {norm[row].item():.3e}"
        )


def classes(tensor: torch.Tensor) -> torch.Tensor:
    """0 where finite, 1 where NaN, 2 where +inf, 3 where -inf."""
    return torch.isnan(tensor).int() + 2 * torch.isposinf(tensor).int() + 3 * torch.isneginf(tensor).int()


def assert_masks(out: torch.Tensor, witnesses: Sequence[torch.Tensor], name: str, signs: bool = True) -> torch.Tensor:
    """NaN, +inf and -inf are where all witnesses have them, rounded to out's dtype.

    Elements on which the witnesses disagree are not judged.

    signs: False tells only finite from not finite. Returns where all of them and `out` are finite.
    """
    found = classes(out)
    wanted = [classes(witness.to(out.dtype)) for witness in witnesses]
    finite = torch.stack([found, *wanted]).amax(0) == 0
    if not signs:
        found, wanted = found.clamp(max=1), [w.clamp(max=1) for w in wanted]
    agreed = torch.stack(wanted).amax(0) == torch.stack(wanted).amin(0)
    wrong = (agreed & (found != wanted[0])).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} elements differ in NaN or inf, first at {list(at)}: got {out[at].item()}, "
            f"reference {witnesses[0][at].item()}"
        )
    return finite


def _about(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
