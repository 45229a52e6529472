"""LoRA's cases for a GPU: what `bench/lora.py --device cuda` measures, most telling first.

"forward" and "train" replay CUDA graphs, so that they show the device's time alone; "eager" is what a loop in Python
sees. All in bfloat16.
"""

from __future__ import annotations

import functools
import math

import gpu
import torch
from harness import BASE, Case, Contender, Effort, Floor, Target
from lora_batches import OURS_ALONE, OURS_TOGETHER, Mixed, Shared, mixed_contenders, shared_contenders
from lora_contenders import (
    BlockShape,
    Problem,
    block_contenders,
    forward_contenders,
    saved_contenders,
    train_contenders,
)
from lora_kinds import OURS, OURS_FP32, PEFT, PEFT_AUTOCAST, PEFT_FP32, RANK, UNSLOTH

TOKENS = (2048, 8192, 512, 16, 1)
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
RANKS = (8, 64)
QKV = (2048, 4096, (4096, 1024, 1024))  # tokens and sizes of Llama 3 8B's query, key and value
MIXED = ((16, 1, 4096, 8), (8, 256, 4096, 8))  # rows, tokens of each, size, adapters
DROPOUTS = (0.0, 0.1)
PARTS = ("block", "train", "forward", "shared", "mixed", "saved", "eager")
DEVICE, DTYPE = "cuda", torch.bfloat16

#: With many tokens, the most that the forward and that training may take over the frozen base.
FORWARD_LIMIT, TRAIN_LIMIT, WIDE_LIMIT, DROPOUT_ADDS = 1.08, 1.12, 1.15, 0.03
#: One token, over the base's matrix-vector product.
DECODE_LIMIT = 1.15
#: With many tokens and dropout, how many times faster than others.
FASTER = ((PEFT_AUTOCAST, 1.6), (PEFT, 1.25), (UNSLOTH, 1.2))

#: Where torch.compile of PEFT is measured too: compiling takes longer than measuring.
COMPILED = (2048, 16)


def floor(problem: Problem, training: bool, bandwidth: float, rate: float) -> Floor:
    """The larger of operations over the matrix rate and bytes over the bandwidth, each tensor touched once."""
    m, k, n = problem.tokens, problem.in_features, problem.out_features
    base = (4 if training else 2) * m * k * n
    lora = (6 if training else 2) * m * problem.parameters
    width = problem.dtype.itemsize
    # forward reads x and W and writes y; backward reads dy and W, and x for dA, and writes dx
    base_bytes = width * (k * n + m * (k + n)) + (width * (k * n + m * (k + n)) if training else 0)
    lora_bytes = width * problem.parameters * (3 if training else 1) + (width * m * k if training else 0)
    seconds = max((base + lora) / rate, (base_bytes + lora_bytes) / bandwidth)
    law = "the larger of operations / measured matmul rate and bytes / measured copy bandwidth"
    return Floor(seconds, seconds / max(base / rate, base_bytes / bandwidth), law)


def cases(bandwidth: float, rate: float, last_cache: int, parts: tuple[str, ...], quick: bool) -> list[Case]:
    """All cases of the parts asked for; `quick`: a few of each part."""
    made: list[Case] = []
    for part in (p for p in PARTS if p in parts):
        if part == "block":
            made += [_block(p, mode) for p in DROPOUTS for mode in (("graph",) if quick else ("graph", "eager"))]
        elif part == "shared":
            made += [_shared(p, last_cache) for p in DROPOUTS]
        elif part == "mixed":
            made += [_mixed(*sizes, last_cache) for sizes in MIXED]
        elif part == "saved":
            made += [_saved(problem) for problem in _problems((2048,), SHAPES[:1], DROPOUTS)]
        else:
            made += [_linear(problem, part, bandwidth, rate, last_cache) for problem in _grid(part, quick)]
    return made


def _grid(part: str, quick: bool) -> list[Problem]:
    dropouts = (0.0,) if part == "forward" else DROPOUTS
    if quick:
        return _problems((2048, 16), SHAPES[:1], dropouts[-1:])
    if part == "eager":
        return _problems(TOKENS, SHAPES[:1], dropouts)
    tokens = (8192, 2048, 16)
    other_ranks = [problem for rank in RANKS for problem in _problems(tokens, SHAPES[:1], dropouts, rank)]
    return _problems(TOKENS, SHAPES, dropouts) + other_ranks


def _problems(tokens, shapes, dropouts, rank: int = RANK) -> list[Problem]:
    return [Problem(m, k, n, DTYPE, p, rank, DEVICE) for k, n in shapes for m in tokens for p in dropouts]


