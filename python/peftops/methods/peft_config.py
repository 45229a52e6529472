"""LoRA's hyperparameters in Hugging Face PEFT's `adapter_config.json`, both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from torch import nn

from ..nn.linear import LinearLike
from .files import OWN
from .lora import LoRA
from .targets import HEADS, Choice, find_modules, first_match, module_names

# The keys of LoraConfig in PEFT 0.21.2 and the values that mean "not used".
_PEFT_VERSION = "0.21.2"
DEFAULTS: dict[str, object] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": _PEFT_VERSION,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
_READ = {"alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform"}
_READ |= {"lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern"}
_READ |= {"target_modules", "use_rslora"}
# Of no effect on the output: the settings of an initialisation matter only with its name in init_lora_weights, group
# size and Megatron's module name only with keys that are refused.
_NO_EFFECT = {"auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out"}
_NO_EFFECT |= {"inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version"}
_NO_EFFECT |= {"qalora_group_size", "revision", "task_type"}
# Values of init_lora_weights that leave the base weight alone, and the init that stands for them here.
_HARMLESS = {True: "kaiming", False: "kaiming", "eva": "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal"}
# Those that change it in a way that can be repeated: a file holds A and B alone, PEFT repeats the start at each load.
REPEATED = ("pissa", "olora")


def to_config(
    model: nn.Module,
    method: LoRA,
    rank: int,
    alpha: float,
    written: Mapping[str, tuple[int, float]],
    layers: Mapping[str, nn.Module],
    saved: Sequence[str],
) -> dict:
    """The content of `adapter_config.json`: every key of PEFT's LoraConfig, what is not used at its default.

    rank, alpha: of layers that no pattern names; written: full name -> rank and alpha of the layer.
    """
    choice = _written_choice(model, method.choice, list(layers))
    alphas = written_pattern(method.alpha_pattern, alpha, {path: a for path, (_, a) in written.items()})
    return {
        **DEFAULTS,
        "alpha_pattern": {pattern: _plain(value) for pattern, value in alphas.items()},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "bias": method.bias,
        "exclude_modules": _plain_names(choice.exclude_modules),
        "fan_in_fan_out": any(type(layer).__name__.endswith("Conv1D") for layer in layers.values()),
        "init_lora_weights": _written_init(method, layers),
        "layers_pattern": _plain_names(choice.layers_pattern),
        "layers_to_transform": _plain_names(choice.layers_to_transform),
        "lora_alpha": _plain(alpha),
        "lora_bias": method.lora_bias,
        "lora_dropout": method.dropout,
        "modules_to_save": list(saved) or None,
        "r": rank,
        "rank_pattern": written_pattern(method.rank_pattern, rank, {n: r for n, (r, _) in written.items()}),
        "target_modules": _plain_names(choice.target_modules),
        "task_type": _task(model, saved),
        "use_rslora": method.use_rslora,
    }


def _written_choice(model: nn.Module, choice: Choice, layers: list[str]) -> Choice:
    """A choice by names from which PEFT gets exactly these layers."""
    if not choice.by_kind:
        return choice
    by_name = dataclasses.replace(choice, target_modules=layers)
    if [name for name in module_names(model) if by_name.takes(name)] == layers:
        return by_name
    # A full name is a suffix of another one, too.
    return Choice("|".join(map(re.escape, layers)), choice.exclude_modules)


def written_pattern(given: Mapping[str, float], default: float, wanted: Mapping[str, float]) -> dict[str, float]:
    """Patterns that give the layers these values, also in the order of the keys that a JSON file has; the given ones
    where they do.
    """
    exact = {name: value for name, value in wanted.items() if value != default}
    for patterns in (given, exact):
        keys = sorted(patterns)
        hits = {name: first_match(keys, name) for name in wanted}
        if all((default if hits[name] is None else patterns[hits[name]]) == value for name, value in wanted.items()):
            return dict(patterns)
    return {f"^{re.escape(name)}": value for name, value in exact.items()}


def _written_init(method: LoRA, layers: Mapping[str, nn.Module]) -> str | bool:
    """Only what PEFT accepts together with the rest: it checks the value although the factors come from the file."""
    linear = all(isinstance(layer, LinearLike) for layer in layers.values())
    accepted = method.init == "gaussian" or (method.init == "orthogonal" and linear)
    return method.init if accepted and not method.lora_bias else True


def _task(model: nn.Module, saved: Sequence[str]) -> str | None:
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    config = getattr(model, "config", None)
    if name.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        # PEFT's class for this task passes input_ids on, which a speech model does not take.
        return "SEQ_2_SEQ_LM" if getattr(model, "main_input_name", None) == "input_ids" else None
    if saved and name.endswith("ForSequenceClassification"):
        # With this task PEFT expects every module with a head's name among the tensors.
        return "SEQ_CLS" if find_modules(model, HEADS, strict=False).keys() <= set(saved) else None
    return None


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _plain_names(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def refuse_unsupported(config: dict, where: str) -> None:
    """Raise ValueError, beginning with `where` and naming the key, for a feature that is active and not supported."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind!r}, but only 'LORA' is supported")
    for key, value in config.items():
        if key in _READ or key in _NO_EFFECT or key.startswith(OWN) or not value:
            continue
        if value != DEFAULTS.get(key):
            raise ValueError(f"{where}: {key} is {value!r}, which is not supported")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (bool, str)) or (init not in _HARMLESS and init not in REPEATED):
        raise ValueError(
            f"{where}: init_lora_weights is {init!r}, which is not supported: the adapter belongs to another base "
            "weight, or trains B in another way"
        )


def read_method(config: dict) -> LoRA:
    """The method of a supported configuration. Raises ValueError, naming the argument, for a value out of range."""
    if config.get("target_modules") is None:
        raise ValueError("target_modules is missing")
    numbers = config.get("layers_to_transform")
    init = config.get("init_lora_weights", True)
    return LoRA(
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout") or 0.0,
        target_modules=config["target_modules"],
        exclude_modules=config.get("exclude_modules") or None,
        layers_to_transform=None if numbers == [] else numbers,
        layers_pattern=config.get("layers_pattern") or None,
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        use_rslora=config.get("use_rslora") or False,
        bias=config.get("bias") or "none",
        lora_bias=config.get("lora_bias") or False,
        init="kaiming" if init in REPEATED else _HARMLESS[init],
        modules_to_save=config.get("modules_to_save") or None,
    )
