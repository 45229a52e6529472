"""The contract of every method: attach it to a model, train, save, merge, switch off, take it out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from ..nn import inits
from ..nn.adapter import check_name
from ..nn.dtensor import is_dtensor
from ..nn.linear import LinearLike, LoRALinear
from ..nn.lora import LoRALayer
from ..nn.sharing import share_inputs
from .entry import Entry, active_weights, check_apart, fill, flags_kept, read, take_out
from .files import save_adapter
from .lora import LoRA, Plan, plan
from .merge_report import MergeReport, compare_outputs, measure_layer, run_probe
from .model import all_parameters, check_not_fully_sharded, check_not_tied, check_own_weights
from .peft_files import to_files
from .saved import Saved
from .summary import Summary, summarize


class Tuning:
    """The adapters of one model, made by :func:`peftops.attach` or :func:`peftops.load`.

    model: the adapted model; adapters: name -> method, in the order in which they were added; active: name -> weight by
    which the adapter's scale is multiplied.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        method: LoRA,
        what: Plan,
        trainable: bool,
        values: dict[str, torch.Tensor] | None = None,
        sharing: bool = False,
    ):
        check_name(name)
        self.model, self._sharing = model, sharing
        self._attached, self._disabled = True, False
        self._entries: dict[str, Entry] = {}
        self.active: dict[str, float] = {}
        # By name: a move from the meta device makes new parameter objects.
        self._requires_grad = {name: p.requires_grad for name, p in all_parameters(model)}
        check_not_tied(model, what.saved)
        changed = [p for p, a in what.layers.items() if p not in what.factors and inits.reads_weight(a.init)]
        check_own_weights(model, changed, f"attach: init {method.init!r}")
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            self._insert(name, method, what, trainable, values)
        except BaseException:
            self._restore_requires_grad()
            raise
        self.activate(name)

    @property
    def adapters(self) -> dict[str, LoRA]:
        return {name: entry.method for name, entry in self._entries.items()}

    @property
    def method(self) -> LoRA:
        """The method of the first adapter."""
        return next(iter(self._entries.values())).method

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

    # ---- several adapters ----------------------------------------------------------------------------------------

    def add(
        self, name: str, source: LoRA | str | os.PathLike, trainable: bool = False, capacity: int | None = None
    ) -> None:
        """Put one more adapter beside those that are there, not active yet.

        source: a method, or a directory as for :func:`peftops.load`.
        trainable: whether it is trained.
        capacity: ranks to hold memory for, so that :meth:`swap` can take over a larger adapter without a recompilation.

        Raises what :func:`peftops.attach` and :func:`peftops.load` raise, ValueError for a name that is taken and for
        an initialisation that changes the base weights, under which the other adapters were trained. The model is then
        untouched.
        """
        self._check("add", merged=False)
        check_not_fully_sharded(self.model, "add")
        check_name(name)
        if name in self._entries:
            raise ValueError(f"add: name is {name!r}, but there is an adapter of that name; swap() replaces it")
        if isinstance(source, LoRA):
            method, what, values = source, plan(self.model, source), None
        elif isinstance(source, (str, os.PathLike)):
            loaded = read(self.model, source, "add")
            method, what, values = loaded.method, loaded.plan, loaded.saved_values
        else:
            raise TypeError(f"add: source is {source!r}, but it must be a method or a directory")
        self._check_base_unchanged(what)
        check_not_tied(self.model, what.saved)
        self._check_movable()
        with flags_kept(self.model), self._base_values():
            self._insert(name, method, what, trainable, values, capacity)
            self._entries[name].saved.leave()
        self._apply_activation()

    def activate(self, which: str | Sequence[str] | Mapping[str, float] | None) -> None:
        """Let these adapters act, and no others: one name, several, name -> weight by which the scale is multiplied, or
        None. Several add up. Nothing is recompiled, and what is trained stays trained. A module that two adapters train
        whole is one parameter object for both, and so is an optimizer's state for it.

        Raises ValueError for a name that is not there, a weight that is no number, and two adapters that both train the
        same module whole.
        """
        self._check("activate", merged=False)
        weights = active_weights(which)
        for name in weights:
            self._entry(name, "activate")
        check_apart({name: self._entries[name].saved for name in weights}, "activate")
        for name, entry in self._entries.items():
            entry.saved.check_movable(name in weights)
        self.active = weights
        self._apply_activation()

    def swap(self, name: str, directory: str | os.PathLike) -> None:
        """Put the adapter in `directory` into the place of `name`, which stays active and trainable as it was.

        Nothing is recompiled where it adapts no other layers and its rank is at most the capacity. An optimizer made
        before holds the old adapter's moments: make a new one. Raises what
        :func:`peftops.load` raises, ValueError for a name that is not there. The model is then untouched.
        """
        self._check("swap", merged=False)
        check_not_fully_sharded(self.model, "swap")
        entry = self._entry(name, "swap")
        loaded = read(self.model, directory, "swap")
        self._check_base_unchanged(loaded.plan)
        check_not_tied(self.model, loaded.plan.saved)
        layers, factors = loaded.plan.layers, loaded.plan.factors
        # In one order on all ranks.
        places = {path: self.model.get_submodule(path) for path in entry.places}
        self._check_movable()
        with flags_kept(self.model):
            with self._base_values():
                saved = Saved(self.model, loaded.plan.saved, loaded.plan.trained, loaded.plan.replaced)
                saved.assign(loaded.saved_values)
                saved.leave()
            check_apart({key: saved if key == name else self._entries[key].saved for key in self.active}, "swap")
            # Whatever can fail comes before anything is written.
            ready = {
                path: layer.ready_to_swap(name, layers[path], factors[path])
                for path, layer in places.items()
                if path in layers
            }
            fill(self.model, name, {path: adapter for path, adapter in layers.items() if path not in places}, factors)
        self._group()
        for path, layer in places.items():
            if path in layers:
                layer.take_(name, layers[path], ready[path])
            else:
                layer.clear_(name)
        entry.saved.retire()
        entry.method, entry.saved, entry.skipped = loaded.method, saved, loaded.plan.skipped
        entry.layers, entry.blank = list(layers), sorted(places.keys() - layers.keys())
        self._set_factor_flags(name)
        self._apply_activation()

    def delete(self, name: str) -> None:
        """Take one adapter out. Raises ValueError for a name that is not there and for the last one, which
        :meth:`detach` takes out.
        """
        self._check("delete", merged=False)
        check_not_fully_sharded(self.model, "delete")
        entry = self._entry(name, "delete")
        if len(self._entries) == 1:
            raise ValueError(f"delete: {name!r} is the only adapter; detach() takes it out")
        entry.saved.retire()
        for path in entry.places:
            take_out(self.model.get_submodule(path), name)
        del self._entries[name]
        self.active.pop(name, None)
        self._apply_activation()

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike, name: str | None = None) -> None:
        """Write one adapter in Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

        name: which one; None = the only one there is, or the only one that is active. Existing files of these names
        are replaced, each in one step. Where the model is sharded every rank has to call it; the first one writes.
        Raises ImportError without safetensors, ValueError where `name` is needed.
        """
        self._check("save")
        if name is None:
            candidates = list(self._entries) if len(self._entries) == 1 else list(self.active)
            if len(candidates) != 1:
                raise ValueError(f"save: name which adapter; there are {', '.join(map(repr, self._entries))}")
            (name,) = candidates
        entry = self._entry(name, "save")
        layers = {path: self._layer(path) for path in entry.layers}
        config, tensors = to_files(self.model, entry.method, name, layers, entry.saved)
        spread = any(is_dtensor(parameter) for parameter in self.model.parameters())
        if not spread or torch.distributed.get_rank() == 0:
            save_adapter(directory, config, tensors)

    # ---- merging -------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the base weights hold the sum."""
        return any(layer.merged for layer in self._layers().values())

    def merge(self, keep_base: bool = True, report: bool = False, probe: object = None) -> MergeReport | None:
        """Fold the active adapters into the base weights: W + s B A, summed in float32 and rounded once; the layers are
        plain ones then.

        A second merge changes nothing. While merged, a state_dict of the model holds the sums under `weight`.

        keep_base: keep the base bits in host memory (as many bytes as the adapted weights), so that :meth:`unmerge`
            restores them exactly. False frees them: for a model that is to stay merged, after which :meth:`detach`
            leaves plain layers.
        report: return what the rounding of the stored weights costs, layer by layer.
        probe: a batch (a tensor, a tuple or a dict of arguments) for which the report compares the model's output
            before and after.

        Raises RuntimeError where a weight is shared with another module (tied embeddings), which would change as well.
        """
        self._check("merge")
        layers = self._layers()
        check_own_weights(self.model, layers, "merge")
        for name, layer in layers.items():
            if reason := layer.why_not_merge():
                raise RuntimeError(f"merge: {name}: {reason}")
        report = report or probe is not None
        before = None if probe is None else run_probe(self.model, probe)
        if probe is not None:
            compare_outputs(before, before)  # raises for an output without numbers while nothing has changed
        apart = [layer for layer in layers.values() if not layer.merged]
        try:
            errors = [
                layer.merge(keep_base, partial(measure_layer, name) if report else None)
                for name, layer in layers.items()
            ]
        except BaseException:
            for layer in apart:
                if keep_base:
                    layer.unmerge()
            raise
        if not keep_base:
            for name, entry in self._entries.items():
                if name in self.active:
                    entry.saved.forget_original()
        if not report:
            return None
        output = None if probe is None else compare_outputs(before, run_probe(self.model, probe))
        return MergeReport(tuple(error for error in errors if error is not None), output)

    def unmerge(self) -> None:
        """Restore the base weights bit for bit. Nothing happens where nothing is merged.

        Raises RuntimeError after `merge(keep_base=False)`.
        """
        self._check("unmerge")
        self._check_base("unmerge")
        for layer in self._layers().values():
            layer.unmerge()

    # ---- few rows on the CPU -------------------------------------------------------------------------------------

    def prepack(self) -> int:
        """For generating text on the CPU: hold a second copy of every adapted linear weight in the order in which
        calls of few rows (64 at most) without gradients read it. Returns the bytes of the copies.

        They follow the weights, are in no file and go with :meth:`unpack` and :meth:`detach`; layers adapted later have
        none. The last bits of such calls differ from those without.

        Raises RuntimeError where an adapted linear layer is not on the CPU; nothing is held then.
        """
        self._check("prepack")
        layers = [layer for layer in self._layers().values() if isinstance(layer, LinearLike)]
        try:
            return sum(layer.prepack_() for layer in layers)
        except BaseException:
            self.unpack()
            raise

    def unpack(self) -> None:
        """Free the copies of :meth:`prepack`."""
        self._check("unpack")
        for layer in self._layers().values():
            if isinstance(layer, LinearLike):
                layer.unpack_()

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
        self._check_movable()
        layers = self._layers().values()
        merged = [layer for layer in layers if layer.merged]
        with ExitStack() as stack:
            for layer in merged:
                stack.callback(layer.merge)
                layer.unmerge()
            for layer in layers:
                stack.callback(layer.set_disabled, False)
                layer.set_disabled(True)
            for entry in self._entries.values():
                stack.enter_context(entry.saved.left())
            stack.callback(setattr, self, "_disabled", False)
            self._disabled = True
            yield

    def detach(self) -> nn.Module:
        """Take all adapters out and return the model as it was: classes, names and their order, values, requires_grad.

        After `merge(keep_base=False)` the merged weights and the trained modules of `modules_to_save` stay. The tuning
        cannot be used any more.
        """
        self._check("detach")
        check_not_fully_sharded(self.model, "detach")
        if not self._base_freed():
            self.unmerge()
            for entry in self._entries.values():
                entry.saved.restore()
        for layer in self._layers().values():
            layer.remove_()
        self._restore_requires_grad()
        self._attached = False
        return self.model

    # ---- report --------------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """What the adapters are; `print(tuning.summary())` shows a table."""
        self._check("summary")
        return summarize(self.model, self._entries)

    # ---- private -------------------------------------------------------------------------------------------------

    def _insert(self, name, method, what: Plan, trainable, values, capacity=None) -> None:
        saved = Saved(self.model, what.saved, what.trained, what.replaced)
        fill(self.model, name, what.layers, what.factors, capacity)
        if values is not None:
            saved.assign(values)
        self._entries[name] = Entry(method, list(what.layers), saved, trainable, what.skipped, [])
        self._set_factor_flags(name)
        self._group()

    def _group(self) -> None:
        if self._sharing:
            share_inputs(self.model, LoRALinear)

    def _apply_activation(self) -> None:
        """Bring scales and the modules that are trained whole in line with `active`."""
        for path, layer in self._layers().items():
            own = {name: weight for name, weight in self.active.items() if path in self._entries[name].layers}
            layer.set_active(own)
        inactive = [entry for name, entry in self._entries.items() if name not in self.active]
        for entry in inactive:
            entry.saved.retire()
        for name in self.active:
            entry = self._entries[name]
            entry.saved.enter()
            for parameter in entry.saved.parameters().values():
                parameter.requires_grad_(entry.trainable)

    def _set_factor_flags(self, name: str) -> None:
        """Let the factors of one adapter be trained, or not. What a swap has left empty is not."""
        entry = self._entries[name]
        for path in entry.places:
            layer = self._layer(path)
            for key, parameter in layer.factor_parameters(name).items():
                empty = path in entry.blank or (key == "lora_bias" and not layer.adapters[name].lora_bias)
                parameter.requires_grad_(entry.trainable and not empty)

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> factor, or parameter that an active adapter trains in place, in the order of the adapters."""
        found: dict[str, nn.Parameter] = {}
        for name, entry in self._entries.items():
            for path in entry.places:
                factors = self._layer(path).factor_parameters(name)
                found.update({f"{path}.{key}.{name}": parameter for key, parameter in factors.items()})
            if name in self.active:
                found.update(entry.saved.parameters())
        return found

    def _layers(self) -> dict[str, LoRALayer]:
        paths = [path for entry in self._entries.values() for path in entry.places]
        return {path: self._layer(path) for path in dict.fromkeys(paths)}

    def _layer(self, path: str) -> LoRALayer:
        layer = self.model.get_submodule(path)
        if not isinstance(layer, LoRALayer):
            raise RuntimeError(f"{path} was replaced by a plain {type(layer).__name__} after its adapter was put in")
        return layer

    @contextmanager
    def _base_values(self) -> Iterator[None]:
        """Within it the modules that adapters train whole have the base model's values."""
        with ExitStack() as stack:
            for entry in self._entries.values():
                stack.enter_context(entry.saved.left())
            yield

    def _entry(self, name: object, action: str) -> Entry:
        if name not in self._entries:
            there = ", ".join(map(repr, self._entries))
            raise ValueError(f"{action}: there is no adapter {name!r}, only {there}")
        return self._entries[name]

    def _base_freed(self) -> bool:
        return any(layer.merged and layer._kept is None for layer in self._layers().values())

    def _check_base(self, action: str) -> None:
        if self._base_freed():
            raise RuntimeError(f"{action}: the base weights were freed by merge(keep_base=False)")

    def _check_movable(self) -> None:
        """Raise RuntimeError where the base model's values cannot come back for a while."""
        for entry in self._entries.values():
            entry.saved.check_movable(False)
        for path, layer in self._layers().items():
            if layer.initial and is_dtensor(layer.weight):
                init = next(layer.adapters[name].init for name in layer.initial)
                raise RuntimeError(
                    f"{path}.weight was changed by init {init!r} and is spread over processes: it cannot be switched "
                    "to its original"
                )

    def _check(self, action: str, merged: bool = True) -> None:
        if not self._attached:
            raise RuntimeError(f"{action}: this adapter was taken out by detach()")
        if self._disabled:
            raise RuntimeError(f"{action}: not possible inside disabled()")
        if not merged and self.merged:
            raise RuntimeError(f"{action}: not possible while merged; unmerge() first")

    def _check_base_unchanged(self, what: Plan) -> None:
        """One adapter whose initialisation changes the base weight has to be alone with it."""
        for path, layer in self._layers().items():
            if layer.initial:
                name = next(iter(layer.initial))
                raise ValueError(
                    f"{name!r} has changed the base weights (init {layer.adapters[name].init!r}, {path}); "
                    "save it and load it again to use it beside others"
                )
        for path, adapter in what.layers.items():
            if path not in what.factors and inits.reads_weight(adapter.init):
                raise ValueError(
                    f"init is {adapter.init!r}, which changes the base weights, under which other adapters were "
                    "trained; attach it alone"
                )

    def _restore_requires_grad(self) -> None:
        for name, parameter in all_parameters(self.model):
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
