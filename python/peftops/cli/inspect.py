"""`peftops inspect`: what an adapter directory trains, how much of it, and which base model it fits."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from textwrap import shorten

import torch

from peftops.methods.files import FINGERPRINT
from peftops.methods.peft_config import DEFAULTS
from peftops.nn.adapter import name_of

from .base import Files, attach_files, load_base, read_adapter
from .errors import InputError
from .finetune import quiet, require_packages
from .model import first_line
from .report import size

DESCRIPTION = """Show what an adapter in Hugging Face PEFT's format holds: layers, ranks, norms of the updates, sizes,
active settings and its base model. With --model: whether it fits, and what is missing, unexpected or of another shape;
the exit code is 1 where it does not fit."""

PREFIX = "base_model.model."
LARGEST = 5
# Settings that say nothing about the adapter itself.
_SILENT = {"base_model_name_or_path", "inference_mode", "peft_type", "peft_version", FINGERPRINT, "r"}
_FACTORS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapter", type=Path, help="directory with adapter_config.json and adapter_model.safetensors")
    add("--model", help="directory of a Hugging Face model, or its name on the hub: does the adapter fit it?")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    adapter = read_adapter(arguments.adapter)
    try:
        found = describe(adapter)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, re.error) as error:
        raise InputError(
            f"{adapter.path}: configuration and tensors do not go together ({first_line(error)})"
        ) from None
    if arguments.model:
        require_packages()
        quiet()
        found["fit"] = fit(arguments.model, adapter)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else text(found))
    return 0 if found.get("fit", {"fits": True})["fits"] else 1


def describe(adapter: Files) -> dict:
    """Everything that the files say, ready for JSON. `norm` is the Frobenius norm of s B A."""
    config, tensors = adapter.config, adapter.tensors
    layers, used = {}, set()
    for key_a, a in tensors.items():
        for end_a, end_b in _FACTORS:
            key_b = key_a.removesuffix(end_a) + end_b
            if key_a.endswith(end_a) and key_b in tensors:
                name = key_a.removesuffix(end_a).removeprefix(PREFIX)
                layers[name] = _layer(name, a, tensors[key_b], config)
                used |= {key_a, key_b, f"{PREFIX}{name}.lora_B.bias"}
    whole = [key.removeprefix(PREFIX) for key in tensors if key not in used]
    return {
        "adapter": str(adapter.path),
        "method": config.get("peft_type"),
        "base_model": config.get("base_model_name_or_path"),
        "base_fingerprint": config.get(FINGERPRINT),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": sorted({name_of(tensor.dtype) for tensor in tensors.values()}),
        "layers": layers,
        "stored_whole": whole,
        "settings": {
            key: value
            for key, value in sorted(config.items())
            if key not in _SILENT and value != DEFAULTS.get(key) and value not in (None, [], {})
        },
    }


def _layer(name: str, a: torch.Tensor, b: torch.Tensor, config: dict) -> dict:
    rank = a.shape[0]
    alpha = _of(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # |s B A| = s sqrt(trace(A A^T B^T B)): two rank x rank matrices, never the product itself. In a convolution with
    # groups each group of outputs has ranks of its own.
    groups = rank // b.shape[1]
    pairs = zip(*(matrix.flatten(1).to(torch.float64).chunk(groups) for matrix in (a, b)), strict=True)
    squared = sum(((a @ a.T) * (b.T @ b)).sum().item() for a, b in pairs)
    return {"rank": rank, "alpha": alpha, "scaling": scaling, "norm": scaling * math.sqrt(max(squared, 0.0))}


def _of(patterns: dict | None, name: str, default: float) -> float:
    from peftops.methods.targets import first_match

    hit = first_match(list(patterns or {}), name)
    return default if hit is None else patterns[hit]


def fit(name: str, adapter: Files) -> dict:
    """Whether the adapter fits the model `name`: `fits`, `why` not, and whether the base is the recorded one (`same`,
    None where no fingerprint is recorded).
    """
    model = load_base(name, adapter, None)
    try:
        _, same = attach_files(model, adapter)
    except InputError as error:
        return {"model": name, "fits": False, "same_base": None, "why": str(error)}
    why = "the weights are not those of the base that it was trained on" if same is False else None
    return {"model": name, "fits": same is not False, "same_base": same, "why": why}


def text(found: dict) -> str:
    """What `describe` and `fit` found, for people."""
    layers = found["layers"]
    ranks = sorted({layer["rank"] for layer in layers.values()})
    kinds: dict[str, int] = {}
    for name in layers:
        kind = name.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    rows = {
        "method": found["method"],
        "base model": found["base_model"] or "not recorded",
        "base fingerprint": found["base_fingerprint"] or "not recorded",
        "adapted layers": f"{len(layers)} ({listed or 'no LoRA'})",
        "rank": ", ".join(map(str, ranks)),
        "stored whole": ", ".join(found["stored_whole"]) or "nothing",
        "parameters": f"{found['parameters']:,}",
        "size": f"{size(found['bytes'])} ({', '.join(found['dtypes'])})",
    }
    rows.update({f"setting {key}": shorten(json.dumps(value), 100) for key, value in found["settings"].items()})
    if layers:
        total = math.sqrt(sum(layer["norm"] ** 2 for layer in layers.values()))
        rows["norm of all updates"] = f"{total:.4g}"
        for name in sorted(layers, key=lambda name: -layers[name]["norm"])[:LARGEST]:
            rows[f"  {name}"] = f"{layers[name]['norm']:.4g}"
    if "fit" in found:
        state = {True: "yes, the base it was trained on", False: "no", None: "yes, no fingerprint is recorded"}
        fits = state[found["fit"]["same_base"]] if found["fit"]["fits"] else f"no: {found['fit']['why']}"
        rows[f"fits {found['fit']['model']}"] = fits
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())