def _title(problem: Problem) -> str:
    text = f"M={problem.tokens} {problem.in_features}->{problem.out_features}"
    return f"{text} r={problem.rank} p={problem.dropout:g}"


def _linear(problem: Problem, part: str, bandwidth: float, rate: float, last_cache: int) -> Case:
    training = part != "forward"
    headline = problem.in_features == problem.out_features and problem.rank == RANK
    compiled = headline and part != "eager" and problem.tokens in COMPILED

    def build() -> tuple[list[Contender], int]:
        if training:
            contenders, sets = train_contenders(problem, compiled, last_cache)
        else:
            contenders, sets = forward_contenders(problem, False, compiled, last_cache)
        return (contenders if part == "eager" else gpu.graphed(contenders, sets, _ours)), sets

    return Case(
        f"{part} {_title(problem)}",
        part,
        problem.facts,
        build,
        _targets(problem, part),
        floor(problem, training, bandwidth, rate),
    )


def _targets(problem: Problem, part: str) -> tuple[Target, ...]:
    if part == "eager":
        return ()
    if problem.tokens == 1:
        square = problem.in_features == problem.out_features
        return (Target(OURS, BASE, DECODE_LIMIT),) if part == "forward" and square and problem.rank == RANK else ()
    if problem.tokens < 8192:
        return (Target(OURS, PEFT, 1.0), Target(OURS_FP32, PEFT_FP32, 1.0))
    limit = WIDE_LIMIT if problem.rank > RANK else FORWARD_LIMIT if part == "forward" else TRAIN_LIMIT
    targets = [Target(OURS, BASE, limit + (DROPOUT_ADDS if problem.dropout else 0))]
    if problem.dropout and problem.rank == RANK:
        targets += [Target(OURS, peer, 1 / times) for peer, times in FASTER]
    return tuple(targets)


def _ours(name: str) -> bool:
    return name == BASE or name.startswith(OURS)


def _shared(p: float, last_cache: int) -> Case:
    shared = Shared(*QKV, DTYPE, p, DEVICE)

    def build() -> tuple[list[Contender], int]:
        contenders, sets = shared_contenders(shared, last_cache)
        return gpu.graphed(contenders, sets, _ours), sets

    targets = (Target(OURS_TOGETHER, OURS_ALONE, 1.0), Target(OURS_TOGETHER, PEFT, 1.0))
    sizes = "+".join(map(str, shared.out_features))
    name = f"shared M={shared.tokens} {shared.in_features}->{sizes} p={p:g}"
    return Case(name, "shared", shared.facts, build, targets)


def _mixed(rows: int, tokens: int, size: int, adapters: int, last_cache: int) -> Case:
    mixed = Mixed(rows, tokens, size, adapters, DTYPE, DEVICE)

    def build() -> tuple[list[Contender], int]:
        contenders, sets = mixed_contenders(mixed, last_cache)
        return gpu.graphed(contenders, sets, _ours), sets

    name = f"mixed {size} {rows}x{tokens} tokens, {adapters} adapters"
    return Case(name, "mixed", mixed.facts, build, (Target(OURS, PEFT, 1.0),))


def _saved(problem: Problem) -> Case:
    m, k = problem.tokens, problem.in_features
    bound = m * k * problem.dtype.itemsize + 4 * m * problem.rank + (m * math.ceil(k / 8) if problem.dropout else 0)
    targets = tuple(Target(name, "x + S + one bit per element", bound, "saved_bytes") for name in (OURS, OURS_FP32))
    build = functools.partial(saved_contenders, problem)
    return Case(f"saved {_title(problem)}", "saved", problem.facts, build, targets, timed=False)


def _block(p: float, mode: str) -> Case:
    """Llama 3 8B's decoder layer."""
    shape = BlockShape(hidden=4096, intermediate=14336, heads=32, key_value_heads=8, tokens=2048)

    def build() -> tuple[list[Contender], int]:
        contenders, sets = block_contenders(shape, DTYPE, p, DEVICE, gpu.peak_bytes)
        return (gpu.graphed(contenders, sets, _ours) if mode == "graph" else contenders), sets

    facts = {"tokens": shape.tokens, "hidden": shape.hidden, "intermediate": shape.intermediate, "dropout": p}
    return Case(f"block {shape.hidden} {mode} p={p:g}", "block", facts, build, (Target(OURS, PEFT, 1.0),))


def effort(case: Case) -> Effort:
    seconds = 4.0 if case.group == "block" else 1.5
    return Effort(seconds=seconds, fewest=12, most=60, sample_seconds=0.002, attempts=2)
