"""Adapter files: round trips, atomic writing, and files that are damaged, hostile or do not fit."""

import json
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from peftops.methods import attach, load
from peftops.methods import files as adapter_files
from peftops.methods.files import load_adapter, save_adapter
from peftops.methods.peft_config import DEFAULTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .adapters import CONFIG, METHOD, TENSORS, assert_refused, edit, save_block
from .models import Block, randomise, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*trained on another base model")


@pytest.fixture
def saved(tmp_path):
    return save_block(tmp_path / "adapter")


# ---- round trips -----------------------------------------------------------------------------------------------------


def test_what_is_written(saved):
    with safe_open(saved / TENSORS, "pt") as file:
        assert file.metadata().keys() == {"format", "peftops_base_fingerprint"}
        assert file.metadata()["format"] == "pt"
        layers = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up")]
        keys = [f"base_model.model.{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")]
        assert set(file.keys()) == {*keys, "base_model.model.head.weight", "base_model.model.head.bias"}
    config = json.loads((saved / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 3, 5, 0.1)
    assert (config["target_modules"], config["modules_to_save"]) == (["q_proj", "up"], ["head"])
    assert config.keys() == DEFAULTS.keys()
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, TENSORS]


def test_the_same_adapter_is_the_same_file(saved, tmp_path):
    """Also with a name that JSON escapes; the metadata come from a hash table, whose order differs by chance."""
    config, tensors = load_adapter(saved)
    tensors['a "quoted" \u00e9 \x7f name'] = torch.ones(2)
    written = []
    for index in range(8):
        save_adapter(tmp_path / str(index), config, tensors)
        written.append((tmp_path / str(index) / TENSORS).read_bytes())
    assert len(set(written)) == 1
    again_config, again = load_adapter(tmp_path / "7")
    assert again_config == config and all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


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
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
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
    "a hole": lambda whole: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    "more values than a number can count": lambda whole: header(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "one name twice": lambda whole: header(
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b"\0" * 4,
    ),
    "not JSON": lambda whole: struct.pack("<Q", 4) + b"{{{{",
    "noise": lambda whole: bytes(range(256)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tensor_files_are_named(kind, saved):
    (saved / TENSORS).write_bytes(DAMAGED[kind]((saved / TENSORS).read_bytes()))
    assert_refused(saved, ValueError, f"{TENSORS} is not a valid safetensors file")


BAD_JSON = [b"", b"{", b"[1]", b"\xff\xfe{}", b"[" * 10**5, b"null", b'{"r": 8, "r": 4}', b" " * (2**24 + 1)]


@pytest.mark.parametrize("text", BAD_JSON, ids=range(len(BAD_JSON)))
def test_damaged_configurations_are_named(text, saved):
    (saved / CONFIG).write_bytes(text)
    assert_refused(saved, ValueError, f"{CONFIG} (is not valid JSON|holds a|is not a configuration)")


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_missing_files_are_named(missing, saved):
    (saved / missing).unlink()
    assert_refused(saved, FileNotFoundError, f"has no {missing}")
    assert_refused(saved / "nowhere", FileNotFoundError, "nowhere is not a directory")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model-00001-of-00002.safetensors", TENSORS + ".index.json"]
)
def test_a_file_of_another_name_is_named(name, saved):
    (saved / TENSORS).rename(saved / name)
    message = f"has no {TENSORS}; there is {name}, but an adapter is one file of that name"
    assert_refused(saved, FileNotFoundError, message)


def test_a_directory_in_the_place_of_a_file_is_not_read(saved):
    (saved / TENSORS).unlink()
    (saved / TENSORS).mkdir()
    assert_refused(saved, FileNotFoundError, f"has no {TENSORS}")


def test_links_are_read_as_in_a_cache_and_never_written_through(saved, tmp_path):
    """Hugging Face's cache is made of links; a link in the place where an adapter is saved is replaced itself."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in (CONFIG, TENSORS):
        (cache / name).symlink_to(saved / name)
    tuning = load(Block(), cache, trainable=True)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    randomise(tuning)
    tuning.save(cache)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert not any(path.is_symlink() for path in cache.iterdir())


def test_names_with_paths_in_a_tensor_file_are_only_names(saved, tmp_path):
    tensors = load_file(saved / TENSORS)
    tensors.update(
        {name: torch.zeros(1) for name in ("../../outside", "/etc/passwd", "base_model.model.../x.weight", "")}
    )
    save_file(tensors, saved / TENSORS)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert_refused(saved, ValueError, r"unexpected \(4\): .*/etc/passwd")
    assert sorted(path for path in tmp_path.rglob("*")) == before


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
