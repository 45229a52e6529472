"""Hugging Face PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors` in one directory.

Only safetensors is read; a pickle file is never opened. Nothing in a file decides what is executed or which attribute
is read: names are compared with names that come from the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
OWN = "peftops_"
FINGERPRINT = OWN + "base_fingerprint"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_LARGEST_CONFIG = 2**24  # bytes; a pattern for each layer of a large model is far below


def save_adapter(directory: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write both files. Each is written under a temporary name and then renamed, the configuration last: a file that
    is there is whole. What only peftops knows, strings under keys that begin with `peftops_`, goes into the metadata of
    the tensors: PEFT warns of every key that it does not know in a configuration.

    Raises ImportError without safetensors, NotADirectoryError where `directory` is a file.
    """
    safetensors = _safetensors()
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save: {folder} is a file, but it must be a directory")
    folder.mkdir(parents=True, exist_ok=True)
    host = {key: tensor.detach().to("cpu").contiguous().clone() for key, tensor in tensors.items()}
    own = {key: value for key, value in config.items() if key.startswith(OWN)}
    text = json.dumps({key: value for key, value in config.items() if key not in own}, indent=2, sort_keys=True)

    def write_tensors(path: Path) -> None:
        safetensors.torch.save_file(host, path, metadata={"format": "pt", **own})
        _sort_metadata(path)

    _write(folder / TENSORS, write_tensors)
    _write(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _sort_metadata(path: Path) -> None:
    """The writer puts them in a random order; the same adapter is to be the same file."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp's file is the owner's alone
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_adapter(directory: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """Configuration, with what :func:`save_adapter` put beside it, and tensors (on the host) of an adapter directory.

    Links are followed: Hugging Face's cache holds every file as one. Raises FileNotFoundError naming the missing file,
    ValueError naming a file that is damaged, says the same thing twice or holds a pickle, ImportError without
    safetensors.
    """
    safetensors = _safetensors()
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"load: {folder} is not a directory")
    if not (folder / TENSORS).is_file():
        _refuse_other_files(folder)
    config = _read_config(folder / CONFIG)
    try:
        tensors = safetensors.torch.load_file(folder / TENSORS)
        metadata = _read_metadata(folder / TENSORS)
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"load: {folder / TENSORS} is not a valid safetensors file ({error})") from None
    return config | {key: value for key, value in metadata.items() if key.startswith(OWN)}, tensors


def _refuse_other_files(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise ValueError(
            f"load: {folder} holds {pickles[0]}, a pickle file, which could run code and is not opened; "
            f"{TENSORS} is needed"
        )
    others = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    text = f"; there is {others[0]}, but an adapter is one file of that name" if others else ""
    raise FileNotFoundError(f"load: {folder} has no {TENSORS}{text}")


def _read_metadata(path: Path) -> dict[str, str]:
    """The reader checks sizes and offsets; of two entries with one name it would silently take one."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
    return header.get("__metadata__") or {}


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"load: {path.parent} has no {path.name}")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"load: {path} is not a configuration: it has {path.stat().st_size} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"load: {path} holds a {type(config).__name__}, but it must hold an object")
    return config


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapter files need the package safetensors: pip install peftops[hf]") from None
    return safetensors
