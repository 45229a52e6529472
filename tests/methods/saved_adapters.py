"""Trained adapters in directories, as Hugging Face PEFT writes them, and what they do to a layer in float64."""

import json

import peft
import torch
from peftops.methods.files import PREFIX
from safetensors.torch import load_file, save_file

from .models import Net, distance

TARGETS = ["embed", "conv", "up", "down"]


def adapter(folder, name, dtype=torch.float32, targets=TARGETS, net=None, **options):
    """A trained adapter of Hugging Face PEFT on a Net, in a directory."""
    config = peft.LoraConfig(target_modules=targets, **{"r": 3, "lora_alpha": 5, **options})
    model = peft.get_peft_model(net or Net(), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3) if "lora_" in key else parameter.add_(torch.randn_like(parameter) * 0.1)
    directory = folder / name
    model.save_pretrained(directory)
    if dtype != torch.float32:
        file = directory / "adapter_model.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    return directory


def delta(directory, layer, scaling):
    """s B A in float64 as a matrix, and s beta."""
    tensors = load_file(directory / "adapter_model.safetensors")
    a, b = (
        tensors.get(f"{PREFIX}{layer}.lora_{x}.weight", tensors.get(f"{PREFIX}{layer}.lora_embedding_{x}"))
        for x in "AB"
    )
    if a is None:
        return 0.0, 0.0
    bias = tensors.get(f"{PREFIX}{layer}.lora_B.bias", torch.zeros(()))
    return scaling * b.double().flatten(1) @ a.double().flatten(1), scaling * bias.double()


def stored(directory, layer):
    """What the combination does to one layer: its own s comes from its configuration."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["use_rslora"] is False

    def value(patterns, default):
        return next(
            (v for key, v in config[patterns].items() if key.lstrip("^").replace("\\", "") == layer), config[default]
        )

    return delta(directory, layer, value("alpha_pattern", "lora_alpha") / value("rank_pattern", "r"))


def rank_of(directory, layer):
    tensors = load_file(directory / "adapter_model.safetensors")
    return next(t.shape[0] for key, t in tensors.items() if key.startswith(f"{PREFIX}{layer}.lora_") and "_A" in key)


def same(actual, expected, tolerance=3e-7):
    assert distance(torch.as_tensor(actual), torch.as_tensor(expected)) < tolerance
