"""Modules that are trained whole beside an adapter (`modules_to_save`), such as a classification head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class SavedModules:
    """Modules whose parameters are trained in place, with a copy of the values they had before.

    modules: full name -> module.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self._original = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> parameter that can be trained."""
        named = {f"{path}.{name}": p for path, module in self.modules.items() for name, p in module.named_parameters()}
        return {name: parameter for name, parameter in named.items() if parameter.is_floating_point()}

    def tensors(self) -> dict[str, Tensor]:
        """Full name -> what the module's state_dict holds: parameters and persistent buffers."""
        return {f"{path}.{name}": t for path, module in self.modules.items() for name, t in module.state_dict().items()}

    @torch.no_grad()
    def assign(self, values: dict[str, Tensor]) -> None:
        """Write `values` (full name -> tensor) into the modules."""
        for name, tensor in self.tensors().items():
            tensor.copy_(values[name])

    def restore(self) -> None:
        """Give the modules the values they had before."""
        self.assign(self._original)

    def forget_original(self) -> None:
        """Free the copy; the modules keep their trained values for good."""
        self._original = {}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within it the modules have the values they had before.

        The storages are exchanged and nothing is written, so that a graph recorded outside can still run backward.
        """
        pairs = [(t, self._original[name]) for name, t in self._live().items()]
        trained = [tensor.data for tensor, _ in pairs]
        try:
            for tensor, original in pairs:
                tensor.data = original.to(tensor.device, tensor.dtype)
            yield
        finally:
            for (tensor, _), value in zip(pairs, trained, strict=True):
                tensor.data = value

    def _live(self) -> dict[str, Tensor]:
        """Like :meth:`tensors`, but the module's own tensors and not detached views of them."""
        keys = self._original.keys()
        found = {}
        for path, module in self.modules.items():
            for kind in (module.named_parameters, module.named_buffers):
                found.update(
                    {f"{path}.{name}": t for name, t in kind(remove_duplicate=False) if f"{path}.{name}" in keys}
                )
        return found
