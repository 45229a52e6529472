"""LoRA as a method: its hyperparameters, and their form in Hugging Face PEFT's `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..nn.lora import BASE_DTYPES, LoRALayer, check_hyperparameters, factor_dtype, lora_class, name_of
from .files import PREFIX
from .targets import ALL_LINEAR, Targets, find_modules, find_targets

# The keys of LoraConfig in PEFT 0.21.2 and the values that mean "not used".
_PEFT_VERSION = "0.21.2"
_DEFAULTS: dict[str, object] = {
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
# Read here, or of no effect on the output: group size and Megatron's module name matter only with keys that are
# refused.
_READ = {"alpha_pattern", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern"}
_READ |= {"target_modules", "use_rslora", "init_lora_weights"}
_NO_EFFECT = {"auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core"}
_NO_EFFECT |= {"peft_version", "qalora_group_size", "revision", "task_type", "layers_pattern", "eva_config"}
# Ways to draw the factors that leave the base weight alone; the others subtract from it, which a file does not record.
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adaptation (Hu et al., "LoRA", ICLR 2022); reparametrized: the trained update folds back into the
    weight.

    y = x W^T + bias + s drop(x) A^T B^T with s = alpha / rank, W frozen, A [rank, in_features], B [out_features, rank]
    = 0 at the start (equation 3). Defaults as in Hugging Face PEFT.

    rank: r of every adapted layer.
    alpha: numerator of s.
    dropout: p of the dropout on the adapter's input, in [0, 1).
    target_modules: layer names, each exact or a suffix after a dot; or one regular expression for the full name; or
        "all-linear" (also what None means): every `nn.Linear` and transformers' `Conv1D` but the output embedding and a
        classification head.
    use_rslora: s = alpha / sqrt(rank) (Kalajdzievski, "rsLoRA", 2023).
    init: how A is drawn: "kaiming", U(-1/sqrt(in_features), 1/sqrt(in_features)), or "gaussian", N(0, 1/rank^2).
    adapter_dtype: None = the base weight's dtype; torch.float32 = float32 factors also over a 16-bit base.
    modules_to_save: modules (exact names or suffixes after a dot) that are trained whole and saved with the adapter,
        such as a new classification head.

    Raises ValueError, naming the argument, for a value out of range.
    """

    rank: int = 8
    alpha: float = 8
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    use_rslora: bool = False
    init: str = "kaiming"
    adapter_dtype: torch.dtype | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        check_hyperparameters(self.rank, self.alpha, self.dropout, self.init)
        if isinstance(self.target_modules, str):
            _check_pattern("target_modules", self.target_modules)
        elif self.target_modules is not None:
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        if self.modules_to_save is not None:
            object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save))


def _names(argument: str, names: object) -> tuple[str, ...]:
    listed = isinstance(names, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{argument} is {names!r}, but it must be a list of names")
    return tuple(names)


def _check_pattern(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument} is {pattern!r}, which is no regular expression ({error})") from None


@dataclass(frozen=True)
class Plan:
    """What LoRA will do to a model, checked and not yet done.

    layers: full name -> keyword arguments of :meth:`LoRALayer.adapt_`; skipped: full name -> reason; saved: full name
    -> module that is trained whole.
    """

    layers: dict[str, dict]
    skipped: dict[str, str]
    saved: dict[str, nn.Module]


def plan(model: nn.Module, method: LoRA) -> Plan:
    """The plan of a new adapter. Raises what :func:`find_targets` and :func:`find_modules` raise."""
    saved = find_modules(model, method.modules_to_save or ())
    targets = find_targets(model, method.target_modules, tuple(saved))
    layers = {}
    for name, layer in targets.layers.items():
        _check_factor_dtype(name, layer, method.adapter_dtype)
        layers[name] = _arguments(method, method.rank, method.alpha, method.adapter_dtype)
    return Plan(layers, targets.skipped, saved)


def _arguments(method: LoRA, rank: int, alpha: float, adapter_dtype: torch.dtype | None) -> dict:
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": method.dropout,
        "adapter_dtype": adapter_dtype,
        "init": method.init,
        "use_rslora": method.use_rslora,
    }


