"""Loading the model to be tuned and finding what of it is new, what can take an adapter and where it can run."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

from peftops._load import cuda_error

from . import processes
from .errors import InputError


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer. `head`: names of the modules that start untrained and are therefore trained whole."""

    model: torch.nn.Module
    tokenizer: object
    head: tuple[str, ...]


def first_line(error: BaseException) -> str:
    """The message of a library's exception as one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:500]


def training_device() -> torch.device:
    """This process's GPU where there is one and the CUDA kernels are loaded, else the CPU."""
    if torch.cuda.is_available() and cuda_error() is None:
        return torch.device("cuda", processes.local_rank())
    return torch.device("cpu")


def resolve(name: str) -> str:
    """The directory or hub name to load from.

    Raises:
        InputError: a path that is no model directory.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model {name}: the directory has no config.json")
        return str(path)
    if path.exists():
        raise InputError(f"--model {name}: is a file, wanted a model directory or a hub name")
    if name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1:
        raise InputError(f"--model {name}: no such directory")
    return name


def hub_unreachable() -> bool:
    """Whether the hub's name does not resolve; saves half a minute of retries on a machine without a network."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():  # then the proxy resolves names, not we
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def load_part(what: str, name: str, load):
    try:
        return load()
    except Exception as error:  # OSError, ValueError, SafetensorError, ImportError, ...: a broken directory raises any
        if Path(name).is_dir():
            raise InputError(f"--model {name}: no usable {what} ({first_line(error)})") from None
        raise InputError(
            f"--model {name}: no such directory, and no {what} of that name from the hub ({first_line(error)})"
        ) from None


def _head(model: torch.nn.Module, fresh: set[str]) -> tuple[str, ...]:
    """Modules outside the pretrained body, and modules of the body whose weights the checkpoint does not have."""
    body = model.base_model
    names = [
        name for name, child in model.named_children() if child is not body and any(True for _ in child.parameters())
    ]
    for parameter in sorted(fresh):
        module = parameter.rpartition(".")[0]
        if not any(module == name or module.startswith(name + ".") for name in names):
            names.append(module)
    return tuple(names)


def load(name: str, labels: list[str] | None, device: torch.device) -> Loaded:
    """Model and tokenizer for classification into `labels`, or for causal LM if `labels` is None.

    Weights keep the precision of the checkpoint, except that float16 becomes float32 on the CPU, where there is no loss
    scaling. A new classification head is drawn from torch's generator.

    Raises:
        InputError: no model of that name, or one that does not fit the task.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name = resolve(name)
    local = Path(name).is_dir() or hub_unreachable()  # what the hub's cache holds can still be used
    config = load_part("configuration", name, lambda: AutoConfig.from_pretrained(name, local_files_only=local))
    tokenizer = load_part("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, local_files_only=local))
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"--model {name}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    dtype = config.dtype or torch.float32
    if dtype == torch.float16 and device.type == "cpu":
        dtype = torch.float32
    if labels is None:
        kind = AutoModelForCausalLM
        config.use_cache = False
    else:
        kind = AutoModelForSequenceClassification
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    model, info = load_part(
        "model",
        name,
        lambda: kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            local_files_only=local,
            output_loading_info=True,
            ignore_mismatched_sizes=labels is not None,
        ),
    )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if labels is None:
        if fresh:
            raise InputError(f"--model {name}: the checkpoint has no weight {sorted(fresh)[0]!r}, is it a causal LM?")
        return Loaded(model, tokenizer, ())
    return Loaded(model, tokenizer, _head(model, fresh))
