"""Adapter files: round trips, atomic writing, and files that are damaged, hostile or do not fit."""

import json
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from peftops.methods import LoRA, attach, load
from peftops.methods import files as adapter_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .models import Block, randomise, tokens

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
METHOD = LoRA(rank=3, alpha=5, dropout=0.1, target_modules=["q_proj", "up"], modules_to_save=["head"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def saved(tmp_path):
    tuning = attach(Block(), METHOD)
    randomise(tuning)
    tuning.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


# ---- round trips -----------------------------------------------------------------------------------------------------


def test_what_is_written(saved):
    with safe_open(saved / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        layers = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up")]
        keys = [f"base_model.model.{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")]
        assert set(file.keys()) == {*keys, "base_model.model.head.weight", "base_model.model.head.bias"}
    config = json.loads((saved / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 3, 5, 0.1)
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj", "up"], ["head"])
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, TENSORS]


def test_all_linear_is_written_as_full_names(tmp_path):
    attach(Block(), LoRA()).save(tmp_path)
    names = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert names == [*(f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up", "down")), "head"]


def test_training_resumes_to_the_bit(tmp_path):
    def steps(model, optimizer, count):
        for _ in range(count):
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    base, ids = Block(), tokens()
    values = {name: value.clone() for name, value in base.state_dict().items()}
    tuning = attach(base, METHOD)
    optimizer = tuning.optimizer(1e-2)
    steps(base, optimizer, 3)
    tuning.save(tmp_path)
    state, generator = {"optimizer": pickle.dumps(optimizer.state_dict())}, torch.get_rng_state()
    steps(base, optimizer, 3)

    fresh = Block()
    fresh.load_state_dict(values)
    resumed = load(fresh, tmp_path, trainable=True)
    optimizer = resumed.optimizer(1e-2)
    optimizer.load_state_dict(pickle.loads(state["optimizer"]))
    torch.set_rng_state(generator)
    steps(fresh, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(tuning.parameters(), resumed.parameters(), strict=True))
    assert resumed.method == METHOD


def test_load_draws_nothing_from_the_generator(saved):
    model, state = Block(), torch.get_rng_state()
    load(model, saved)
    assert torch.equal(torch.get_rng_state(), state)


def test_save_of_a_merged_adapter_and_over_an_older_one(saved):
    model = Block()
    tuning = load(model, saved, trainable=True)
    before = load_file(saved / TENSORS)
    tuning.merge()
    tuning.save(saved)
    assert all(torch.equal(tensor, before[key]) for key, tensor in load_file(saved / TENSORS).items())


def test_a_sufficient_config_is_enough(saved):
    keep = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({key: config[key] for key in keep}))
    assert load(Block(), saved).method.dropout == 0


def test_interrupted_writing_leaves_the_old_files_and_nothing_else(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    tuning = load(Block(), saved, trainable=True)
    randomise(tuning)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_save_into_a_file_is_refused(saved):
    with pytest.raises(NotADirectoryError, match="is a file, but it must be a directory"):
        attach(Block(), METHOD).save(saved / CONFIG)


def test_without_safetensors_the_error_names_the_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: load(Block(), saved), lambda: attach(Block(), METHOD).save(saved)):
        with pytest.raises(ImportError, match=r"pip install peftops\[hf\]"):
            call()


# ---- refusals --------------------------------------------------------------------------------------------------------

ACTIVE_KEYS = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "use_bdlora": {"blocks": 2},
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [1, 2],
    "layers_to_transform": [0],
    "layer_replication": [[0, 1]],
    "exclude_modules": ["down"],
    "init_lora_weights": "pissa_niter_16",
    "loftq_config": {"loftq_bits": 4},
    "alora_invocation_tokens": [5],
    "megatron_config": {"a": 1},
    "a_key_of_the_future": "on",
}


@pytest.mark.parametrize("key", ACTIVE_KEYS)
def test_an_active_key_that_is_not_supported_is_named(key, saved):
    edit(saved, **{key: ACTIVE_KEYS[key]})
    assert_refused(saved, ValueError, rf"{saved.name}: {key} is .* not supported")


def test_keys_that_are_off_or_ours_are_accepted(saved):
    edit(saved, a_key_of_the_future=False, another=None, peftops_note="x", qalora_group_size=32, peft_version="0.7.0")
    load(Block(), saved)


BAD_CONFIGS = [
    ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA', but only 'LORA' is supported"),
    ({"peft_type": None}, "peft_type is None"),
    ({"r": "8"}, "rank is '8'"),
    ({"r": float("nan")}, "rank is nan"),
    ({"r": 10**12}, "wrong shape"),
    ({"lora_alpha": float("inf")}, "alpha is inf"),
    ({"lora_dropout": 2}, "dropout is 2"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": "(("}, "no regular expression"),
    ({"target_modules": 5}, "target_modules is 5"),
    ({"target_modules": ["../../etc"]}, "chooses no layer"),
    ({"target_modules": ["__class__"]}, "chooses no layer"),
    ({"target_modules": ["embed"]}, "embed: Embedding is neither"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
    ({"rank_pattern": {"(": 1}}, "rank_pattern is .* no regular expression"),
    ({"rank_pattern": {"up": -1}}, "rank is -1"),
    ({"alpha_pattern": {"up": "x"}}, "alpha is 'x'"),
    ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
]


@pytest.mark.parametrize("changes, match", BAD_CONFIGS)
def test_bad_configurations_are_named(changes, match, saved):
    edit(saved, **changes)
    assert_refused(saved, (ValueError, TypeError), match)


def assert_refused(folder, error, match):
    """Loading fails, and the model is untouched."""
    model = Block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        load(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(saved):
    tensors = load_file(saved / TENSORS)
    first = "base_model.model.layers.0.up.lora_A.weight"
    del tensors["base_model.model.layers.1.up.lora_B.weight"], tensors["base_model.model.head.bias"]
    tensors["base_model.model.layers.0.down.lora_A.weight"] = torch.zeros(3, 24)
    tensors["base_model.model.__class__.weight"] = torch.zeros(1)
    tensors[first] = torch.zeros(16, 3)
    tensors["base_model.model.layers.0.q_proj.lora_A.weight"] = torch.zeros(3, 16, dtype=torch.int32)
    save_file(tensors, saved / TENSORS)
    with pytest.raises(ValueError) as caught:
        load(Block(), saved)
    text = str(caught.value)
    for part in (
        "missing (2): base_model.model.layers.1.up.lora_B.weight, base_model.model.head.bias",
        "unexpected (2):",
        "layers.0.down.lora_A.weight",
        "base_model.model.__class__.weight",
        f"wrong shape (1): {first} is [16, 3], but the model and the configuration need [3, 16]",
        "wrong dtype (1): base_model.model.layers.0.q_proj.lora_A.weight is int32",
    ):
        assert part in text
    assert_refused(saved, ValueError, "do not fit the model")


def test_a_model_of_other_sizes_is_refused(saved):
    model = Block()
    model.head = torch.nn.Linear(16, 7)
    with pytest.raises(
        ValueError, match=r"head.weight is \[5, 16\], but the model and the configuration need \[7, 16\]"
    ):
        load(model, saved)
    assert torch.isfinite(model(tokens())).all()


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", TENSORS])
def test_a_pickle_never_runs(saved, name, tmp_path):
    mark = tmp_path / "ran"
    (saved / TENSORS).unlink()
    (saved / name).write_bytes(pickle.dumps(Payload(mark)))
    assert_refused(saved, ValueError, "not a valid safetensors file" if name == TENSORS else f"{name}, a pickle file")
    assert not mark.exists()


def header(entries, payload=b"", length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


DAMAGED = {
    "empty": lambda whole: b"",
    "truncated header": lambda whole: whole[:50],
    "truncated data": lambda whole: whole[:-1],
    "extra data": lambda whole: whole + b"x",
    "giant header": lambda whole: header({}, length=2**62),
    "overlapping": lambda whole: header(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}, b"\0" * 4
    ),
    "offsets beyond the end": lambda whole: header(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 4
    ),
    "not JSON": lambda whole: struct.pack("<Q", 4) + b"{{{{",
    "noise": lambda whole: bytes(range(256)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tensor_files_are_named(kind, saved):
    (saved / TENSORS).write_bytes(DAMAGED[kind]((saved / TENSORS).read_bytes()))
    assert_refused(saved, ValueError, f"{TENSORS} is not a valid safetensors file")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 10**5, b"null"])
def test_damaged_configurations_are_named(text, saved):
    (saved / CONFIG).write_bytes(text)
    assert_refused(saved, ValueError, f"{CONFIG} (is not valid JSON|holds a)")


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_missing_files_are_named(missing, saved):
    (saved / missing).unlink()
    assert_refused(saved, FileNotFoundError, f"has no {missing}")
    assert_refused(saved / "nowhere", FileNotFoundError, "nowhere is not a directory")


def test_names_in_a_file_reach_no_other_path(saved, tmp_path):
    """Nothing outside the directory is read or written, whatever the configuration says."""
    edit(
        saved, base_model_name_or_path="../../../../etc/passwd", revision="../x", auto_mapping={"parent_library": "os"}
    )
    tuning = load(Block(), saved)
    before = sorted(path for path in tmp_path.rglob("*"))
    tuning.save(saved)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert json.loads((saved / CONFIG).read_text())["base_model_name_or_path"] is None


def test_loading_into_a_meta_model_is_refused(saved):
    with torch.device("meta"):
        model = Block()
    with pytest.raises(RuntimeError, match="load: the model has parameters on the meta device"):
        load(model, saved)


def test_import_needs_nothing_but_torch():
    program = "import sys, peftops.methods; print(*{'safetensors', 'transformers', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_file_names_are_those_of_peft():
    assert (adapter_files.CONFIG, adapter_files.TENSORS, adapter_files.PREFIX) == (CONFIG, TENSORS, "base_model.model.")
