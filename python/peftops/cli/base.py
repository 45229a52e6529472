"""An adapter directory as files, and the base model that it belongs to."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from peftops.methods.files import FINGERPRINT, load_adapter

from .errors import InputError
from .model import first_line, hub_unreachable, load_part, resolve

# PEFT's task types and the transformers class for each.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
OTHER_BASE = "trained on another base model"


@dataclass(frozen=True)
class Files:
    """What an adapter directory holds."""

    path: Path
    config: dict
    tensors: dict[str, torch.Tensor]


def read_adapter(path: Path) -> Files:
    """Raises InputError for a directory that holds no adapter, or a damaged one."""
    try:
        return Files(path, *load_adapter(path))
    except (OSError, ValueError, ImportError) as error:
        raise InputError(first_line(error).removeprefix("load: ")) from None


def load_base(name: str, adapter: Files, dtype: torch.dtype | None) -> torch.nn.Module:
    """The base model `name` with the head that the adapter was trained on, in evaluation mode on the CPU, in the
    checkpoint's precision or `dtype`.

    Raises:
        InputError: no such model, a quantized one, or one that lacks weights which the adapter does not bring.
    """
    import transformers

    name = resolve(name)
    local = Path(name).is_dir() or hub_unreachable()
    own = (adapter.path / "config.json").is_file()  # written by `peftops finetune` where there is a new head
    config = load_part(
        "configuration",
        name,
        lambda: transformers.AutoConfig.from_pretrained(adapter.path if own else name, local_files_only=own or local),
    )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"--model {name}: is quantized, give the model that it was made from")
    classifies = adapter.config.get("task_type") == "SEQ_CLS"
    if classifies and not own:
        heads = [t for key, t in adapter.tensors.items() if key.endswith(_HEADS)]
        config.num_labels = heads[-1].shape[0] if heads else config.num_labels
    model, info = load_part(
        "model",
        name,
        lambda: _class_of(adapter.config, config).from_pretrained(
            name,
            config=config,
            dtype=dtype or config.dtype or torch.float32,
            local_files_only=local,
            output_loading_info=True,
            ignore_mismatched_sizes=classifies,
        ),
    )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    brought = {key.removeprefix("base_model.model.") for key in adapter.tensors}
    lacking = sorted(fresh - brought)
    if lacking:
        raise InputError(f"--model {name}: has no weight {lacking[0]!r}, and {adapter.path} does not bring it")
    return model.eval()


def _class_of(adapter_config: dict, config):
    import transformers

    mapping = adapter_config.get("auto_mapping") or {}
    architectures = config.architectures or ["AutoModel"]
    name = _TASKS.get(adapter_config.get("task_type")) or mapping.get("base_model_class") or architectures[0]
    kind = getattr(transformers, name, None)
    # The name may come from a file: of all that transformers has, only a model's class is taken.
    if name not in (*_TASKS.values(), "AutoModel") and not (
        isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    ):
        raise ValueError(f"transformers has no model class {name!r}")
    return kind


def attach_files(model: torch.nn.Module, adapter: Files):
    """The tuning, and whether the base is the recorded one: True, False, or None where none is recorded.

    Raises:
        InputError: the adapter does not fit the model; what is missing, unexpected or of another shape is listed.
    """
    import peftops

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuning = peftops.load(model, adapter.path)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(str(error).removeprefix("load: ")) from None
    other = [warning for warning in caught if OTHER_BASE in str(warning.message)]
    if other:
        return tuning, False
    return tuning, True if adapter.config.get(FINGERPRINT) else None
