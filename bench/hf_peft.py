"""A Hugging Face PEFT model as it is, and the same one after `peftops.integrations.hf_peft.accelerate(model)`.

    python bench/hf_peft.py               all cases, about ten minutes; writes bench/results/hf_peft-<device>.json
    python bench/hf_peft.py --quick       small sizes, under a minute, writes nothing: shows that it runs
    python bench/hf_peft.py --only token  cases whose name matches; writes nothing unless --output says where

A Llama-shaped model of four layers in bfloat16, LoRA on all its seven kinds of linears, float32 factors: PEFT's
default. Groups: "step" = one training step (forward, loss, backward, AdamW) on token ids; "token" = one token with a
cache of the tokens before it. PEFT's model is the base, timed twice; the other one shares its weights.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import report
import torch
from harness import BASE, Case, Contender, Effort, Target
from lora_contenders import relative_error
from lora_kinds import ALPHA, RANK
from torch import Tensor, nn

OURS = "after accelerate"
# Many roundings to bfloat16 follow each other: norms of gradients against float64.
TOLERANCE = 0.1
_PACKAGES = ("torch", "peft", "transformers")


@dataclass(frozen=True)
class Shape:
    """Llama 3.2 1B's width. The vocabulary stands to four layers as a whole model's to its sixteen to thirty-two."""

    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    key_value_heads: int = 8
    layers: int = 4
    vocabulary: int = 8192
    tokens: int = 512

    @property
    def facts(self) -> dict:
        """What a record says about it."""
        return {"hidden": self.hidden, "intermediate": self.intermediate, "layers": self.layers, "dtype": "bfloat16"}


# ---- the two models --------------------------------------------------------------------------------------------------


def peft_model(shape: Shape, dropout: float) -> nn.Module:
    """PEFT's model, with factors that matter."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_hidden_layers=shape.layers,
        attn_implementation="sdpa",
    )
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
    model = peft.get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1 / RANK**0.5)
    return model


def accelerated(model: nn.Module) -> nn.Module:
    """The same model after the one line, on the same frozen weights; the factors are its own."""
    from peftops.integrations import hf_peft

    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    twin = copy.deepcopy(model, shared)
    count = hf_peft.accelerate(twin)
    if count != (whole := len(hf_peft.coverage(twin).layers)):
        raise AssertionError(f"accelerate fused {count} of {whole} layers")
    return twin


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- contenders ------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    """(loss, gradients of the factors...), without dropout."""
    model.eval()
    loss = model(input_ids=ids, labels=ids).loss
    result = torch.autograd.grad(loss, trained(model))
    model.train()
    return loss.detach(), *result


