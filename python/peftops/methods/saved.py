"""Parameters that are trained in place beside an adapter's factors: modules of `modules_to_save`, such as a
classification head, and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nn.dtensor import is_dtensor, spread_like
from ..nn.lora import LoRALayer


def persistent_names(module: nn.Module) -> list[str]:
    """Names in the module's state_dict but for the factors of adapters on layers inside it."""
    added = tuple(
        f"{name}.{kind}." if name else f"{kind}."
        for name, layer in module.named_modules()
        if isinstance(layer, LoRALayer)
        for kind in ("lora_a", "lora_b", "lora_bias")
    )
    return [name for name in module.state_dict() if not name.startswith(added)]


class Saved:
    """Tensors of a model that an adapter has its own values for, with a copy of the values they had before.

    modules: full names of modules that are trained whole, with their persistent buffers; parameters: full names of
    single parameters that are trained; replaced: of such that are not trained. While another adapter is active, the
    values are kept here and the model has its own.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[str] = (),
        parameters: Iterable[str] = (),
        replaced: Iterable[str] = (),
    ):
        self._model = model
        self.modules, self.names, self.replaced = tuple(modules), tuple(parameters), tuple(replaced)
        self._original = {name: tensor.detach().clone() for name, tensor in self._live().items()}
        self._own: dict[str, Tensor] | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> parameter that can be trained."""
        return {
            name: tensor
            for name, tensor in self._live().items()
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and name not in self.replaced
        }

    def tensors(self) -> dict[str, Tensor]:
        """Full name -> the adapter's value, whether it is active or not."""
        return self._live() if self._own is None else dict(self._own)

    @torch.no_grad()
    def assign(self, values: dict[str, Tensor]) -> None:
        """Give the adapter these values, by full name."""
        for name, tensor in self.tensors().items():
            tensor.copy_(spread_like(values[name], tensor))

    def check_movable(self, entered: bool) -> None:
        """Raise RuntimeError where :meth:`enter` (`entered`) or :meth:`leave` would exchange a DTensor's storage, of
        which other modules of torch hold views.
        """
        if entered == (self._own is None):
            return
        for name, tensor in self._live().items():
            if is_dtensor(tensor):
                raise RuntimeError(
                    f"{name} is spread over processes and cannot take its other value; modules_to_save and trained "
                    "biases are switched where nothing is sharded"
                )

    def leave(self) -> None:
        """Give the model its own values back and keep the adapter's; the storages are exchanged."""
        if self._own is None:
            self._check_original()
            # Copies, for another adapter may take over and train what lies in the model.
            self._own = self._exchange({name: value.clone() for name, value in self._original.items()})

    def retire(self) -> None:
        """:meth:`leave`, and what training has left on the parameters, flags and gradients, goes too."""
        if self._own is None:
            self.leave()
            for parameter in self.parameters().values():
                parameter.requires_grad_(False)
                parameter.grad = None

    def enter(self) -> None:
        """Put the adapter's values into the model."""
        if self._own is not None:
            self._exchange(self._own)
            self._own = None

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values that the model had before into it, for good."""
        if self._own is None:
            self._check_original()
            for name, tensor in self._live().items():
                tensor.copy_(self._original[name])

    def forget_original(self) -> None:
        """Free the copy; the model keeps the trained values for good."""
        self._original = {}

    @contextmanager
    def left(self) -> Iterator[None]:
        """Within it the model has the values it had before."""
        if self._own is not None:
            yield
            return
        self.leave()
        try:
            yield
        finally:
            self.enter()

    def _check_original(self) -> None:
        for name, value in self._original.items():
            if value.is_meta:
                raise RuntimeError(
                    f"the base model's {name} is not known: the adapter was put in while the model was on the meta "
                    "device; attach or load it after the base weights to have them back"
                )

    def _exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put `values` into the model and return what it had. Nothing is written, so that a graph recorded before can
        still run backward once they are exchanged again.
        """
        before = {}
        for name, tensor in self._live().items():
            before[name] = tensor.data
            tensor.data = values[name].to(tensor.device, tensor.dtype)
        return before

    def _live(self) -> dict[str, Tensor]:
        """Full name -> the model's own tensor: parameters, and buffers that a state_dict holds."""
        found = {}
        for path in self.modules:
            module = self._model.get_submodule(path)
            persistent = persistent_names(module)
            for kind in (module.named_parameters, module.named_buffers):
                named = ((name, t) for name, t in kind(remove_duplicate=False) if name in persistent)
                found.update({f"{path}.{name}": tensor for name, tensor in named})
        found.update({name: self._model.get_parameter(name) for name in (*self.names, *self.replaced)})
        return found
