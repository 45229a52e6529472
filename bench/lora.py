"""LoRA: what a linear with rank-16 factors costs over the frozen linear, beside Hugging Face PEFT.

    python bench/lora.py                  all cases, about ten minutes; writes bench/results/lora-<device>.json
    python bench/lora.py --quick          small sizes, under a minute, writes nothing: shows that it runs
    python bench/lora.py --only 'decode'  cases whose name matches; writes nothing unless --output says where

Groups: "train" = forward and backward of one linear over M=512 tokens, x asks for a gradient, the base weight is
frozen; "decode" = forward without gradients; "saved" = bytes kept for backward; "block" = one Llama decoder layer with
LoRA on its seven linears. "fp32 factors" means float32 factors over a bfloat16 base, PEFT's default.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import harness
import report
import torch
from harness import BASE, Case, Effort, Floor, Target
from lora_contenders import (
    ALPHA,
    OURS,
    OURS_FP32,
    PEFT,
    PEFT_FP32,
    RANK,
    BlockShape,
    block_contenders,
    decode_contenders,
    saved_contenders,
    train_contenders,
)

DTYPES = (torch.bfloat16, torch.float32)
DROPOUTS = (0.0, 0.1)

# The figures that issue 2 asks for: (K = N, dropout) -> most that training may take over the frozen base linear.
TRAIN_LIMIT = {(4096, 0.0): 1.05, (4096, 0.1): 1.08, (1024, 0.0): 1.12, (1024, 0.1): 1.18}
DECODE_OVER_PEFT_1024 = 0.7
DECODE_OVER_BASE_4096 = 1.10


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured: bytes per second from memory, operations per second by dtype."""

    bandwidth: float
    rate: dict[torch.dtype, float]


def measure_ceilings(quick: bool, last_cache: int) -> Ceilings:
    sizes = ((256, 256, 256),) if quick else ((512, 4096, 4096), (2048, 2048, 2048))
    bandwidth = harness.read_bandwidth(last_cache if quick else max(8 * last_cache, 256 << 20))
    return Ceilings(bandwidth, {dtype: harness.matmul_rate(dtype, sizes) for dtype in (torch.float32, torch.bfloat16)})


def train_floor(tokens: int, size: int, dtype: torch.dtype, ceilings: Ceilings) -> Floor:
    base, lora = 4 * tokens * size * size, 12 * tokens * size * RANK
    law = "operations of base and LoRA / measured matmul rate"
    return Floor((base + lora) / ceilings.rate[dtype], 1 + lora / base, law)


def decode_floor(tokens: int, size: int, dtype: torch.dtype, ceilings: Ceilings) -> Floor:
    parts = size * size + 2 * size * RANK
    read, compute = parts * dtype.itemsize / ceilings.bandwidth, 2 * tokens * parts / ceilings.rate[dtype]
    law = "the larger of bytes of weight and factors / measured read bandwidth and operations / measured matmul rate"
    return Floor(max(read, compute), 1 + 2 * RANK / size, law)


def train_case(tokens, size, dtype, p, quick, ceilings, last_cache) -> Case:
    limit = TRAIN_LIMIT.get((size, p))
    pairs = [(OURS, PEFT)] + ([(OURS_FP32, PEFT_FP32)] if dtype != torch.float32 else [])
    targets = (
        [t for ours, peer in pairs for t in (Target(ours, BASE, limit or 0), Target(ours, peer, 1.0))] if limit else []
    )
    build = functools.partial(train_contenders, tokens, size, dtype, p, not quick, last_cache)
    facts = {"tokens": tokens, "in_features": size, "out_features": size, "dtype": _name(dtype), "dropout": p}
    name = f"train {_name(dtype)} {size} p={p:g}"
    return Case(name, "train", facts, build, tuple(targets), train_floor(tokens, size, dtype, ceilings))


def decode_case(tokens, size, dtype, cached, quick, ceilings, last_cache) -> Case:
    targets = []
    if tokens == 1 and size == 1024:
        targets = [Target(OURS, PEFT, DECODE_OVER_PEFT_1024)]
    if tokens == 1 and size == 4096:
        targets = [Target(OURS, BASE, DECODE_OVER_BASE_4096)]
    build = functools.partial(decode_contenders, tokens, size, dtype, cached, tokens == 1 and not quick, last_cache)
    facts = {
        "tokens": tokens,
        "in_features": size,
        "out_features": size,
        "dtype": _name(dtype),
        "weights_cached": cached,
    }
    name = f"decode {_name(dtype)} {size} M={tokens} weights {'cached' if cached else 'from memory'}"
    floor = None if cached else decode_floor(tokens, size, dtype, ceilings)
    return Case(name, "decode", facts, build, tuple(targets), floor)


