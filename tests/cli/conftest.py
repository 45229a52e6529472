"""Tiny random models with a word tokenizer, and data files that such a model can learn in a few steps."""

import gc
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANIMALS = ["cat", "dog", "cow", "hen", "fox"]
METALS = ["tin", "iron", "gold", "lead", "zinc"]
FILLER = ["a", "the", "old", "new", "big", "small", "near", "far"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tokenizer(classifies: bool, *more: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words; `more`: words for what would be unknown otherwise."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + FILLER + ANIMALS + METALS + list(more))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if classifies:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        )
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    # As GPT-2 and Llama: no padding token of its own.
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]")


@pytest.fixture(scope="session", autouse=True)
def quick_collection():
    """Every run collects garbage; what the libraries hold is left out of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def each_run_has_its_precision(own_precision):
    pass


@pytest.fixture
def no_plot():
    """Half of a tiny run's time goes into its plot, which test_report and test_finetune look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peftops.cli.report.plot", lambda path, *_: path.write_bytes(b""))
        yield


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    BertForMaskedLM(BertConfig(vocab_size=26, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    tokenizer(True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    LlamaForCausalLM(LlamaConfig(vocab_size=26, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    tokenizer(False).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[dict]:
    """Rows with a text and a label; no text occurs twice."""
    generator = random.Random(seed)
    rows = {}
    while len(rows) < count:
        label, words = generator.choice([("animal", ANIMALS), ("metal", METALS)])
        text = " ".join([*generator.choices(FILLER, k=generator.randint(1, 8)), generator.choice(words)])
        rows[text] = label
    return [{"text": text, "label": label} for text, label in rows.items()]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def labelled(tmp_path) -> Path:
    return write_jsonl(tmp_path / "labelled.jsonl", sentences(60))


@pytest.fixture
def unlabelled(tmp_path) -> Path:
    return write_jsonl(tmp_path / "unlabelled.jsonl", [{"text": row["text"]} for row in sentences(60)])
