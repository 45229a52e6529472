"""The contract of every method: attach it to a model, train, save, merge, switch off, take it out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..nn.lora import ADAPTER, LoRALayer, lora_class
from .files import PREFIX, load_adapter, save_adapter
from .lora import LoRA, Plan, from_files, plan, to_config
from .saved import SavedModules
from .summary import Summary, TrainedModule


def attach(model: nn.Module, method: LoRA) -> Tuning:
    """Put `method` into `model`, in place, and return the handle that trains, saves, merges and removes it.

    The model keeps its class, its parameter names and their order; all of its parameters are frozen but those that the
    method trains. Right after it the output is the base model's. Everything is checked before anything changes.

    Raises TypeError for something that is no method or a target that cannot be adapted, ValueError for a target that
    matches nothing or a hyperparameter that does not fit, RuntimeError for a model that carries adapters already.
    """
    if not isinstance(method, LoRA):
        raise TypeError(f"attach: method is {method!r}, but it must be a method such as peftops.LoRA(...)")
    model = _plain_model(model, "attach")
    return Tuning(model, method, plan(model, method), trainable=True)


def load(model: nn.Module, directory: str | os.PathLike, trainable: bool = False) -> Tuning:
    """Attach the adapter in `directory`, in Hugging Face PEFT's format, to `model`, in place.

    trainable: whether training goes on; otherwise everything is frozen. Factors keep the dtype of the file where it is
    the base weight's, or float32 over a 16-bit base; any other is widened to float32.

    Raises FileNotFoundError or ValueError, naming the file, for one that is missing, damaged, a pickle, of another
    method, uses a key that is not supported, or does not fit the model (missing, unexpected and mis-shaped tensors are
    listed); otherwise as :func:`attach`. The model is then untouched.
    """
    model = _plain_model(model, "load")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError("load: the model has parameters on the meta device; materialise it first")
    config, tensors = load_adapter(directory)
    loaded = from_files(model, config, tensors, f"load: {os.fspath(directory)}")
    tuning = Tuning(model, loaded.method, loaded.plan, trainable)
    tuning._saved.assign(loaded.saved_values)
    return tuning


class Tuning:
    """One adapter in one model, made by :func:`attach` or :func:`load`.

    model: the adapted model; method: the method's hyperparameters.
    """

    def __init__(self, model: nn.Module, method: LoRA, what: Plan, trainable: bool):
        self.model, self.method = model, method
        self._skipped = what.skipped
        self._names = list(what.layers)
        self._attached, self._disabled = True, False
        # By name: a move from the meta device makes new parameter objects.
        self._requires_grad = {name: p.requires_grad for name, p in _all_parameters(model)}
        self._check_not_tied(what.saved)
        self._saved = SavedModules(what.saved)
        adapted = []
        try:
            for name, arguments in what.layers.items():
                layer = model.get_submodule(name)
                adapted.append(lora_class(layer).adapt_(layer, **arguments))
        except BaseException:
            for layer in adapted:
                layer.remove_()
            self._restore_requires_grad()
            raise
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._own_parameters().values():
            parameter.requires_grad_(trainable)

    # ---- training ------------------------------------------------------------------------------------------------

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters with their names in the model; none after `load` without `trainable`."""
        self._check("named_parameters")
        return [(name, parameter) for name, parameter in self._own_parameters().items() if parameter.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for _, parameter in self.named_parameters()]

    def optimizer(self, lr: float, weight_decay: float = 0.0, **options) -> torch.optim.Optimizer:
        """`torch.optim.AdamW` over :meth:`parameters`; `options` go to it. Raises RuntimeError where nothing is
        trained.
        """
        parameters = self.parameters()
        if not parameters:
            raise RuntimeError("optimizer: nothing is trained; load the adapter with trainable=True")
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, **options)

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike) -> None:
        """Write the adapter in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

        Existing files of these names are replaced, each in one step. Raises ImportError without safetensors.
        """
        self._check("save")
        layers = self._layers()
        tensors = {}
        for name, layer in layers.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a[ADAPTER]
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b[ADAPTER]
        tensors.update({PREFIX + name: tensor for name, tensor in self._saved.tensors().items()})
        save_adapter(directory, to_config(self.model, self.method, layers, list(self._saved.modules)), tensors)

    # ---- merging -------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the base weights hold the sum."""
        return any(layer.merged for layer in self._layers().values())

    def merge(self, keep_base: bool = True) -> None:
        """Fold the adapter into the base weights: W + s B A, summed in float32 and rounded once; the layers are plain
        ones then.

        A second merge changes nothing. While merged, a state_dict of the model holds the sums under `weight`.

        keep_base: keep the base bits in host memory (as many bytes as the adapted weights), so that :meth:`unmerge`
            restores them exactly. False frees them: for a model that is to stay merged, after which :meth:`detach`
            leaves plain layers.

        Raises RuntimeError where a weight is shared with another module (tied embeddings), which would change as well.
        """
        self._check("merge")
        layers = self._layers()
        for name, layer in layers.items():
            others = [other for other in _owners(self.model, layer.weight) if other != f"{name}.weight"]
            if others:
                raise RuntimeError(
                    f"merge: {name}.weight is tied to {', '.join(others)}, which would change with it; give {name} "
                    "a weight of its own before attaching (in transformers: tie_word_embeddings=False)"
                )
        for layer in layers.values():
            layer.merge(keep_base)
        if not keep_base:
            self._saved.forget_original()

    def unmerge(self) -> None:
        """Restore the base weights bit for bit. Nothing happens where nothing is merged.

        Raises RuntimeError after `merge(keep_base=False)`.
        """
        self._check("unmerge")
        self._check_base("unmerge")
        for layer in self._layers().values():
            layer.unmerge()

    # ---- switching off -------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model gives the base model's output, bit for bit; it may be nested.

        Raises RuntimeError after `merge(keep_base=False)`.
        """
        if self._disabled:
            yield
            return
        self._check("disabled")
        self._check_base("disabled")
        layers = self._layers().values()
        merged = [layer for layer in layers if layer.merged]
        with ExitStack() as stack:
            for layer in merged:
                stack.callback(layer.merge)
                layer.unmerge()
            for layer in layers:
                stack.callback(layer.set_disabled, False)
                layer.set_disabled(True)
            stack.enter_context(self._saved.restored())
            stack.callback(setattr, self, "_disabled", False)
            self._disabled = True
            yield

    def detach(self) -> nn.Module:
        """Take the adapter out and return the model as it was: classes, names and their order, values, requires_grad.

        After `merge(keep_base=False)` the merged weights and the trained modules of `modules_to_save` stay. The tuning
        cannot be used any more.
        """
        self._check("detach")
        if not self._base_freed():
            self.unmerge()
            self._saved.restore()
        for layer in self._layers().values():
            layer.remove_()
        self._restore_requires_grad()
        self._attached = False
        return self.model

    # ---- report --------------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """What is trained; `print(tuning.summary())` shows a table."""
        self._check("summary")
        rows = []
        for name, layer in self._layers().items():
            out_features, in_features = layer._weight().shape
            factors = (layer.lora_a[ADAPTER], layer.lora_b[ADAPTER])
            rows.append(_row(name, layer, factors, (in_features, out_features), layer.rank))
        for name, module in self._saved.modules.items():
            rows.append(_row(name, module, tuple(module.parameters()), None, None))
        position = {name: index for index, (name, _) in enumerate(self.model.named_modules())}
        rows.sort(key=lambda row: position[row.name])
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return Summary(tuple(rows), dict(self._skipped), total)

    # ---- private -------------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, LoRALayer]:
        return {name: self.model.get_submodule(name) for name in self._names}

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        own = {}
        for name, layer in self._layers().items():
            own[f"{name}.lora_a.{ADAPTER}"] = layer.lora_a[ADAPTER]
            own[f"{name}.lora_b.{ADAPTER}"] = layer.lora_b[ADAPTER]
        return {**own, **self._saved.parameters()}

    def _base_freed(self) -> bool:
        return any(layer.merged and layer._base_weight is None for layer in self._layers().values())

    def _check_base(self, action: str) -> None:
        if self._base_freed():
            raise RuntimeError(f"{action}: the base weights were freed by merge(keep_base=False)")

    def _check(self, action: str) -> None:
        if not self._attached:
            raise RuntimeError(f"{action}: this adapter was taken out by detach()")
        if self._disabled:
            raise RuntimeError(f"{action}: not possible inside disabled()")

    def _check_not_tied(self, saved: dict[str, nn.Module]) -> None:
        for path, module in saved.items():
            for name, parameter in module.named_parameters():
                others = [other for other in _owners(self.model, parameter) if not other.startswith(f"{path}.")]
                if others:
                    raise ValueError(
                        f"modules_to_save: {path}.{name} is tied to {', '.join(others)}, which would be trained with it"
                    )

    def _restore_requires_grad(self) -> None:
        for name, parameter in _all_parameters(self.model):
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])


def _plain_model(model: nn.Module, action: str) -> nn.Module:
    """The module under torch.compile's wrapper, checked to carry no adapter yet."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{action}: model is a {type(model).__name__}, but it must be a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)
    present = [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]
    if present:
        raise RuntimeError(f"{action}: the model carries an adapter already ({present[0]}, ...); detach() it first")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise RuntimeError(f"{action}: the model carries Hugging Face PEFT adapters; merge or unload them first")
    return model


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _owners(model: nn.Module, parameter: nn.Parameter) -> list[str]:
    """Full names under which modules hold `parameter`; a module that has several names counts once."""
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, value in module._parameters.items()
        if value is parameter
    ]


def _row(
    name: str, module: nn.Module, parameters: tuple, shape: tuple[int, int] | None, rank: int | None
) -> TrainedModule:
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return TrainedModule(name, type(module).__name__, shape, rank, count, size)
