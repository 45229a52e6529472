"""`peftops merge`: the merged directory is an ordinary model that computes what base and adapter did."""

import json

import peftops
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peftops.cli import main
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .test_finetune import fails, finetune


def merge(model, adapter, output, *options):
    return main(["merge", "--model", str(model), "--adapter", str(adapter), "--output", str(output), *options])


def make_adapter(folder, out, seed=1, dtype=torch.float32):
    """An adapter with an effect, without training."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(seed)
    tuning = peftops.attach(model, peftops.LoRA(rank=4, alpha=8))
    for name, parameter in tuning.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuning.save(out)
    return model.eval()


TOKENS = torch.arange(4, 16).view(2, 6)


def test_the_merged_model_loads_alone_and_gives_the_same_output(llama, tmp_path, capsys):
    adapted = make_adapter(llama, tmp_path / "adapter")
    assert merge(llama, tmp_path / "adapter", tmp_path / "new" / "merged") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "largest error" in printed.out and "output: largest change" in printed.out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        want, got = adapted(TOKENS).logits, merged(TOKENS).logits
        assert (base(TOKENS).logits - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want)
    names = {path.name for path in (tmp_path / "new" / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "merged"]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (llama, tmp_path / "new" / "merged")]
    assert tokenizers[0]("the old cat") == tokenizers[1]("the old cat")


def test_a_base_without_a_tokenizer_is_merged_with_a_note(llama, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    capsys.readouterr()
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == 0
    assert "note: no tokenizer is written" in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_another_precision(llama, tmp_path):
    make_adapter(llama, tmp_path / "adapter", dtype=torch.bfloat16)
    assert merge(llama, tmp_path / "adapter", tmp_path / "merged", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["ours", "peft"])
def test_a_classification_head_is_merged_too(bert, labelled, tmp_path, method):
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    if method == "ours":
        assert finetune(bert, labelled, tmp_path / "run", "--epochs", 1, "--lr", 1e-2) == 0
        adapted = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    else:  # PEFT records neither the number of labels nor their names
        adapted = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
        saved = ["classifier", "pooler"]
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=saved)
        get_peft_model(adapted, config).save_pretrained(adapter)
        adapted = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    peftops.load(adapted.eval(), adapter)
    assert merge(bert, adapter, merged) == 0
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    tokens = AutoTokenizer.from_pretrained(merged)("the old cat", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, adapted(**tokens).logits)
    if method == "ours":
        assert model.config.id2label == {0: "animal", 1: "metal"}


def test_another_base_is_refused_and_nothing_is_written(llama, bert, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_adapter(llama, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "other")

    def run(base, adapter=tmp_path / "adapter", output=tmp_path / "deep" / "merged", *options):
        return fails(capsys, "merge", "--model", base, "--adapter", adapter, "--output", output, *options)

    assert "is not the base that" in run(tmp_path / "other")
    assert "adapter: target_modules" in run(bert)
    assert "is not the base that" in run(llama, tmp_path / "adapter", tmp_path / "deep" / "m", "--dtype", "bfloat16")
    assert "nothing is not a directory" in run(llama, tmp_path / "nothing")
    assert "has no adapter_model.safetensors" in run(llama, llama)
    assert "exists and is not an empty directory" in run(llama, tmp_path / "adapter", llama)
    assert "no such directory" in run(tmp_path / "nothing")
    assert "--device cuda: no GPU is visible" in run(llama, tmp_path / "adapter", tmp_path / "m", "--device", "cuda")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    assert "is quantized" in run(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]


def test_tied_weights_are_refused(llama, tmp_path, capsys):
    config = json.loads((llama / "config.json").read_text())
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama, tie_word_embeddings=True).save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] and not config["tie_word_embeddings"]
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    peftops.attach(model, peftops.LoRA(target_modules=["lm_head"])).save(tmp_path / "adapter")
    arguments = ("--model", base, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert "lm_head.weight is tied to" in fails(capsys, "merge", *arguments)
    assert not (tmp_path / "merged").exists()


def test_a_failed_write_leaves_nothing(llama, tmp_path, capsys, monkeypatch):
    make_adapter(llama, tmp_path / "adapter")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftops.cli.merge._save_tokenizer", fail)
    arguments = ("--model", llama, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert "cannot be written (No space left on device)" in fails(capsys, "merge", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
