"""Putting a method into a model: anew, or from a directory."""

from __future__ import annotations

import os

from torch import nn

from ..nn.adapter import ADAPTER
from .entry import read
from .lora import LoRA, plan
from .model import plain_model
from .tuning import Tuning


def attach(model: nn.Module, method: LoRA, name: str = ADAPTER, share_inputs: bool = False) -> Tuning:
    """Put `method` into `model`, in place, and return the handle that trains, saves, merges and removes it.

    The model keeps its class, its parameter names and their order; all of its parameters are frozen but those that the
    method trains. Right after it the output is the base model's. Everything is checked before anything changes.

    name: of the adapter, where there will be several.
    share_inputs: whether projections that read the same input (q, k and v; gate and up) are computed in one operator
        call, see :mod:`peftops.nn.sharing`. Outputs and masks stay what they are; the last bits of gradients differ.
        Not under torch.compile, hooks on a layer or non-reentrant checkpointing, where each layer is called.

    Raises TypeError for something that is no method or a target that cannot be adapted, ValueError for a target that
    matches nothing or a hyperparameter that does not fit, RuntimeError for a model that carries adapters already.
    """
    if not isinstance(method, LoRA):
        raise TypeError(f"attach: method is {method!r}, but it must be a method such as peftops.LoRA(...)")
    model = plain_model(model, "attach")
    return Tuning(model, name, method, plan(model, method), trainable=True, sharing=share_inputs)


def load(
    model: nn.Module,
    directory: str | os.PathLike,
    trainable: bool = False,
    name: str = ADAPTER,
    share_inputs: bool = False,
) -> Tuning:
    """Attach the adapter in `directory`, in Hugging Face PEFT's format, to `model`, in place.

    trainable: whether training goes on; otherwise everything is frozen. Factors keep the dtype of the file where it is
        the base weight's, or float32 over a 16-bit base; any other is widened to float32.
    share_inputs: as for :func:`attach`.

    Raises FileNotFoundError or ValueError, naming the file, for one that is missing, damaged, a pickle, of another
    method, uses a key that is not supported, or does not fit the model (missing, unexpected and mis-shaped tensors are
    listed); otherwise as :func:`attach`. The model is then untouched.
    """
    model = plain_model(model, "load")
    loaded = read(model, directory, "load")
    return Tuning(model, name, loaded.method, loaded.plan, trainable, loaded.saved_values, share_inputs)
