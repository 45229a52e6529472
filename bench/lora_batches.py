"""Contenders of LoRA's cases with several adapters: projections that share x, and one adapter per row of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import BASE, Contender
from lora_contenders import TOLERANCE, Problem, Reference, probed_mask, relative_error, rotation
from lora_kinds import ALPHA, OURS, PEFT, RANK, SCALE, Kind, factors, fill_factors, kinds, peft_layer, shell
from torch import Tensor, nn

OURS_TOGETHER, OURS_ALONE = f"{OURS}, one call", f"{OURS}, a call each"


# ---- projections that share x ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Projections of one x [tokens, in_features], trained: query, key and value, say."""

    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    dtype: torch.dtype
    dropout: float = 0.0
    device: str = "cpu"

    @property
    def facts(self) -> dict:
        return {
            "tokens": self.tokens,
            "in_features": self.in_features,
            "out_features": list(self.out_features),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dropout": self.dropout,
            "rank": RANK,
        }

    def problem(self, out_features: int) -> Problem:
        return Problem(self.tokens, self.in_features, out_features, self.dtype, self.dropout, RANK, self.device)


class Together(nn.Module):
    """All projections in one call of `lora_linear_multi`."""

    def __init__(self, layers: list[nn.Module], dropout: float):
        super().__init__()
        self.layers, self.dropout = nn.ModuleList(layers), dropout
        self.register_buffer("scales", torch.full((len(layers),), SCALE, device=layers[0].weight.device))

    def forward(self, x: Tensor) -> list[Tensor]:
        weights, (a, b) = [layer.weight for layer in self.layers], zip(*map(factors, self.layers), strict=True)
        seeds = torch.randint(2**63 - 1, (len(weights),), device=x.device) if self.dropout else None
        return torch.ops.peftops.lora_linear_multi(
            x, weights, [None] * len(weights), list(a), list(b), self.scales, self.dropout, seeds
        )


