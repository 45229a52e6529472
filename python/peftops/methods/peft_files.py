"""LoRA in Hugging Face PEFT's files, both ways: which tensors they hold, and what these mean for a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import inits
from ..nn.adapter import BASE_DTYPES, Adapter, Factors, name_of
from ..nn.dtensor import whole
from ..nn.linear import LinearLike
from ..nn.lora import LoRALayer, lora_class
from .files import FINGERPRINT, PREFIX
from .fingerprint import fingerprint
from .lora import LoRA, Plan, check_layer, find_biases, unused_patterns
from .peft_config import REPEATED, read_method, refuse_unsupported, to_config, written_pattern
from .saved import Saved, persistent_names
from .targets import find_modules, find_targets

# ---- writing ---------------------------------------------------------------------------------------------------------


def to_files(
    model: nn.Module, method: LoRA, name: str, layers: Mapping[str, LoRALayer], saved: Saved
) -> tuple[dict, dict[str, Tensor]]:
    """The content of both files for the adapter `name`, which fits the original base weights.

    Where its initialisation has changed them, W - s B0 A0 + s B A is written as the plain adapter [B, -B0] [A; A0] of
    twice the rank with the same s. layers: full name -> layer that it adapts. Tensors that are spread over processes
    are gathered: every process has to call it.

    Raises ValueError where a callable's base weight was another one than W - s B0 A0, as with quantisation.
    """
    tensors: dict[str, Tensor] = {}
    written: dict[str, tuple[int, float]] = {}
    for path, layer in layers.items():
        adapter, initial = layer.adapters[name], layer.initial.get(name)
        factors = Factors(*(value if value is None else whole(value.detach()) for value in layer.factors(name)))
        written[path] = adapter.rank, adapter.alpha
        if initial is not None:
            _check_start(path, layer, name)
            factors, written[path] = _joined(factors, initial), _doubled(adapter)
        for key, value in zip(_factor_keys(path, layer), factors, strict=True):
            if value is not None:
                tensors[key] = value
    for path, value in saved.tensors().items():
        tensors[_key_of(path, layers)] = whole(value.detach())
    changed = any(name in layer.initial for layer in layers.values())
    rank, alpha = _doubled(method) if changed else (method.rank, method.alpha)
    config = to_config(model, method, rank, alpha, written, layers, saved.modules)
    config[FINGERPRINT] = fingerprint(model, [path for path in layers if f"{path}.weight" not in saved.replaced])
    return config, tensors


def _check_start(path: str, layer: LoRALayer, name: str) -> None:
    """A callable may choose a base weight that an adapter cannot bring back; the others have none of their own."""
    init, initial = layer.adapters[name].init, layer.initial[name]
    if not callable(init):
        return
    residual = layer.weight if layer._kept is None else layer._kept["weight"]
    if layer._original is not None:
        residual, original = whole(residual.detach()).cpu().double(), layer._original.double()
        delta = layer.adapters[name].scaling * layer._product(initial.a.cpu().double(), initial.b.cpu().double())
        size = original.norm() + delta.norm()
        if (original - delta - residual).norm() <= 4 * torch.finfo(layer.weight.dtype).eps * size:
            return
    raise ValueError(
        f"save: init {init!r} gave {path} a base weight that is not W - s B A of its factors, so that the adapter "
        "alone does not fit the original one; save the model's state_dict, or a merged model"
    )


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """An adapter file that fits a model: method, plan, and the values that parts of the model itself get, by full name:
    saved modules, trained biases and replaced parameters.
    """

    method: LoRA
    plan: Plan
    saved_values: dict[str, Tensor]


def from_files(model: nn.Module, config: dict, tensors: dict[str, Tensor], where: str) -> Loaded:
    """Compare an adapter file with a model, whose weights must be the base model's.

    An adapter that PEFT has started with "pissa" or "olora" fits another base weight, which PEFT makes anew at each
    load. Here it becomes the plain adapter of twice the rank that fits the original one.

    Raises ValueError, beginning with `where`, for a key that is active and not supported, a value out of range, and
    tensors that are missing, unexpected or of the wrong shape (all of them are listed); TypeError for a target that
    cannot be adapted.
    """
    refuse_unsupported(config, where)
    try:
        method = read_method(config)
        saved = find_modules(model, method.modules_to_save or (), strict=False)
        targets = find_targets(model, method.choice, tuple(saved))
        layers = {name: method.adapter_of(name) for name in targets.layers}
        for name, layer in targets.layers.items():
            check_layer(name, layer, layers[name])
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    tensors = _current_keys(tensors, targets.layers, saved)
    trained = find_biases(model, method.bias, targets.layers, tuple(saved))
    own = _own_tensors(targets.layers, saved, trained, tensors)
    embeddings = {
        name: parameter
        for name, parameter in _embedding_parameters(model).items()
        if _key_of(name, targets.layers) in tensors and name not in own and name not in trained
    }
    keys = {name: _key_of(name, targets.layers) for name in own | embeddings}
    wanted = _wanted_factors(targets.layers, layers)
    wanted.update({keys[name]: tensor for name, tensor in (own | embeddings).items()})
    _check_tensors(tensors, wanted, where)
    for text in _doubts(model, method, config, targets.layers, trained.keys() <= own.keys(), tensors):
        warnings.warn(f"{where}: {text}", stacklevel=4)

    values = trained | {name: tensors[key] for name, key in keys.items()}
    replaced = {name: p for name, p in embeddings.items() if not _same(values[name], p)}
    factors = {
        path: Factors(*(tensors.get(key) for key in _factor_keys(path, layer)))
        for path, layer in targets.layers.items()
    }
    if config.get("init_lora_weights") in REPEATED:
        try:
            method, layers, factors = _on_original_base(
                config["init_lora_weights"], method, targets.layers, layers, factors
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    for path, layer in targets.layers.items():
        layers[path] = dataclasses.replace(layers[path], adapter_dtype=_dtype_for(layer, factors[path]))
    return Loaded(method, Plan(layers, targets.skipped, saved, trained, factors, replaced), values)


def _current_keys(
    tensors: dict[str, Tensor], layers: Mapping[str, nn.Module], saved: Iterable[str]
) -> dict[str, Tensor]:
    """The tensors under the names that PEFT 0.21 gives them: before 0.6 an adapted layer held its weight and bias
    itself. Copies that PEFT stores of a saved module, beside the values that count, are left out.
    """
    copies = tuple(f"{PREFIX}{path}.{copy}." for path in saved for copy in ("original_module", "modules_to_save"))
    old = {PREFIX + f"{path}.{key}": _key_of(f"{path}.{key}", layers) for path in layers for key in ("weight", "bias")}
    current = {}
    for key, tensor in tensors.items():
        if not key.startswith(copies):
            current[key if old.get(key) in tensors else old.get(key, key)] = tensor
    return current


def _own_tensors(
    layers: Mapping[str, nn.Module],
    saved: Mapping[str, nn.Module],
    trained: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Full name -> tensor of the model for which the file has to hold a value. Where it holds no bias at all, as older
    PEFT versions wrote it for `lora_only`, none is wanted.
    """
    kept = {path: set(persistent_names(module)) for path, module in saved.items()}
    own = {
        f"{path}.{key}": tensor
        for path, module in saved.items()
        for key, tensor in module.state_dict().items()
        if key in kept[path]
    }
    return own | trained if any(_key_of(name, layers) in tensors for name in trained) else own