def step_contenders(shape: Shape, dropout: float) -> tuple[list[Contender], int]:
    sets = 2  # the weights alone exceed the caches
    theirs = peft_model(shape, dropout).train()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(shape.vocabulary, (1, shape.tokens), generator=generator) for _ in range(sets)]

    @functools.cache
    def exact() -> tuple[Tensor, ...]:
        return gradients(copy.deepcopy(theirs).double(), ids[0])

    def contender(name: str, model: nn.Module) -> Contender:
        optimizer = torch.optim.AdamW(trained(model), lr=1e-5)

        def step(i: int) -> None:
            model(input_ids=ids[i], labels=ids[i]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def check() -> float:
            if dropout > 0 and name == OURS:
                check_mask(model, dropout)
            return relative_error(gradients(model, ids[0]), exact(), TOLERANCE, name)

        def facts() -> dict:
            held = [*model.parameters(), *model.buffers(), ids[0]]
            return {
                "saved_bytes": harness.saved_bytes(lambda: model(input_ids=ids[0], labels=ids[0]).loss, held),
                "peak_bytes": harness.peak_bytes(lambda: step(0)),
            }

        return Contender(name, step, check, facts)

    twin = accelerated(theirs)
    exact()  # before a step changes the factors
    return [contender(BASE, theirs), contender(OURS, twin)], sets


def check_mask(model: nn.Module, dropout: float) -> None:
    """One layer of the model, in training mode, against the law in float64 under the mask that its seed stands for."""
    from peftops.ops import lora_dropout_mask

    layer = next(module for module in model.modules() if type(module).__name__ == "FusedLinear")
    weight, a, b = (p.detach().double() for p in (layer.weight, *layer.lora_A.parameters(), *layer.lora_B.parameters()))
    x = torch.randn(64, weight.shape[1]).bfloat16()
    torch.manual_seed(3)
    mask = lora_dropout_mask(torch.randint(2**63 - 1, (1,)), *x.shape, dropout)
    torch.manual_seed(3)
    got = layer(x)
    kept = torch.where(mask, x, 0).double() / (1 - dropout)
    wanted = x.double() @ weight.t() + ALPHA / RANK * kept @ a.t() @ b.t()
    relative_error((got,), (wanted,), 1e-2, f"{OURS}, dropout")


def token_contenders(shape: Shape) -> tuple[list[Contender], int]:
    theirs = peft_model(shape, 0.0).eval()
    generator = torch.Generator().manual_seed(1)
    prompt, following = (torch.randint(shape.vocabulary, (1, n), generator=generator) for n in (shape.tokens, 2))

    @functools.cache
    def exact() -> Tensor:
        with torch.no_grad():
            ids = torch.cat([prompt, following[:, :1]], 1)
            return copy.deepcopy(theirs).double()(input_ids=ids).logits[:, -1]

    def contender(name: str, model: nn.Module) -> Contender:
        with torch.no_grad():
            cache = model(input_ids=prompt, use_cache=True).past_key_values

        @torch.no_grad()
        def step(i: int) -> Tensor:
            logits = model(input_ids=following[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            cache.crop(shape.tokens)
            return logits[:, -1]

        def check() -> float:
            return relative_error((step(0),), (exact(),), TOLERANCE, name)

        return Contender(name, step, check)

    return [contender(BASE, theirs), contender(OURS, accelerated(theirs))], 2


# ---- cases -----------------------------------------------------------------------------------------------------------


def cases(shape: Shape, prompt: int, targets: bool) -> list[Case]:
    """A step without and with dropout, and a token after `prompt` others; no figures are wanted of small sizes."""
    wanted = (Target(OURS, BASE, 1.0),) if targets else ()

    def case(name: str, group: str, build: Callable, tokens: int, **facts: float) -> Case:
        facts = {"base": "PEFT", "tokens": tokens, **shape.facts, **facts}
        return Case(f"{group} bfloat16 {shape.hidden} {name}", group, facts, build, wanted)

    steps = [
        case(f"p={p:g}", "step", functools.partial(step_contenders, shape, p), shape.tokens, dropout=p)
        for p in (0.0, 0.1)
    ]
    after = Shape(**{**vars(shape), "tokens": prompt})
    return [*steps, case(f"after {prompt}", "token", functools.partial(token_contenders, after), 1, prompt=prompt)]


def all_cases() -> list[Case]:
    """What `make bench` measures."""
    return cases(Shape(), 128, True)


def quick_cases() -> list[Case]:
    """Every kind of case, small; no targets, for such sizes have none."""
    return cases(Shape(128, 256, 4, 2, 2, 64, 64), 16, False)


def effort(case: Case, quick: bool) -> Effort:
    if quick:
        return Effort(seconds=0, fewest=4, most=4, sample_seconds=0, attempts=1)
    if case.group == "token":
        return Effort(seconds=20, fewest=30, most=200, sample_seconds=0.05)
    return Effort(seconds=90, fewest=10, most=40)


# ---- a run -----------------------------------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A PEFT model as it is, and after hf_peft.accelerate(model).")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a smoke run, no figures")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default bench/results/hf_peft-<device>.json for a full run, else none)"
    )
    args = parser.parse_args()
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but must be at least 1")
    return args


def _facts(quick: bool, device: harness.Device) -> dict:
    """What the record says about machine and versions."""
    import peftops
    from peftops import _C

    facts = harness.environment(device, _PACKAGES)
    facts["versions"] = {"peftops": peftops.__version__, **facts["versions"]}
    bandwidth = harness.read_bandwidth(device.last_cache if quick else max(8 * device.last_cache, 256 << 20))
    size = (256, 256, 256) if quick else (512, 4096, 4096)
    rate = harness.matmul_rate(torch.bfloat16, [size])
    ceilings = {"read_bytes_per_second": bandwidth, "matmul_operations_per_second": {"bfloat16": rate}}
    return {**facts, "cpu_level": _C.cpu_level(), "ceilings": ceilings}


def main() -> int:
    args = _arguments()
    if missing := [name for name in ("peftops", "peft", "transformers") if importlib.util.find_spec(name) is None]:
        print(f"bench/hf_peft.py needs {', '.join(missing)}: pip install 'peftops[bench]'", file=sys.stderr)
        return 1
    chosen = [c for c in (quick_cases() if args.quick else all_cases()) if re.search(args.only or "", c.name)]
    if not chosen:
        print(f"bench/hf_peft.py: --only {args.only}: no case matches", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    device = harness.this_cpu()
    facts = _facts(args.quick, device)
    if facts["load_before"] > 0.5:
        print(f"load average is {facts['load_before']:.1f}: other work disturbs the figures", file=sys.stderr)
    results = {"family": "hf_peft", **facts, "rank": RANK, "alpha": ALPHA, "quick": args.quick}
    results["cases"] = list(harness.run(chosen, lambda case: effort(case, args.quick)))
    print(report.screen(results))
    output = args.output
    if output is None and not args.quick and not args.only:
        output = harness.RESULTS / f"hf_peft-{device.slug}.json"
    if output is not None:
        harness.write(output, results)
        print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