class Apart(nn.Module):
    """A call for each projection."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def shared_contenders(shared: Shared, last_cache: int) -> tuple[list[Contender], int]:
    tokens, k, ns = shared.tokens, shared.in_features, shared.out_features
    sets = rotation((k * sum(ns) + tokens * (k + sum(ns))) * shared.dtype.itemsize, last_cache)
    torch.manual_seed(0)
    problems = [shared.problem(n) for n in ns]
    weights = [[problem.weight() for problem in problems] for _ in range(sets)]
    xs = [problems[0].randn(tokens, k).requires_grad_() for _ in range(sets)]
    dys = [[problem.randn(tokens, problem.out_features) for problem in problems] for _ in range(sets)]

    def contender(name: str, modules: list[nn.Module], run: Callable, mask_p: float) -> Contender:
        parameters = [factors(module) for module in modules]
        calls = [run(module) for module in modules]

        def step(i: int) -> object:
            return torch.autograd.grad(calls[i](xs[i]), [xs[i], *parameters[i]], dys[i])

        def check() -> float:
            pairs = _pairs(parameters[0], len(ns))
            references = [Reference(w, *pair) for w, pair in zip(weights[0], pairs, strict=True)]
            for j, reference in enumerate(references if mask_p else ()):
                mask = probed_mask(_output(calls[0], j), xs[0], *pairs[j], seed=7, p=mask_p)
                reference.mask, reference.dropout = mask.double(), mask_p
            torch.manual_seed(7)
            got = _all_gradients(calls[0], xs[0], dys[0], parameters[0])
            x = xs[0].detach().double().requires_grad_()
            exact = [p for reference in references for p in factors(reference)]
            wanted = _all_gradients(lambda x: [r(x) for r in references], x, [dy.double() for dy in dys[0]], exact)
            return relative_error(got, wanted, TOLERANCE[shared.dtype], name)

        return Contender(name, step, check)

    def layers(kind: Kind, i: int) -> list[nn.Module]:
        made = [kind.builder(shell(w), shared.dropout, kind.factor_dtype, RANK).train() for w in weights[i]]
        for j, layer in enumerate(made):
            fill_factors(layer, k, seed=i * len(ns) + j)
        return made

    result = [contender(BASE, [Apart([shell(w) for w in ws]) for ws in weights], lambda m: m, 0.0)]
    for kind in kinds(shared.dtype, compiled=False):
        run = functools.partial(kind.run, device=shared.device)
        if kind.name == OURS:
            together = [Together(layers(kind, i), shared.dropout) for i in range(sets)]
            result.append(contender(OURS_TOGETHER, together, run, shared.dropout))
        name = OURS_ALONE if kind.name == OURS else kind.name
        result.append(contender(name, [Apart(layers(kind, i)) for i in range(sets)], run, shared.dropout))
    return result, sets


def _pairs(parameters: list[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    each = len(parameters) // count
    return [tuple(parameters[j * each : (j + 1) * each]) for j in range(count)]


def _output(call: Callable, j: int) -> Callable:
    return lambda x: call(x)[j]


def _all_gradients(call: Callable, x: Tensor, dys: list[Tensor], parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """(outputs..., dx, parameter gradients...)."""
    ys = call(x)
    return (*ys, *torch.autograd.grad(ys, [x, *parameters], dys))


# ---- one adapter per row ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed:
    """Inference on a batch x [rows, tokens, in_features] whose rows use `adapters` adapters in turn."""

    rows: int
    tokens: int
    size: int
    adapters: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def facts(self) -> dict:
        return {
            "tokens": self.rows * self.tokens,
            "in_features": self.size,
            "out_features": self.size,
            "adapters": self.adapters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rank": RANK,
        }


def mixed_contenders(mixed: Mixed, last_cache: int) -> tuple[list[Contender], int]:
    problem = Problem(mixed.rows * mixed.tokens, mixed.size, mixed.size, mixed.dtype, device=mixed.device)
    sets = rotation(mixed.size**2 * mixed.dtype.itemsize, last_cache)
    torch.manual_seed(0)
    weights = [problem.weight() for _ in range(sets)]
    xs = [problem.randn(mixed.rows, mixed.tokens, mixed.size) for _ in range(sets)]
    names = [f"adapter{i}" for i in range(mixed.adapters)]
    layers = [_peft_with(shell(weight), names) for weight in weights]
    a = [torch.stack([layer.lora_A[name].weight.detach() for name in names]) for layer in layers]
    b = [torch.stack([layer.lora_B[name].weight.detach() for name in names]) for layer in layers]
    scales = torch.full((mixed.adapters,), SCALE, device=mixed.device)
    turns = torch.arange(mixed.rows, device=mixed.device) % mixed.adapters
    ids, called = turns[:, None].expand(mixed.rows, mixed.tokens), [names[i] for i in turns.tolist()]

    def contender(name: str, step: Callable[[int], Tensor], adapted: bool) -> Contender:
        def check() -> float:
            x, weight = xs[0].double(), weights[0].double()
            wanted = x @ weight.t()
            for row in range(mixed.rows if adapted else 0):
                i = row % mixed.adapters
                wanted[row] += SCALE * x[row] @ a[0][i].double().t() @ b[0][i].double().t()
            return relative_error((step(0),), (wanted,), TOLERANCE[mixed.dtype], name)

        return Contender(name, torch.no_grad()(step), torch.no_grad()(check))

    grouped = torch.ops.peftops.grouped_lora_linear
    return [
        contender(BASE, lambda i: nn.functional.linear(xs[i], weights[i]), False),
        contender(OURS, lambda i: grouped(xs[i], weights[i], None, a[i], b[i], scales, ids), True),
        contender(PEFT, lambda i: layers[i](xs[i], adapter_names=called), True),
    ], sets


def _peft_with(linear: nn.Linear, names: list[str]) -> nn.Module:
    """PEFT's layer with these adapters, in the base's dtype."""
    layer = peft_layer(linear, 0.0, None)
    from peft import LoraConfig

    config = LoraConfig(r=RANK, lora_alpha=ALPHA)
    for name in names:
        layer.update_layer(name, RANK, lora_alpha=ALPHA, config=config)
    for i, name in enumerate(names):
        adapter = nn.ModuleList([layer.lora_A[name], layer.lora_B[name]]).to(linear.weight.dtype)
        down, up = (module.weight for module in adapter)
        values = nn.ParameterDict({"lora_a": down, "lora_b": up})
        fill_factors(values, linear.in_features, seed=i)
    return layer.eval()
