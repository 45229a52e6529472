"""LoRA: what a linear with factors costs over the frozen linear, beside Hugging Face PEFT and Unsloth's order of work.

    python bench/lora.py                  all cases, about twenty minutes; writes bench/results/lora-<device>.json
    python bench/lora.py --quick          small sizes, under a minute, writes nothing: shows that it runs
    python bench/lora.py --only 'decode'  cases whose name matches; writes nothing unless --output says where
    python bench/lora.py --device cuda    on a GPU (lora_gpu.py), within --budget seconds; --part train: a part of it

Groups: "train" = forward and backward of one linear over M=512 tokens, x asks for a gradient, the base weight is
frozen; "shared" = the same of query, key and value, which share x; "decode" = forward without gradients; "mixed" = the
same of a batch whose rows use different adapters; "saved" = bytes kept for backward; "block" = one Llama decoder layer
with LoRA on its seven linears. "fp32 factors" means float32 factors over a bfloat16 base, PEFT's default. The rank is
16 where a case does not say otherwise.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu
import harness
import lora_gpu
import report
import torch
from harness import BASE, Case, Effort, Floor, Target
from lora_batches import OURS_ALONE, OURS_TOGETHER, Mixed, Shared, mixed_contenders, shared_contenders
from lora_contenders import (
    BlockShape,
    Problem,
    block_contenders,
    forward_contenders,
    saved_contenders,
    train_contenders,
)
from lora_kinds import ALPHA, OURS, OURS_FP32, PACKED, PACKED_BASE, PEFT, PEFT_FP32, RANK, UNSLOTH

_PACKAGES = ("torch", "peft", "transformers")
DTYPES = (torch.bfloat16, torch.float32)
DROPOUTS = (0.0, 0.1)

RANKS = (8, 64)  # beside 16

# (K = N, dropout) -> most that training may take over the frozen base linear.
TRAIN_LIMIT = {(4096, 0.0): 1.04, (4096, 0.1): 1.04, (1024, 0.0): 1.12, (1024, 0.1): 1.18}
DECODE_OVER_PEFT_1024 = 0.7
DECODE_OVER_BASE_4096 = 1.10
# On a packed weight: (tokens, dtype) -> most over the base at K = N = 4096; and what LoRA may take beside it.
PACKED_OVER_BASE = {(1, torch.bfloat16): 1 / 1.4, (16, torch.bfloat16): 1 / 1.5, (16, torch.float32): 1 / 2}
LORA_OVER_PACKED = 1.03


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


def train_floor(problem: Problem, ceilings: Ceilings) -> Floor:
    base = 4 * problem.tokens * problem.in_features * problem.out_features
    lora = 6 * problem.tokens * problem.parameters
    law = "operations of base and LoRA / measured matmul rate"
    return Floor((base + lora) / ceilings.rate[problem.dtype], 1 + lora / base, law)


def decode_floor(tokens: int, size: int, dtype: torch.dtype, ceilings: Ceilings) -> Floor:
    parts = size * size + 2 * size * RANK
    read, compute = parts * dtype.itemsize / ceilings.bandwidth, 2 * tokens * parts / ceilings.rate[dtype]
    law = "the larger of bytes of weight and factors / measured read bandwidth and operations / measured matmul rate"
    return Floor(max(read, compute), 1 + 2 * RANK / size, law)


def train_case(problem: Problem, quick, ceilings, last_cache) -> Case:
    square = problem.in_features == problem.out_features and problem.rank == RANK
    limit = TRAIN_LIMIT.get((problem.in_features, problem.dropout)) if square else None
    pairs = [(OURS, PEFT)] + ([(OURS_FP32, PEFT_FP32)] if problem.dtype != torch.float32 else [])
    targets = [Target(ours, BASE, limit) for ours, _ in pairs] if limit else []
    targets += [] if quick else [Target(ours, peer, 1.0) for ours, peer in (*pairs, (OURS, UNSLOTH))]
    build = functools.partial(train_contenders, problem, square and not quick, last_cache)
    name = f"train {_title(problem)} p={problem.dropout:g}"
    return Case(name, "train", problem.facts, build, tuple(targets), train_floor(problem, ceilings))


def _title(problem: Problem) -> str:
    """Without what most cases have in common."""
    k, n = problem.in_features, problem.out_features
    size, rank = f"{k}" if k == n else f"{k}->{n}", "" if problem.rank == RANK else f" r={problem.rank}"
    return f"{_name(problem.dtype)} {size}{rank}"


def shared_case(shared: Shared, quick, last_cache) -> Case:
    targets = () if quick else (Target(OURS_TOGETHER, PEFT, 1.0), Target(OURS_TOGETHER, OURS_ALONE, 1.0))
    sizes = "+".join(map(str, shared.out_features))
    name = f"shared {_name(shared.dtype)} {shared.in_features}->{sizes} p={shared.dropout:g}"
    return Case(name, "shared", shared.facts, functools.partial(shared_contenders, shared, last_cache), targets)


def mixed_case(mixed: Mixed, quick, last_cache) -> Case:
    targets = () if quick else (Target(OURS, PEFT, 1.0),)
    name = f"mixed {_name(mixed.dtype)} {mixed.size} {mixed.rows}x{mixed.tokens} tokens, {mixed.adapters} adapters"
    return Case(name, "mixed", mixed.facts, functools.partial(mixed_contenders, mixed, last_cache), targets)


def decode_case(tokens, size, dtype, cached, quick, ceilings, last_cache) -> Case:
    targets = []
    if tokens == 1 and size == 1024:
        targets = [Target(OURS, PEFT, DECODE_OVER_PEFT_1024)]
    if tokens == 1 and size == 4096:
        targets = [Target(OURS, BASE, DECODE_OVER_BASE_4096)]
    if (limit := PACKED_OVER_BASE.get((tokens, dtype))) and size == 4096:
        targets += [Target(PACKED, BASE, limit), Target(PACKED, PACKED_BASE, LORA_OVER_PACKED)]
    problem = Problem(tokens, size, size, dtype)
    build = functools.partial(forward_contenders, problem, cached, tokens == 1 and not quick, last_cache)
    facts = {**problem.facts, "weights_cached": cached}
    name = f"decode {_name(dtype)} {size} M={tokens} weights {'cached' if cached else 'from memory'}"
    floor = None if cached else decode_floor(tokens, size, dtype, ceilings)
    return Case(name, "decode", facts, build, tuple(targets), floor)


def saved_case(tokens, size, dtype, p) -> Case:
    bound = tokens * size * dtype.itemsize + 4 * tokens * RANK + (tokens * math.ceil(size / 8) if p > 0 else 0)
    names = [OURS] + ([OURS_FP32] if dtype != torch.float32 else [])
    targets = tuple(Target(name, "x + S + one bit per element", bound, "saved_bytes") for name in names)
    problem = Problem(tokens, size, size, dtype, p)
    build = functools.partial(saved_contenders, problem)
    return Case(f"saved {_name(dtype)} {size} p={p:g}", "saved", problem.facts, build, targets, timed=False)


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
    linears = [Problem(512, n, n, d, p) for d in DTYPES for n in sizes for p in DROPOUTS]
    linears += [Problem(512, 1024, 1024, torch.bfloat16, 0.1, rank) for rank in RANKS]
    linears += [Problem(512, k, n, torch.bfloat16, 0.1) for k, n in ((2048, 8192), (8192, 2048))]
    cases = [train_case(problem, False, ceilings, last_cache) for problem in linears]
    cases += [
        shared_case(Shared(512, 2048, (2048, 512, 512), d, p), False, last_cache) for d in DTYPES for p in DROPOUTS
    ]
    for dtype in DTYPES:
        for size, cached in ((4096, False), (1024, False), (1024, True)):
            cases += [decode_case(m, size, dtype, cached, False, ceilings, last_cache) for m in (1, 4, 16)]
        cases += [mixed_case(Mixed(*sizes, dtype), False, last_cache) for sizes in ((8, 1, 4096, 8), (8, 64, 4096, 8))]
    cases += [saved_case(512, n, d, p) for d in DTYPES for n in sizes for p in DROPOUTS]
    return cases + [block_case(BlockShape(), d, p, False) for d in DTYPES for p in DROPOUTS]


def quick_cases(ceilings: Ceilings) -> list[Case]:
    """Every kind of case, small; no targets, for such sizes have none."""
    cache = 1 << 17
    cases = [train_case(Problem(64, 256, 256, d, p), True, ceilings, cache) for d in DTYPES for p in DROPOUTS]
    cases += [shared_case(Shared(64, 256, (256, 64, 64), d, 0.1), True, cache) for d in DTYPES]
    cases += [decode_case(1, 256, d, cached, True, ceilings, cache) for d in DTYPES for cached in (False, True)]
    cases += [mixed_case(Mixed(4, 3, 256, 2, d), True, cache) for d in DTYPES]
    cases += [saved_case(64, 256, d, p) for d in DTYPES for p in DROPOUTS]
    return cases + [block_case(BlockShape(128, 256, 4, 2, 64), d, 0.1, True) for d in DTYPES]


def effort(case: Case, quick: bool) -> Effort:
    if quick:
        return Effort(seconds=0, fewest=4, most=4, sample_seconds=0, attempts=1)
    if case.group in ("decode", "mixed"):
        return Effort(seconds=4, fewest=30, most=200, sample_seconds=0.004)
    return Effort(seconds=25, fewest=8, most=30) if case.group == "block" else Effort(seconds=16)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of LoRA over the frozen linear, beside Hugging Face PEFT.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a smoke run, no figures")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--part", choices=lora_gpu.PARTS, action="append", help="with --device cuda; may be repeated")
    parser.add_argument("--budget", type=float, default=500, help="with --device cuda: seconds, default %(default)g")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default bench/results/lora-<device>.json for a full run, else none)"
    )
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but must be at least 1")
    if args.part and args.device == "cpu":
        parser.error("--part is for --device cuda; on the CPU --only chooses")
    return args


def _unfit(args: argparse.Namespace) -> str | None:
    """Why nothing can be measured here."""
    missing = [name for name in ("peftops", "peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"bench/lora.py needs {', '.join(missing)}: pip install 'peftops[bench]'"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "bench/lora.py --device cuda: torch sees no GPU"
    return peftops_cuda_error() if args.device == "cuda" else None


def peftops_cuda_error() -> str | None:
    from peftops import _load

    return _load.cuda_error()


def _on_cpu(args: argparse.Namespace, device: harness.Device) -> tuple[dict, list[Case]]:
    """(facts for the record, cases)."""
    from peftops import _C

    ceilings = measure_ceilings(args.quick, device.last_cache)
    facts = {
        "cpu_level": _C.cpu_level(),
        "ceilings": {
            "read_bytes_per_second": ceilings.bandwidth,
            "matmul_operations_per_second": {_name(d): r for d, r in ceilings.rate.items()},
        },
    }
    return facts, quick_cases(ceilings) if args.quick else all_cases(ceilings, device.last_cache)


def _on_gpu(args: argparse.Namespace, device: harness.Device) -> tuple[dict, list[Case]]:
    """(facts for the record, cases)."""
    bandwidth, rate = gpu.copy_bandwidth(4 << 30), gpu.matmul_rate(lora_gpu.DTYPE, 8192)
    ceilings = {
        "copy_bytes_per_second": bandwidth,
        "matmul_operations_per_second": {_name(lora_gpu.DTYPE): rate},
    }
    parts = tuple(args.part or lora_gpu.PARTS)
    return {"ceilings": ceilings}, lora_gpu.cases(bandwidth, rate, device.last_cache, parts, args.quick)


def main() -> int:
    began = time.monotonic()
    args = _arguments()
    if why := _unfit(args):
        print(why, file=sys.stderr)
        return 1
    import peftops

    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    device = harness.this_gpu() if cuda else harness.this_cpu()
    facts = harness.environment(device, ("torch", "triton", "peft", "transformers") if cuda else _PACKAGES)
    if facts["load_before"] > 0.5:
        print(f"load average is {facts['load_before']:.1f}: other work disturbs the figures", file=sys.stderr)
    facts["versions"] = {"peftops": peftops.__version__, **facts["versions"]}
    more, cases = _on_gpu(args, device) if cuda else _on_cpu(args, device)
    cases = [c for c in cases if re.search(args.only or "", c.name)]
    if not cases:
        print(f"bench/lora.py: --only {args.only}: no case matches", file=sys.stderr)
        return 2
    results = {"family": "lora", **facts, **more, "rank": RANK, "alpha": ALPHA, "quick": args.quick, "cases": []}
    output = args.output
    if output is None and not args.quick and not args.only and not args.part:
        output = harness.RESULTS / f"lora-{device.slug}.json"

    def save() -> None:
        if output is not None:
            harness.write(output, results)

    if cuda:
        _measure_within(began + args.budget, cases, results, save)
    else:
        results["cases"] = list(harness.run(cases, lambda case: effort(case, args.quick)))
        save()
    print(report.screen(results))
    if output is not None:
        print(f"written to {output}")
    return 1 if results.get("not_measured") else 0


def _measure_within(until: float, cases: list[Case], results: dict, save: Callable[[], None]) -> None:
    """Measure what fits; a case that fails is named with its reason, and the others still have their turn.

    The record is saved after every case, so that a run which is cut off leaves what it has measured.
    """
    missing = results["not_measured"] = {case.name: "out of time" for case in cases}
    progress = harness.Progress(len(cases))
    for case in cases:
        if time.monotonic() >= until:
            break
        progress.begin(case.name)
        try:
            results["cases"].append(harness.run_case(case, lora_gpu.effort(case), progress.note, gpu.Moment))
            del missing[case.name]
        except Exception as error:
            missing[case.name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        progress.end()
        gpu.empty()
        save()


if __name__ == "__main__":
    sys.exit(main())
