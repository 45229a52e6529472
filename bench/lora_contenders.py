"""LoRA's contenders: peftops, Hugging Face PEFT and the frozen base, on one linear and on one Llama decoder layer.

Contenders of a case share the weights and inputs; their factors hold the same values. Every result is checked against
the law in float64 before it is timed, under dropout with the very mask that the contender drew.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import harness
import torch
from harness import BASE, Contender, Unavailable
from lora_kinds import RANK, SCALE, Kind, factors, fill_factors, frozen, kinds, packed_kinds, shell
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Problem:
    """One linear with LoRA: x [tokens, in_features], weight [out_features, in_features]."""

    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    dropout: float = 0.0
    rank: int = RANK
    device: str = "cpu"

    @property
    def facts(self) -> dict:
        """What a record says about it."""
        return {
            "tokens": self.tokens,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dropout": self.dropout,
            "rank": self.rank,
        }

    @property
    def parameters(self) -> int:
        """Elements of the two factors."""
        return self.rank * (self.in_features + self.out_features)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def weight(self) -> nn.Parameter:
        return frozen(self.out_features, self.in_features, dtype=self.dtype, device=self.device)


# ---- reference -------------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The law in float64: y = x W^T + scale * (mask * x / (1 - p)) A^T B^T."""

    def __init__(self, weight: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.double(), requires_grad=False)
        if lora_a is not None:
            self.lora_a, self.lora_b = nn.Parameter(lora_a.detach().double()), nn.Parameter(lora_b.detach().double())
        self.mask: Tensor | None = None
        self.dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.t()
        if not hasattr(self, "lora_a"):
            return y
        kept = x if self.mask is None else x * self.mask / (1 - self.dropout)
        return y + SCALE * kept @ self.lora_a.t() @ self.lora_b.t()


