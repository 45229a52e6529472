"""Serving several adapters of one model at once: a batch in which each row has its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nn.adapter import factor_dtype
from ..nn.dtensor import is_dtensor
from ..nn.grouped import NO_ADAPTER, GroupedLike, GroupedLoRALinear, Rows
from ..nn.linear import LinearLike
from ..nn.lora import lora_class
from .entry import read
from .model import plain_model
from .peft_files import Loaded

# Arguments of a model that tell its number of rows, where it does not name its main input itself.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")


class MultiLoRA:
    """Several trained adapters in one model, in place; each row of a batch is computed with its own.

        multi = peftops.MultiLoRA(model, {"sql": "adapters/sql", "chat": "adapters/chat"})
        multi(input_ids, adapters=["sql", None, "chat"]).logits
        multi.generate(input_ids, adapters=["sql", None, "chat"], max_new_tokens=64, num_beams=4)

    model: any model whose activations have the batch first; adapters: name -> directory in Hugging Face PEFT's format.
    They may differ in rank, scale and target modules; a layer that an adapter does not have stays the base model's for
    its rows. A row's result is that of the adapter alone (:func:`peftops.load`), and which rows use which adapter
    recompiles nothing. There is no dropout, also in training mode. The choice of the last call also counts where the
    model itself is called; calls from several threads at once share it, so that they have to take turns.

    Linear layers and transformers' `Conv1D` are served. Refused by name, before anything changes: adapters of
    embeddings and convolutions, of experts that see tokens out of their rows, with trained biases (`bias`,
    `lora_bias`), modules of their own (`modules_to_save`) or changed base weights, and all that :func:`peftops.load`
    refuses, such as DoRA.

    Raises what :func:`peftops.load` raises, ValueError for an adapter that cannot be served.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, str | os.PathLike]):
        if not isinstance(adapters, Mapping) or not adapters:
            raise TypeError(
                f"MultiLoRA: adapters is {adapters!r}, but it must be a dictionary of names and directories"
            )
        self.model = plain_model(model, "MultiLoRA")
        self._called = model  # torch.compile's wrapper, where it came in one
        self._rows = Rows()
        self._places: dict[str, int] = {}
        self._attached = True
        loaded = {name: self._read(name, directory, "MultiLoRA") for name, directory in adapters.items()}
        self._insert(loaded)

    # ---- adapters ------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, int]:
        """Name of each adapter -> its id, as a tensor of ids means it; -1 is none."""
        return dict(self._places)

    def add(self, name: str, directory: str | os.PathLike) -> None:
        """Load one more adapter. The place of a removed one is used again; else the stacks grow, with which a compiled
        model is compiled anew.

        Raises what the constructor raises, ValueError for a name that is taken. The model is then untouched.
        """
        self._check("add")
        if name in self._places:
            raise ValueError(f"add: name is {name!r}, but there is an adapter of that name; remove() it first")
        with self._plain():
            loaded = self._read(name, directory, "add")
        self._insert({name: loaded})

    def remove(self, name: str) -> None:
        """Take one adapter out; layers that no other adapter has become plain again. Raises ValueError for a name that
        is not there.
        """
        self._check("remove")
        self._vacate(self._place(name, "remove"))
        del self._places[name]
        self._rows.ids = None  # the last choice may name it

    def detach(self) -> nn.Module:
        """Take all adapters out and return the model as it was. This object cannot be used any more."""
        self._check("detach")
        for layer in self._layers():
            layer.remove_()
        self._attached = False
        return self.model

    # ---- calls ---------------------------------------------------------------------------------------------------

    def __call__(self, *args, adapters: str | None | Sequence[str | None] | Tensor, **kwargs):
        """The model's output for these arguments, each row with its adapter.

        adapters: one name (or None, the base model) for each row, one for all rows, or an integer tensor [rows] of ids
            (:attr:`adapters`; -1 is none).

        Raises ValueError for a name that is not there and where there are not as many names as rows, TypeError for
        something else; nothing has run then.
        """
        self._choose(adapters, args, kwargs, 1, "call")
        return self._called(*args, **kwargs)

    def generate(self, *args, adapters: str | None | Sequence[str | None] | Tensor, **kwargs):
        """The model's `generate`, each row of the input with its adapter, which its beams and returned sequences share.
        Arguments and errors as those of a call.
        """
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        counts = (kwargs.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences"))
        with torch.no_grad():
            self._choose(adapters, args, kwargs, max(counts), "generate")
        return self._called.generate(*args, **kwargs)

    def select(self, adapters: str | None | Sequence[str | None] | Tensor) -> None:
        """Choose the adapters for calls of the model itself, as for a recorded CUDA graph: without gradients the ids
        are written into the same memory while their number stays the same.
        """
        self._check("select")
        self._rows.assign(self._ids(adapters, None, "select"), self._device())

    def _choose(self, adapters: object, args: tuple, kwargs: dict, repeats: int, action: str) -> None:
        self._check(action)
        main = self._main_input(args, kwargs)
        rows = None if main is None else main.shape[0]
        tokens = main is not None and main.dim() == 2 and not main.is_floating_point()
        length = main.shape[1] if tokens else None
        self._rows.assign(self._ids(adapters, rows, action), self._device(), repeats, length)

    def _main_input(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The argument that has as many rows as the batch."""
        names = (getattr(self.model, "main_input_name", None), *_INPUTS)
        given = [*args, *(kwargs.get(name) for name in names), *kwargs.values()]
        return next((value for value in given if isinstance(value, Tensor) and value.dim() > 0), None)

    def _ids(self, adapters: object, rows: int | None, action: str) -> Tensor:
        if isinstance(adapters, Tensor):
            return self._checked_ids(adapters, rows, action)
        if adapters is None or isinstance(adapters, str):
            return torch.tensor([self._id(adapters, action)], device="cpu")
        if not isinstance(adapters, Sequence) or not all(name is None or isinstance(name, str) for name in adapters):
            raise TypeError(
                f"{action}: adapters is {adapters!r}, but it must be a name or None, one of them for each row, or a "
                "tensor of ids"
            )
        if rows is not None and len(adapters) != rows:
            raise ValueError(f"{action}: adapters names {len(adapters)} rows, but the batch has {rows}")
        return torch.tensor([self._id(name, action) for name in adapters], dtype=torch.int64, device="cpu")

    def _checked_ids(self, ids: Tensor, rows: int | None, action: str) -> Tensor:
        if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1:
            raise TypeError(
                f"{action}: adapters is a {ids.dtype} tensor of shape {list(ids.shape)}, but ids must be int32 or "
                "int64 of shape [rows]"
            )
        if rows is not None and ids.shape[0] != rows:
            raise ValueError(f"{action}: adapters has {ids.shape[0]} ids, but the batch has {rows} rows")
        if ids.device.type == "cpu":
            unknown = sorted(set(ids.tolist()) - {NO_ADAPTER, *self._places.values()})
            if unknown:
                raise ValueError(
                    f"{action}: adapters has the id {unknown[0]}, but there are only {self._places} and -1"
                )
        return ids

    def _id(self, name: str | None, action: str) -> int:
        return NO_ADAPTER if name is None else self._place(name, action)

    # ---- private -------------------------------------------------------------------------------------------------

    def _read(self, name: str, directory: str | os.PathLike, action: str) -> Loaded:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{action}: {name!r} is no name for an adapter; it must be a string")
        loaded = read(self.model, directory, action)
        if reason := _why_not(self.model, loaded):
            raise ValueError(f"{action}: {os.fspath(directory)}: {reason}")
        return loaded

    def _insert(self, loaded: Mapping[str, Loaded]) -> None:
        """Put adapters that were checked into the model."""
        taken = set(self._places.values())
        free = (place for place in range(len(taken) + len(loaded)) if place not in taken)
        places = dict(zip(loaded, free, strict=False))
        count = max(taken | set(places.values())) + 1
        wanted: dict[str, tuple[int, torch.dtype]] = {}
        for each in loaded.values():
            for path, adapter in each.plan.layers.items():
                weight = self.model.get_submodule(path).weight
                rank, dtype = wanted.get(path, (1, weight.dtype))
                own = factor_dtype(weight.dtype, adapter.adapter_dtype)
                wanted[path] = max(rank, adapter.rank), torch.promote_types(dtype, own)
        try:
            for path, (rank, dtype) in wanted.items():
                layer = self.model.get_submodule(path)
                if not isinstance(layer, GroupedLike):
                    _class_for(layer).adapt_(layer, self._rows, count, rank, dtype)
            for layer in self._layers():
                layer.reserve_(count, 1, layer.lora_a.dtype)
            for name, each in loaded.items():
                for path, adapter in each.plan.layers.items():
                    self.model.get_submodule(path).put_(places[name], adapter, each.plan.factors[path])
        except BaseException:
            for place in places.values():
                self._vacate(place)
            raise
        self._places.update(places)

    def _vacate(self, place: int) -> None:
        """Empty a place everywhere; layers that hold no adapter become plain again."""
        for layer in self._layers():
            layer.clear_(place)
            if layer.empty:
                layer.remove_()

    def _layers(self) -> list[GroupedLike]:
        return [layer for layer in self.model.modules() if isinstance(layer, GroupedLike)]

    def _device(self) -> torch.device:
        return next((layer.weight.device for layer in self._layers()), torch.device("cpu"))

    def _place(self, name: str, action: str) -> int:
        if name not in self._places:
            there = ", ".join(map(repr, self._places)) or "none"
            raise ValueError(f"{action}: there is no adapter {name!r}, only {there}")
        return self._places[name]

    def _check(self, action: str) -> None:
        if not self._attached:
            raise RuntimeError(f"{action}: the adapters were taken out by detach()")

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Within it the layers are plain ones, as a file is compared with them."""
        layers = [(layer, type(layer)) for layer in self._layers()]
        taken = [layer.take_off_() for layer, _ in layers]
        try:
            yield
        finally:
            for (layer, kind), what in zip(layers, taken, strict=True):
                kind.put_on_(layer, what)


def _why_not(model: nn.Module, loaded: Loaded) -> str | None:
    """The reason why an adapter that fits the model cannot be served with others."""
    plan, method = loaded.plan, loaded.method
    if plan.saved:
        return f"it has modules of its own ({next(iter(plan.saved))}, modules_to_save), which all rows would share"
    if plan.trained:
        return f"it has trained biases (bias={method.bias!r}), which all rows would share"
    if plan.replaced:
        return f"it has a base weight of its own ({next(iter(plan.replaced))}), which all rows would share"
    if method.lora_bias:
        return "its factors have a bias (lora_bias), for which there is no batched operator"
    for path in plan.layers:
        layer = model.get_submodule(path)
        kind = lora_class(layer)
        if not issubclass(kind, LinearLike):
            return f"it adapts {path}, a {type(layer).__name__}; only linear layers are served"
        if is_dtensor(layer.weight):
            return f"it adapts {path}, whose weight is a DTensor"
        if re.search(r"(^|\.)experts\.", path):
            return f"it adapts {path}, an expert, which sees tokens out of their rows"
    return None


def _class_for(layer: nn.Module) -> type[GroupedLike]:
    if type(layer) is nn.Linear:
        return GroupedLoRALinear
    from ..nn.conv1d import GroupedLoRAConv1D  # a Conv1D exists, and with it transformers

    return GroupedLoRAConv1D
