"""Packed rows compute what the same texts compute alone, or packing is refused."""

import json

import pytest
import torch
from peftops.cli import packing
from peftops.cli.batches import Collator
from peftops.cli.errors import InputError
from peftops.cli.losses import loss_function
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .test_finetune import fails, finetune

pytestmark = pytest.mark.usefixtures("no_plot")
SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)


def build(kind, config, **sizes):
    torch.manual_seed(0)
    model = kind(config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # so that attention matters
    return model


def models() -> dict:
    gpt2 = dict(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    return {
        "llama": lambda: build(LlamaForCausalLM, LlamaConfig, **SIZES),
        "gpt2": lambda: build(GPT2LMHeadModel, GPT2Config, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **gpt2),
        "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config, **SIZES),
        "mistral": lambda: build(MistralForCausalLM, MistralConfig, sliding_window=4, num_key_value_heads=1, **SIZES),
    }


def examples(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(2, 17, (), generator=generator))
        ids = torch.randint(50, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return rows


def test_rows_hold_every_text_once_and_waste_little():
    texts = examples(300)
    rows = packing.pack(texts, 20)
    assert all(len(row["input_ids"]) <= 20 for row in rows)
    found = []
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + [len(row["input_ids"])]
        for start, end in zip(starts, starts[1:], strict=False):
            assert row["position_ids"][start:end] == list(range(end - start))
            found.append({"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]})
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, texts))
    assert sum(len(text["input_ids"]) for text in texts) / (20 * len(rows)) > 0.97


@pytest.mark.parametrize("name", models())
def test_loss_and_gradients_are_those_of_the_texts_alone(name):
    model, collator, loss = models()[name](), Collator(pad_id=0), loss_function(causal=True)
    packing.check(model, name)
    texts = examples()
    rows = packing.pack(texts, 24)
    assert len(rows) < len(texts) / 2
    results = []
    for batch in (collator(texts), collator(rows)):
        model.zero_grad()
        labels = batch.pop("labels")
        value = loss(model(**batch, use_cache=False), labels)
        value.backward()
        results.append((value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (alone, gradients_alone), (packed, gradients_packed) = results
    torch.testing.assert_close(packed, alone)
    for key, gradient in gradients_alone.items():
        torch.testing.assert_close(gradients_packed[key], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_mix_the_texts_are_refused(dtype):
    bloom = build(BloomForCausalLM, BloomConfig, vocab_size=50, hidden_size=32, n_layer=2, n_head=2).to(dtype)
    with pytest.raises(InputError, match=r"--packing: m \(BloomForCausalLM\) cannot keep the texts of one row apart"):
        packing.check(bloom, "m")
    assert packing.check(models()["llama"]().to(dtype), "m") is None

    llama = models()["llama"]().to(dtype)
    forward = llama.forward
    llama.forward = lambda position_ids=None, **batch: forward(**batch)  # one that ignores positions
    with pytest.raises(InputError, match="cannot keep"):
        packing.check(llama, "m")


def test_positions_that_count_on_are_found():
    gpt2 = models()["gpt2"]()
    table = gpt2.transformer.wpe.forward
    gpt2.transformer.wpe.forward = lambda positions: table(torch.arange(positions.shape[-1])[None])
    with pytest.raises(InputError, match="cannot keep"):
        packing.check(gpt2, "m")


def test_a_model_without_positions_is_named():
    opt = build(OPTForCausalLM, OPTConfig, vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                ffn_dim=32, word_embed_proj_dim=32, dropout=0.0)  # fmt: skip
    forward = opt.forward
    opt.forward = lambda input_ids, use_cache=None: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(InputError, match="--packing: m takes no positions"):
        packing.check(opt, "m")


def test_a_packed_run(llama, unlabelled, labelled, tmp_path, capsys):
    options = ("--epochs", 2, "--lr", 1e-2, "--batch-size", 2, "--max-length", 24)
    outputs = tmp_path / "packed", tmp_path / "plain"
    assert finetune(llama, unlabelled, outputs[0], *options, "--packing") == 0
    assert finetune(llama, unlabelled, outputs[1], *options) == 0
    packed, plain = (json.loads((output / "metrics.json").read_text()) for output in outputs)
    assert packed["steps"] < plain["steps"] / 2
    assert packed["training_texts"] == plain["training_texts"]
    start = [json.loads((output / "steps.jsonl").read_text().splitlines()[0]) for output in outputs]
    assert start[0]["eval_loss"] == start[1]["eval_loss"] and packed["evaluation_loss"] < start[0]["eval_loss"]
    arguments = ("finetune", "--model", llama, "--data", labelled, "--output", tmp_path / "no", "--packing")
    assert "--packing: for causal-lm only" in fails(capsys, *arguments)