def gradients(module: Callable, x: Tensor, dy: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """(y, dx, parameter gradients...)."""
    y = module(x)
    return y, *torch.autograd.grad(y, [x, *parameters], dy)


def relative_error(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float, who: str) -> float:
    """Largest |got - wanted| / |wanted| (Frobenius norms); AssertionError above the tolerance."""
    worst = 0.0
    for index, (g, w) in enumerate(zip(got, wanted, strict=True)):
        error = ((g.double() - w).norm() / w.norm()).item()
        if not error <= tolerance:
            raise AssertionError(
                f"{who}: result {index} of (y, dx, da, db, ...) is wrong: relative error {error:.2e} > {tolerance:.0e}"
            )
        worst = max(worst, error)
    return worst


def probed_mask(layer: Callable, x: Tensor, lora_a: Tensor, lora_b: Tensor, seed: int, p: float) -> Tensor:
    """The dropout mask that `layer` draws after `manual_seed(seed)`: with factors and dy of ones, dx is huge exactly
    where x was kept.
    """
    kept_a, kept_b = lora_a.detach().clone(), lora_b.detach().clone()
    with torch.no_grad():
        lora_a.fill_(1), lora_b.fill_(1)
    torch.manual_seed(seed)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    with torch.no_grad():
        lora_a.copy_(kept_a), lora_b.copy_(kept_b)
    mask = dx > 0.5 * SCALE * lora_b.numel()
    share, noise = mask.double().mean().item(), (p * (1 - p) / mask.numel()) ** 0.5
    if abs(share - (1 - p)) > 5 * noise + 1e-4:
        raise AssertionError(f"dropout {p} keeps {share:.4f} of the elements")
    return mask


# ---- one linear ------------------------------------------------------------------------------------------------------


def rotation(bytes_per_set: int, last_cache: int) -> int:
    """Number of input sets: together four times the last cache, so that none is cached when its turn comes again."""
    return max(2, min(256, math.ceil(4 * last_cache / bytes_per_set)))


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _or_unavailable(check: Callable[[], float], kind: Kind) -> Callable[[], float]:
    """A peer that torch.compile cannot take here is left out; a wrong result still fails."""

    def checked() -> float:
        try:
            return check()
        except AssertionError:
            raise
        except Exception as error:
            if not kind.compiled:
                raise
            raise Unavailable(f"torch.compile: {str(error).strip().splitlines()[0]}") from error

    return checked


def train_contenders(problem: Problem, compiled: bool, last_cache: int) -> tuple[list[Contender], int]:
    shape = problem.tokens, problem.in_features, problem.out_features
    sets = rotation((shape[1] * shape[2] + shape[0] * (shape[1] + shape[2])) * problem.dtype.itemsize, last_cache)
    torch.manual_seed(0)
    weights = [problem.weight() for _ in range(sets)]
    xs = [problem.randn(problem.tokens, problem.in_features).requires_grad_() for _ in range(sets)]
    dys = [problem.randn(problem.tokens, problem.out_features) for _ in range(sets)]

    def contender(name: str, layers: list[nn.Module], call: Callable, mask_p: float) -> Contender:
        parameters = [factors(layer) for layer in layers]

        def step(i: int) -> object:
            return torch.autograd.grad(call(layers[i], xs[i]), [xs[i], *parameters[i]], dys[i])

        def check() -> float:
            reference = Reference(weights[0], *parameters[0])
            layer = functools.partial(call, layers[0])
            if mask_p > 0:
                reference.mask = probed_mask(layer, xs[0], *parameters[0], seed=7, p=mask_p).double()
                reference.dropout = mask_p
            torch.manual_seed(7)
            got = gradients(layer, xs[0], dys[0], parameters[0])
            x = xs[0].detach().double().requires_grad_()
            wanted = gradients(reference, x, dys[0].double(), factors(reference))
            return relative_error(got, wanted, TOLERANCE[problem.dtype], name)

        return Contender(name, step, check)

    result = [contender(BASE, [shell(w) for w in weights], _call, 0.0)]
    for kind in kinds(problem.dtype, compiled):
        layers = adapted(problem, kind, weights, training=True)
        c = contender(kind.name, layers, kind.run(_call, problem.device), problem.dropout)
        result.append(Contender(c.name, c.step, _or_unavailable(c.check, kind)))
    return result, sets


def adapted(problem: Problem, kind: Kind, weights: list[nn.Parameter], training: bool) -> list[nn.Module]:
    """The contender's layers, one per input set."""
    layers = []
    for i, weight in enumerate(weights):
        dropout = problem.dropout if training else 0.0
        layers.append(kind.builder(shell(weight), dropout, kind.factor_dtype, problem.rank).train(training))
        fill_factors(layers[-1], problem.in_features, seed=i)
    return layers


def forward_contenders(problem: Problem, cached: bool, compiled: bool, last_cache: int) -> tuple[list[Contender], int]:
    weight_bytes = problem.in_features * problem.out_features * problem.dtype.itemsize
    sets = 1 if cached else rotation(weight_bytes, last_cache)
    torch.manual_seed(0)
    weights = [problem.weight() for _ in range(sets)]
    xs = [problem.randn(problem.tokens, problem.in_features) for _ in range(sets)]

    def contender(name: str, layers: list[nn.Module], call: Callable) -> Contender:
        @torch.no_grad()
        def step(i: int) -> object:
            return call(layers[i], xs[i])

        def check() -> float:
            with torch.no_grad():
                wanted = Reference(weights[0], *factors(layers[0]))(xs[0].double())
            return relative_error((step(0),), (wanted,), TOLERANCE[problem.dtype], name)

        return Contender(name, step, check)

    result = [contender(BASE, [shell(w).eval() for w in weights], _call)]
    for kind in kinds(problem.dtype, compiled) + (packed_kinds() if problem.device == "cpu" else []):
        layers = adapted(problem, kind, weights, training=False)
        c = contender(kind.name, layers, kind.run(_call, problem.device))
        result.append(Contender(c.name, c.step, _or_unavailable(c.check, kind)))
    return result, sets


def saved_contenders(problem: Problem) -> tuple[list[Contender], int]:
    weight = problem.weight()
    x = problem.randn(problem.tokens, problem.in_features).requires_grad_()
    result = []
    for kind in kinds(problem.dtype, compiled=False):
        (layer,) = adapted(problem, kind, [weight], training=True)
        held = [*layer.parameters(), *layer.buffers()]
        facts = functools.partial(_saved_facts, functools.partial(layer, x), held)
        result.append(Contender(kind.name, lambda i: None, facts=facts))
    return result, 1


def _saved_facts(forward: Callable, held: list[Tensor]) -> dict:
    return {"saved_bytes": harness.saved_bytes(forward, held)}


# ---- one Llama decoder layer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockShape:
    """Llama 3.2 1B's decoder layer."""

    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    key_value_heads: int = 8
    tokens: int = 512


def llama_block(shape: BlockShape, dtype: torch.dtype, device: str = "cpu") -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """(decoder layer with random weights, its rotary embeddings)."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_hidden_layers=1,
        attn_implementation="sdpa",
    )
    block = LlamaDecoderLayer(config, 0).requires_grad_(False)
    position_ids = torch.arange(shape.tokens).unsqueeze(0)
    rotary = LlamaRotaryEmbedding(config)(torch.zeros(1), position_ids)
    return block.to(device, dtype), tuple(r.to(device, dtype) for r in rotary)


def with_layers(block: nn.Module, replace: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of the block that shares its weights, every linear replaced."""
    block = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, replace(linear))
    return block