def _doubts(
    model: nn.Module,
    method: LoRA,
    config: dict,
    layers: Mapping[str, nn.Module],
    biases: bool,
    tensors: Mapping[str, Tensor],
) -> list[str]:
    """What a user should hear of although the file fits the model."""
    found = []
    for key in ("rank_pattern", "alpha_pattern"):
        unused = unused_patterns(getattr(method, key), layers)
        if unused:
            found.append(f"{key} has {_some(unused)}, which fits no adapted layer")
    if not biases:
        found.append(
            f"bias is {method.bias!r}, but the file holds none, as older PEFT versions wrote it; the model's stay"
        )
    # A base weight that came with the adapter is no part of the base.
    names = [path for path in layers if _key_of(f"{path}.weight", layers) not in tensors]
    if config.get(FINGERPRINT) is not None and config[FINGERPRINT] != fingerprint(model, names):
        found.append("the adapter was trained on another base model than this one")
    return found


def _embedding_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name -> parameter of the input and the output embedding, which PEFT stores whole where they are adapted or
    were resized.
    """
    modules = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            modules.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError, TypeError):
            continue
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if any(module is embedding for embedding in modules)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def _same(value: Tensor, parameter: nn.Parameter) -> bool:
    return torch.equal(value.to(parameter.device, parameter.dtype), whole(parameter.detach()))


def _wanted_factors(targets: Mapping[str, nn.Module], layers: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Key in the file -> a meta tensor of the shape that the model and the configuration need."""
    wanted = {}
    for path, layer in targets.items():
        adapter = layers[path]
        shape_a, shape_b = lora_class(layer)._factor_shapes(layer, adapter.rank)
        key_a, key_b, key_bias = _factor_keys(path, layer)
        wanted[key_a] = torch.empty(shape_a, device="meta")
        wanted[key_b] = torch.empty(shape_b, device="meta")
        if adapter.lora_bias:
            wanted[key_bias] = torch.empty(shape_b[0], device="meta")
    return wanted


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, Tensor], where: str) -> None:
    pairs = {key: (tensors[key], like) for key, like in wanted.items() if key in tensors}
    problems = {
        "missing": [key for key in wanted if key not in tensors],
        "unexpected": [key for key in tensors if key not in wanted],
        "wrong shape": [
            f"{key} is {list(tensor.shape)}, but the model and the configuration need {list(like.shape)}"
            for key, (tensor, like) in pairs.items()
            if tensor.shape != like.shape
        ],
        "wrong dtype": [
            f"{key} is {name_of(tensor.dtype)}"
            for key, (tensor, like) in pairs.items()
            if tensor.is_floating_point() != like.is_floating_point()
            or (like.is_floating_point() and tensor.dtype not in BASE_DTYPES)
        ],
    }
    text = "; ".join(f"{kind} ({len(found)}): {_some(found)}" for kind, found in problems.items() if found)
    if text:
        raise ValueError(f"{where}: the tensors do not fit the model: {text}")


