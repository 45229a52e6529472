r"""How an adapter starts: its factors A [rank, in_features] and B [out_features, rank], and the base weight under it.

With s the adapter's scaling and W [out_features, in_features] the base weight:

- "kaiming": A as `nn.Linear` draws it, U(-1/sqrt(in_features), 1/sqrt(in_features)), B = 0 (loralib; PEFT's default).
- "gaussian": A ~ N(0, 1/rank^2), B = 0 (Hu et al., 2022).
- "orthogonal": A and B from the odd and the even rows of a random orthogonal matrix, so that B A = 0 up to rounding
  although neither is 0 (datta0.github.io/posts/rethink-lora-init; PEFT's). An even rank.
- "pissa": W = U S V^T, B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T, W <- W - s B A (Meng et al., NeurIPS 2024).
- "pissa_niter_<k>": the same from a randomised decomposition with k power iterations.
- "olora": W = Q R, B = Q[:, :rank], A = R[:rank], W <- W - s B A (Büyükakyüz, 2024).
- a callable `init(weight, rank, scaling) -> (A, B, residual)`: for LoftQ and whatever else starts from the weight.
  It gets a copy of W that it may write; residual is the new W, None = unchanged.

Where the base weight changes, W + s B A is the old one up to rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Init = str | Callable[[Tensor, int, float], tuple[Tensor, Tensor, Tensor | None]]
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_<k>", "olora")
_NITER = re.compile(r"pissa_niter_([0-9]+)")


class Start(NamedTuple):
    """First values in host memory (on the meta device for a weight there), float32, or float64 for a float64 weight
    that was decomposed. residual: the new base weight in `weight`'s shape, None = unchanged.
    """

    a: Tensor
    b: Tensor
    residual: Tensor | None = None


def check(init: Init, rank: int) -> None:
    """Raise ValueError for an `init` that does not exist or cannot start an adapter of this rank."""
    if callable(init):
        return
    if not isinstance(init, str) or not (init in INITS or _NITER.fullmatch(init)) or init == "pissa_niter_<k>":
        known = ", ".join(map(repr, INITS))
        raise ValueError(f"init is {init!r}, but it must be one of {known} or a callable")
    if init == "orthogonal" and rank % 2:
        raise ValueError(f"rank is {rank}, but init 'orthogonal' needs an even rank")


def reads_weight(init: Init) -> bool:
    """Whether the factors depend on the base weight, which may change with them."""
    return callable(init) or init not in ("kaiming", "gaussian", "orthogonal")


def why_not(init: Init, weight: Tensor, rank: int) -> str | None:
    """The reason why `init` cannot start an adapter over this weight; None where nothing is known against it."""
    if not reads_weight(init):
        return None
    if weight.is_meta:
        return f"init is {init!r}, which reads the base weight, but that is on the meta device"
    if not callable(init) and rank > min(weight.shape):
        out_features, in_features = weight.shape
        return f"rank is {rank}, but init {init!r} has no more than min({out_features}, {in_features}) directions"
    return None


@torch.no_grad()
def start(init: Init, weight: Tensor, rank: int, scaling: float, dtype: torch.dtype | None = None) -> Start:
    """First values for an adapter over `weight`, which is only read.

    Random values are drawn on the host in float32, so that a seed gives the same factors on every device and in every
    dtype ("pissa_niter_<k>" draws on the weight's device).

    weight: W as [out_features, in_features], any floating dtype and device.
    scaling: s, the number that multiplies B A.
    dtype: the dtype that the factors will have. They are rounded to it before the residual is taken, which then makes
        up for the rounding. None = not rounded.

    Raises ValueError for an unknown `init`, a rank that it cannot have, a weight whose values it needs but that is on
    the meta device or not finite, and a callable's result of another form than (A, B, residual or None).
    """
    check(init, rank)
    if reason := why_not(init, weight, rank):
        raise ValueError(reason)
    out_features, in_features = weight.shape
    if weight.is_meta:
        return Start(*(torch.empty(shape, device="meta") for shape in ((rank, in_features), (out_features, rank))))
    with torch.autocast(weight.device.type, enabled=False), torch.autocast("cpu", enabled=False):
        if not reads_weight(init):
            return _drawn(init, out_features, in_features, rank)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight = weight.detach().to(wide, copy=callable(init))
        if callable(init):
            return _called(init, weight, rank, scaling)
        return _decomposed(init, weight, rank, scaling, dtype)


def _drawn(init: str, out_features: int, in_features: int, rank: int) -> Start:
    if init == "orthogonal":
        return _orthogonal(out_features, in_features, rank)
    a = torch.empty(rank, in_features, dtype=torch.float32, device="cpu")
    if init == "gaussian":
        nn.init.normal_(a, std=1 / rank)
    elif a.numel():
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return Start(a, torch.zeros(out_features, rank, dtype=torch.float32, device="cpu"))


def _orthogonal(out_features: int, in_features: int, rank: int) -> Start:
    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float32, device="cpu")

    rows, _ = torch.linalg.qr(randn(rank, rank))
    a = (randn(in_features, rank // 2) @ rows[0::2]).t() / 10
    b = randn(rank // 2, out_features).t() @ rows[1::2] / 10
    return Start(a.contiguous(), b.contiguous())


def _decomposed(init: str, weight: Tensor, rank: int, scaling: float, dtype: torch.dtype | None) -> Start:
    if not weight.isfinite().all():
        raise ValueError(f"init is {init!r}, but the base weight has values that are not finite")
    # A layer's scale is a float32 number.
    scaling = torch.tensor(scaling, dtype=torch.float32, device="cpu").item()
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        a, b = r[:rank], q[:, :rank]
    else:
        u, s, vt = _principal(init, weight, rank)
        root = (s / scaling).sqrt()
        a, b = root[:, None] * vt, u * root
    a, b = (factor.to("cpu", dtype or weight.dtype).to(weight.dtype).contiguous() for factor in (a, b))
    # On the host, where a product of float32 is one: on CUDA TF32 may be switched on.
    return Start(a, b, torch.addmm(weight.cpu(), b, a, alpha=-scaling))


def _principal(init: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `rank` singular values and their vectors: U [out, rank], S [rank], V^T [rank, in]."""
    if match := _NITER.fullmatch(init):
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(match[1]))
        return u, s, v.t()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank]


def _called(init: Callable, weight: Tensor, rank: int, scaling: float) -> Start:
    (out_features, in_features), dtype = weight.shape, weight.dtype
    result = init(weight, rank, scaling)
    if not isinstance(result, tuple) or len(result) != 3:
        raise ValueError(f"init {init!r} returned {type(result).__name__}, but it must return (A, B, residual or None)")
    shapes = {"A": (rank, in_features), "B": (out_features, rank), "residual": (out_features, in_features)}
    for (name, shape), value in zip(shapes.items(), result, strict=True):
        if value is None and name == "residual":
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"init {init!r} returned {got} as {name}, but it must be a tensor of a floating dtype")
        if value.shape != shape:
            raise ValueError(f"init {init!r} returned {name} {list(value.shape)}, but it must be {list(shape)}")
        if not value.isfinite().all():
            raise ValueError(f"init {init!r} returned {name} with values that are not finite")
    return Start(*(None if value is None else value.detach().to("cpu", dtype, copy=True) for value in result))