def _block_call(module: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    y = module(x, position_embeddings=rotary)
    return y[0] if isinstance(y, tuple) else y


def block_contenders(
    shape: BlockShape,
    dtype: torch.dtype,
    p: float,
    device: str = "cpu",
    peak_bytes: Callable[[Callable[[], object]], int] = harness.peak_bytes,
) -> tuple[list[Contender], int]:
    torch.manual_seed(0)
    block, rotary = llama_block(shape, dtype, device)
    sets = 2  # the weights alone exceed the caches

    def randn() -> Tensor:
        return torch.randn(1, shape.tokens, shape.hidden, device=device).to(dtype)

    xs = [randn().requires_grad_() for _ in range(sets)]
    dys = [randn() for _ in range(sets)]

    @functools.cache  # the factors hold the same values in every contender
    def reference_results(with_factors: bool) -> tuple[Tensor, ...]:
        """In float64, with every linear replaced by the law."""
        seeds = itertools.count()

        def law(linear: nn.Linear) -> nn.Module:
            if not with_factors:
                return Reference(linear.weight)
            lora_a = torch.empty(RANK, linear.in_features, device=device)
            lora_b = torch.empty(linear.out_features, RANK, device=device)
            exact = Reference(linear.weight, lora_a, lora_b)
            fill_factors(exact, linear.in_features, next(seeds))
            return exact

        exact = with_layers(block, law)
        for norm in (exact.input_layernorm, exact.post_attention_layernorm):
            norm.weight = nn.Parameter(norm.weight.double(), requires_grad=False)
        x, cos_sin = xs[0].detach().double().requires_grad_(), tuple(r.double() for r in rotary)
        return gradients(lambda x: _block_call(exact, x, cos_sin), x, dys[0].double(), factors(exact))

    def contender(name: str, module: nn.Module, call: Callable = _block_call) -> Contender:
        parameters = factors(module)

        def step(i: int) -> object:
            return torch.autograd.grad(call(module, xs[i], rotary), [xs[i], *parameters], dys[i])

        def check() -> float:
            module.eval()  # without dropout: masks are checked on the single linears
            got = gradients(lambda x: call(module, x, rotary), xs[0], dys[0], parameters)
            module.train()
            wanted = reference_results(name != BASE)
            # Several roundings follow each other here: five times what a single linear is allowed.
            return relative_error(got, wanted, 5 * TOLERANCE[dtype], name)

        def facts() -> dict:
            held = [*module.parameters(), *module.buffers(), *rotary]
            return {
                "saved_bytes": harness.saved_bytes(lambda: call(module, xs[0], rotary), held),
                "peak_bytes": peak_bytes(lambda: step(0)),
            }

        return Contender(name, step, check, facts)

    result = [contender(BASE, with_layers(block, lambda linear: shell(linear.weight)).train())]
    for kind in kinds(dtype, compiled=False):
        seeds = itertools.count()

        def replace(linear: nn.Linear, kind: Kind = kind, seeds=seeds) -> nn.Module:
            layer = kind.builder(shell(linear.weight), p, kind.factor_dtype)
            fill_factors(layer, linear.in_features, next(seeds))
            return layer

        result.append(contender(kind.name, with_layers(block, replace).train(), kind.run(_block_call, device)))
    return result, sets
