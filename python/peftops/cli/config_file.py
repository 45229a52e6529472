"""Options from a YAML file (`--config`), under the command line's own names."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from .errors import InputError

# Names that other tools (transformers, TRL, peft, LlamaFactory, Axolotl) have for an option of ours.
ELSEWHERE = {
    "model": "model_name_or_path model_name model_id base_model pretrained_model_name_or_path",
    "data": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data",
    "output": "output_dir save_dir",
    "text_column": "dataset_text_field text_field field",
    "completion_only": "completion_only_loss assistant_only_loss train_on_inputs train_on_prompt mask_history",
    "eval_data": "eval_dataset eval_file validation_file test_datasets",
    "eval_fraction": "val_size val_set_size validation_split test_size",
    "max_length": "cutoff_len sequence_len max_seq_length max_seq_len max_len model_max_length block_size",
    "packing": "sample_packing neat_packing pack_sequences packed",
    "method": "finetuning_type adapter peft_type peft_method tuner",
    "rank": "r lora_r lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target lora_target_modules lora_target_linear",
    "layers_to_transform": "peft_layers_to_transform lora_layers",
    "modules_to_save": "additional_target lora_modules_to_save",
    "use_rslora": "rslora peft_use_rslora",
    "init": "init_lora_weights peft_init_lora_weights pissa_init lora_init",
    "bias": "lora_bias",
    "adapter_dtype": "autocast_adapter_dtype peft_autocast_adapter_dtype lora_dtype",
    "epochs": "num_train_epochs num_epochs n_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size per_gpu_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum_steps accumulate_grad_batches",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type scheduler",
    "warmup_ratio": "warmup_steps num_warmup_steps",
    "max_grad_norm": "gradient_clipping gradient_clip_val",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "early_stopping": "early_stopping_patience",
    "seed": "data_seed random_seed",
    "overwrite": "overwrite_output_dir",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints",
}
OURS = {other: ours for ours, others in ELSEWHERE.items() for other in others.split()}


def apply(parser: argparse.ArgumentParser, path: Path) -> None:
    """Make the values of a YAML file the defaults of `parser`, so that the command line wins over them.

    A key is an option's name without the dashes in front, with hyphens or underscores; null means the option's default.

    Raises:
        InputError: unreadable file, unknown or repeated key, value of the wrong type; file, line and key are named.
    """
    options = {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "config")
    }
    values: dict[str, object] = {}
    for key, value, line in _entries(path):
        where = f"{path} line {line}"
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name not in options:
            raise InputError(f"{where}: {_unknown(name, list(options))}")
        if name in values:
            raise InputError(f"{where}: {key} is there twice")
        values[name] = options[name].default if value is None else _value(options[name], value, f"{where}: {key}")
        if value is not None:
            options[name].required = False
    parser.set_defaults(**values)


def _entries(path: Path) -> list[tuple[object, object, int]]:
    """(key, value, line) of a YAML mapping, repeated keys included."""
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path} line {node.start_mark.line + 1}: wanted lines 'option: value'")
        return [
            (
                loader.construct_object(key, deep=True),
                loader.construct_object(value, deep=True),
                key.start_mark.line + 1,
            )
            for key, value in node.value
        ]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise InputError(
            f"{where}: not valid YAML ({getattr(error, 'problem', None) or type(error).__name__})"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None


def _unknown(name: object, options: list[str]) -> str:
    if name in OURS:
        return f"{name!r} is another tool's name for our {OURS[name]!r}"
    close = difflib.get_close_matches(str(name), options, 1)
    return f"unknown key {name!r}" + (f", do you mean {close[0]!r}?" if close else " (see peftops finetune --help)")


def _value(option: argparse.Action, value: object, where: str) -> object:
    """`value` as the command line would have given it."""
    if isinstance(option, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise InputError(f"{where}: got {value!r}, wanted true or false")
        return value
    if option.nargs == "+":
        if value == []:
            raise InputError(f"{where}: got an empty list")
        return [_scalar(option, item, where) for item in (value if isinstance(value, list) else [value])]
    return _scalar(option, value, where)


def _scalar(option: argparse.Action, value: object, where: str) -> object:
    if option.type in (None, Path):
        if not isinstance(value, str):
            raise InputError(f"{where}: got {value!r}, wanted a string")
        if option.choices and value not in option.choices:
            raise InputError(f"{where}: got {value!r}, wanted one of {', '.join(option.choices)}")
        return value if option.type is None else option.type(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"{where}: got {value!r}, wanted a number")
    try:
        # Through text, as YAML takes 2e-4 for a string.
        return option.type(str(value))
    except argparse.ArgumentTypeError as error:
        raise InputError(f"{where}: {error}") from None