def _some(items: Sequence[str], count: int = 8) -> str:
    shown = [item if item.isprintable() and len(item) < 400 else f"{item[:100]!a}..." for item in items[:count]]
    return ", ".join(shown) + (f", and {len(items) - count} more" if len(items) > count else "")


def _on_original_base(
    init: str,
    method: LoRA,
    targets: Mapping[str, nn.Module],
    layers: Mapping[str, Adapter],
    factors: Mapping[str, Factors],
) -> tuple[LoRA, dict[str, Adapter], dict[str, Factors]]:
    """The adapter as one of twice the rank on the original base weights. PEFT starts embeddings in the ordinary way."""
    written, joined = {}, dict(factors)
    for path, layer in targets.items():
        adapter, kind = layers[path], lora_class(layer)
        written[path] = adapter.rank, adapter.alpha
        if isinstance(layer, nn.Embedding):
            continue
        if not issubclass(kind, LinearLike):
            raise ValueError(f"init_lora_weights is {init!r}, but PEFT has no such start for {path}, a convolution")
        start = inits.start(init, kind._weight(layer).detach(), adapter.rank, adapter.scaling)
        joined[path], written[path] = _joined(factors[path], Factors(start.a, start.b)), _doubled(adapter)
    rank, alpha = _doubled(method)
    method = dataclasses.replace(
        method,
        rank=rank,
        alpha=alpha,
        rank_pattern=written_pattern({}, rank, {path: r for path, (r, _) in written.items()}),
        alpha_pattern=written_pattern({}, alpha, {path: a for path, (_, a) in written.items()}),
    )
    return method, {path: method.adapter_of(path) for path in targets}, joined


def _dtype_for(layer: nn.Module, factors: Factors) -> torch.dtype | None:
    """Factors are kept where the operator has the pair of dtypes; widened, never rounded, where it has not."""
    base = layer.weight.dtype
    wide = base in (torch.bfloat16, torch.float16) and any(f.dtype != base for f in factors if f is not None)
    return torch.float32 if wide else None


# ---- both ways -------------------------------------------------------------------------------------------------------


def _factor_keys(path: str, layer: nn.Module) -> tuple[str, str, str]:
    """Keys of A, B and B's bias."""
    prefix = f"{PREFIX}{path}." if path else PREFIX
    if isinstance(layer, nn.Embedding):
        return f"{prefix}lora_embedding_A", f"{prefix}lora_embedding_B", f"{prefix}lora_embedding_B.bias"
    return f"{prefix}lora_A.weight", f"{prefix}lora_B.weight", f"{prefix}lora_B.bias"


def _key_of(path: str, layers: Mapping[str, nn.Module]) -> str:
    """Key of a tensor of the base model; in PEFT an adapted layer sits inside another module."""
    owner, _, key = path.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{key}" if owner in layers else PREFIX + path


def _joined(factors: Factors, initial: Factors) -> Factors:
    a, b = (value.detach().to(factors.a.device) for value in (initial.a, initial.b))
    return Factors(torch.cat([factors.a, a]), torch.cat([factors.b, -b], dim=1), factors.bias)


def _doubled(adapter: Adapter | LoRA) -> tuple[int, float]:
    """Twice the rank, and the alpha that gives the same s with it."""
    return 2 * adapter.rank, adapter.alpha * (2**0.5 if adapter.use_rslora else 2)