def saved_case(tokens, size, dtype, p) -> Case:
    bound = tokens * size * dtype.itemsize + 4 * tokens * RANK + (tokens * math.ceil(size / 8) if p > 0 else 0)
    names = [OURS] + ([OURS_FP32] if dtype != torch.float32 else [])
    facts = {"tokens": tokens, "in_features": size, "out_features": size, "dtype": _name(dtype), "dropout": p}
    targets = tuple(Target(name, "x + S + one bit per element", bound, "saved_bytes") for name in names)
    build = functools.partial(saved_contenders, tokens, size, dtype, p)
    return Case(f"saved {_name(dtype)} {size} p={p:g}", "saved", facts, build, targets, timed=False)


def block_case(shape: BlockShape, dtype, p, quick) -> Case:
    pairs = [(OURS, PEFT)] + ([(OURS_FP32, PEFT_FP32)] if dtype != torch.float32 else [])
    targets = () if quick else tuple(Target(ours, peer, 1.0) for ours, peer in pairs)
    facts = {
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "dtype": _name(dtype),
        "dropout": p,
    }
    name = f"block {_name(dtype)} {shape.hidden} p={p:g}"
    return Case(name, "block", facts, functools.partial(block_contenders, shape, dtype, p), targets)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def all_cases(ceilings: Ceilings, last_cache: int) -> list[Case]:
    """What `make bench` measures."""
    sizes = (4096, 1024)
    cases = [train_case(512, n, d, p, False, ceilings, last_cache) for d in DTYPES for n in sizes for p in DROPOUTS]
    for dtype in DTYPES:
        for size, cached in ((4096, False), (1024, False), (1024, True)):
            cases += [decode_case(m, size, dtype, cached, False, ceilings, last_cache) for m in (1, 4, 16)]
    cases += [saved_case(512, n, d, p) for d in DTYPES for n in sizes for p in DROPOUTS]
    return cases + [block_case(BlockShape(), d, p, False) for d in DTYPES for p in DROPOUTS]


def quick_cases(ceilings: Ceilings) -> list[Case]:
    """Every kind of case, small; no targets, for such sizes have none."""
    cache = 1 << 17
    cases = [train_case(64, 256, d, p, True, ceilings, cache) for d in DTYPES for p in DROPOUTS]
    cases += [decode_case(1, 256, d, cached, True, ceilings, cache) for d in DTYPES for cached in (False, True)]
    cases += [saved_case(64, 256, d, p) for d in DTYPES for p in DROPOUTS]
    return cases + [block_case(BlockShape(128, 256, 4, 2, 64), d, 0.1, True) for d in DTYPES]


def effort(case: Case, quick: bool) -> Effort:
    if quick:
        return Effort(seconds=0, fewest=4, most=4, sample_seconds=0, attempts=1)
    if case.group == "decode":
        return Effort(seconds=4, fewest=30, most=200, sample_seconds=0.004)
    return Effort(seconds=25, fewest=8, most=30) if case.group == "block" else Effort(seconds=16)


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of LoRA over the frozen linear, beside Hugging Face PEFT.")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a smoke run, no figures")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default bench/results/lora-<device>.json for a full run, else none)"
    )
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but must be at least 1")
    missing = [name for name in ("peftops", "peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"bench/lora.py needs {', '.join(missing)}: pip install 'peftops[bench]'", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    device = harness.this_cpu()
    facts = harness.environment(device, ("torch", "peft", "transformers"))
    if facts["load_before"] > 0.5:
        print(f"load average is {facts['load_before']:.1f}: other work disturbs the figures", file=sys.stderr)
    import peftops
    from peftops import _C

    facts["versions"] = {"peftops": peftops.__version__, **facts["versions"]}
    facts["cpu_level"] = _C.cpu_level()
    ceilings = measure_ceilings(args.quick, device.last_cache)
    cases = quick_cases(ceilings) if args.quick else all_cases(ceilings, device.last_cache)
    cases = [c for c in cases if re.search(args.only or "", c.name)]
    if not cases:
        parser.error(f"--only {args.only}: no case matches")
    facts["ceilings"] = {
        "read_bytes_per_second": ceilings.bandwidth,
        "matmul_operations_per_second": {_name(d): r for d, r in ceilings.rate.items()},
    }
    results = {"family": "lora", **facts, "rank": RANK, "alpha": ALPHA, "quick": args.quick}
    results["cases"] = list(harness.run(cases, lambda case: effort(case, args.quick)))
    output = args.output
    if output is None and not args.quick and not args.only:
        output = harness.RESULTS / f"lora-{device.slug}.json"
    if output is not None:
        harness.write(output, results)
    print(report.screen(results))
    if output is not None:
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
