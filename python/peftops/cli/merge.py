"""`peftops merge`: fold an adapter into its base model and write the sum as an ordinary Hugging Face model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .base import Files, attach_files, load_base, read_adapter
from .errors import InputError
from .finetune import quiet, require_packages
from .model import first_line, resolve
from .output import appearing, check_new

DESCRIPTION = """Fold an adapter into its base model, W + s B A summed in float32 and rounded once, and write a complete
model directory: safetensors, configuration and tokenizer. Says what the rounding costs, layer by layer, and how much
the output changes by it."""

PROBE_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="the base: directory of a Hugging Face model, or its name on the hub")
    add("--adapter", required=True, type=Path, help="directory with adapter_config.json and adapter_model.safetensors")
    add("--output", required=True, type=Path, help="directory for the merged model; it appears when it is complete")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="precision of the merged model; default: that of the base's checkpoint",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the sum is made; default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    require_packages()
    quiet()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU is visible")
    check_new(arguments.output)
    adapter = read_adapter(arguments.adapter)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    model = load_base(arguments.model, adapter, dtype).to(arguments.device)
    tuning, same_base = attach_files(model, adapter)
    if same_base is False:
        raise InputError(
            f"--model {arguments.model}: is not the base that {adapter.path} was trained on (its fingerprint differs); "
            "a base that was loaded in another precision needs the same --dtype"
        )
    try:
        report = tuning.merge(keep_base=False, report=True, probe=_probe(model))
    except RuntimeError as error:  # tied embeddings
        raise InputError(f"--model {arguments.model}: {first_line(error)}") from None
    tuning.detach()
    with appearing(arguments.output) as work:
        model.save_pretrained(work)
        _save_tokenizer(arguments.model, adapter, work)
    print(report)
    print(f"merged model in {arguments.output}")
    return 0


def _probe(model: torch.nn.Module) -> dict | None:
    """A batch of random tokens; None for a model that takes something else."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if getattr(model, "main_input_name", None) != "input_ids" or size is None:
        return None
    tokens = torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder and not type(model).__name__.endswith("ForSequenceClassification"):
        batch["decoder_input_ids"] = tokens
    return batch


def _save_tokenizer(name: str, adapter: Files, folder: Path) -> None:
    """That of the adapter's directory, else that of the base, where there is one."""
    from transformers import AutoTokenizer

    where = adapter.path if (adapter.path / "tokenizer_config.json").is_file() else resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # a model of images has none, and a broken one raises anything
        print(f"peftops: note: no tokenizer is written, {where} has none ({first_line(error)})", file=sys.stderr)
        return
    tokenizer.save_pretrained(folder)