def _check_factor_dtype(name: str, layer: nn.Module, adapter_dtype: torch.dtype | None) -> None:
    try:
        factor_dtype(layer.weight.dtype, adapter_dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


# ---- files -----------------------------------------------------------------------------------------------------------


def to_config(model: nn.Module, method: LoRA, layers: dict[str, LoRALayer], saved: Sequence[str]) -> dict:
    """The content of `adapter_config.json`: every key of PEFT's LoraConfig, what is not used at its default."""
    targets = method.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        targets = list(layers)
    name = type(model).__name__
    task = "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
    if saved and name.endswith("ForSequenceClassification"):
        task = "SEQ_CLS"
    return {
        **_DEFAULTS,
        "alpha_pattern": {n: _plain(layer.alpha) for n, layer in layers.items() if layer.alpha != method.alpha},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": any(not isinstance(layer, nn.Linear) for layer in layers.values()),
        "init_lora_weights": True if method.init == "kaiming" else method.init,
        "lora_alpha": _plain(method.alpha),
        "lora_dropout": method.dropout,
        "modules_to_save": list(saved) or None,
        "r": method.rank,
        "rank_pattern": {n: layer.rank for n, layer in layers.items() if layer.rank != method.rank},
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "task_type": task,
        "use_rslora": method.use_rslora,
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class Loaded:
    """An adapter file that fits a model: method, plan, and the values of the saved modules by full tensor name."""

    method: LoRA
    plan: Plan
    saved_values: dict[str, Tensor] = field(default_factory=dict)


def from_files(model: nn.Module, config: dict, tensors: dict[str, Tensor], where: str) -> Loaded:
    """Compare an adapter file with a model.

    Raises ValueError, beginning with `where`, for a key that is active and not supported, a value out of range, and
    tensors that are missing, unexpected or of the wrong shape (all of them are listed); TypeError for a target that
    cannot be adapted.
    """
    _refuse_unsupported(config, where)
    try:
        method = LoRA(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout") or 0.0,
            target_modules=config.get("target_modules"),
            use_rslora=bool(config.get("use_rslora")),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            modules_to_save=config.get("modules_to_save"),
        )
        ranks, alphas = (_patterns(key, config.get(key)) for key in ("rank_pattern", "alpha_pattern"))
        if method.target_modules is None:
            raise ValueError("target_modules is missing")
        saved = find_modules(model, method.modules_to_save or (), strict=False)
        targets = find_targets(model, method.target_modules, tuple(saved))
        layers = {
            name: _arguments(method, _first(ranks, name, method.rank), _first(alphas, name, method.alpha), None)
            for name in targets.layers
        }
        for arguments in layers.values():
            check_hyperparameters(arguments["rank"], arguments["alpha"], method.dropout, method.init)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    heads = {f"{path}.{key}": t for path, module in saved.items() for key, t in module.state_dict().items()}
    _check_tensors(tensors, {**_expected_factors(targets, layers), **{PREFIX + k: t for k, t in heads.items()}}, where)
    for name, layer in targets.layers.items():
        factors = tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]
        # Kept where the operator has the pair; widened, never rounded, where it has not.
        wide = layer.weight.dtype in (torch.bfloat16, torch.float16) and any(
            f.dtype != layer.weight.dtype for f in factors
        )
        layers[name].update(factors=factors, adapter_dtype=torch.float32 if wide else None)
    return Loaded(method, Plan(layers, targets.skipped, saved), {key: tensors[PREFIX + key] for key in heads})


def _expected_factors(targets: Targets, layers: dict[str, dict]) -> dict[str, Tensor]:
    """Key in the file -> a meta tensor of the shape that the model and the configuration need."""
    expected = {}
    for name, layer in targets.layers.items():
        out_features, in_features = lora_class(layer)._weight(layer).shape
        rank = layers[name]["rank"]
        expected[f"{PREFIX}{name}.lora_A.weight"] = torch.empty(rank, in_features, device="meta")
        expected[f"{PREFIX}{name}.lora_B.weight"] = torch.empty(out_features, rank, device="meta")
    return expected


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    missing = [key for key in wanted if key not in tensors]
    unexpected = [key for key in tensors if key not in wanted]
    pairs = {key: (tensors[key], like) for key, like in wanted.items() if key in tensors}
    shapes = [
        f"{key} is {list(tensor.shape)}, but the model and the configuration need {list(like.shape)}"
        for key, (tensor, like) in pairs.items()
        if tensor.shape != like.shape
    ]
    dtypes = [
        f"{key} is {name_of(tensor.dtype)}"
        for key, (tensor, like) in pairs.items()
        if like.is_floating_point() and tensor.dtype not in BASE_DTYPES
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "wrong dtype": dtypes}
    text = "; ".join(f"{kind} ({len(found)}): {_some(found)}" for kind, found in problems.items() if found)
    if text:
        raise ValueError(f"{where}: the tensors do not fit the model: {text}")


def _some(items: list[str], count: int = 8) -> str:
    return ", ".join(items[:count]) + (f", and {len(items) - count} more" if len(items) > count else "")


def _refuse_unsupported(config: dict, where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind!r}, but only 'LORA' is supported")
    for key, value in config.items():
        if key in _READ or key in _NO_EFFECT or key.startswith("peftops_") or not value:
            continue
        if value != _DEFAULTS.get(key):
            raise ValueError(f"{where}: {key} is {value!r}, which is not supported")
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in _HARMLESS_INITS):
        raise ValueError(f"{where}: init_lora_weights is {init!r}, which changes the base weights and is not supported")


def _patterns(key: str, patterns: object) -> dict[str, float]:
    if not patterns:
        return {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} is {patterns!r}, but it must be an object")
    for pattern in patterns:
        _check_pattern(key, pattern)
    return patterns


def _first(patterns: dict, name: str, default):
    """PEFT's rule: the first pattern that matches the name or a suffix of it after a dot."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
