"""`peftops inspect`: the numbers are those of the tensors, and a base that does not fit is said to."""

import json

import peftops
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peftops.cli import main
from peftops.methods.files import load_adapter, save_adapter
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from .test_finetune import fails
from .test_merge import make_adapter


def inspect(capsys, *arguments) -> dict:
    capsys.readouterr()
    code = main(["inspect", *map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found.get("fit", {"fits": True})["fits"] else 1)
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_norms_are_those_of_peft(llama, tmp_path, capsys, rslora):
    model = AutoModelForCausalLM.from_pretrained(llama)
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"0.self_attn.v_proj": 5}}
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj", "v_proj", "embed_tokens"], use_rslora=rslora, **patterns
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    found = inspect(capsys, tmp_path / "adapter")
    modules = dict(model.base_model.model.named_modules())
    assert len(found["layers"]) == 5
    for name, layer in found["layers"].items():
        delta = modules[name].get_delta_weight("default")
        assert layer["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert layer["rank"] == (3 if name.endswith("q_proj") else 4)
        assert layer["scaling"] == pytest.approx(modules[name].scaling["default"])
    factors = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    # PEFT stores an embedding that it adapts.
    assert found["stored_whole"] == ["model.embed_tokens.base_layer.weight"]
    assert found["parameters"] == factors + 26 * 32
    assert found["bytes"] == 4 * found["parameters"] and found["dtypes"] == ["float32"]
    assert found["base_model"] == str(llama) and found["base_fingerprint"] is None
    assert found["settings"]["use_rslora"] if rslora else "use_rslora" not in found["settings"]
    assert found["settings"]["alpha_pattern"] == {"0.self_attn.v_proj": 5}


def test_the_text_names_what_matters(llama, tmp_path, capsys):
    make_adapter(llama, tmp_path / "adapter")
    found = inspect(capsys, tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter"), "--model", str(llama)]) == 0
    text = capsys.readouterr().out
    largest = max(found["layers"], key=lambda name: found["layers"][name]["norm"])
    for words in ("14 (", largest, f"{found['parameters']:,}", found["base_fingerprint"], str(llama)):
        assert words in text
    assert "yes, the base it was trained on" in text


def test_it_says_which_base_fits(llama, bert, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    model = make_adapter(llama, adapter)
    assert inspect(capsys, adapter, "--model", llama)["fit"] == {
        "model": str(llama), "fits": True, "same_base": True, "why": None
    }  # fmt: skip
    other = inspect(capsys, adapter, "--model", bert)["fit"]
    assert not other["fits"] and "target_modules" in other["why"]
    config = AutoConfig.from_pretrained(llama, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "shallow")
    shallow = inspect(capsys, adapter, "--model", tmp_path / "shallow")["fit"]
    assert not shallow["fits"] and "unexpected (14)" in shallow["why"]

    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    base = AutoModelForCausalLM.from_pretrained(llama)
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    base.save_pretrained(tmp_path / "changed")
    changed = inspect(capsys, adapter, "--model", tmp_path / "changed")["fit"]
    assert (changed["fits"], changed["same_base"]) == (False, False)

    config, tensors = load_adapter(adapter)
    del config["peftops_base_fingerprint"]
    save_adapter(adapter, config, tensors)
    assert inspect(capsys, adapter, "--model", tmp_path / "changed")["fit"]["same_base"] is None
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 2}}))
    shape = inspect(capsys, adapter, "--model", llama)["fit"]["why"]
    assert "wrong shape (4)" in shape and "need [2, 32]" in shape


def test_it_does_not_change_what_peft_reads(llama, tmp_path, capsys):
    make_adapter(llama, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    inspect(capsys, tmp_path / "adapter", "--model", llama)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")


def test_a_directory_without_an_adapter_is_one_line(llama, tmp_path, capsys):
    assert "has no adapter_model.safetensors" in fails(capsys, "inspect", llama)
    assert "nothing is not a directory" in fails(capsys, "inspect", tmp_path / "nothing")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    assert "a pickle file" in fails(capsys, "inspect", tmp_path)
    make_adapter(llama, tmp_path / "adapter")
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    assert "is not a valid safetensors file" in fails(capsys, "inspect", tmp_path / "adapter")


@pytest.mark.parametrize("broken", [{"lora_alpha": "x"}, {"alpha_pattern": {"(": 1}}, {"lora_alpha": None}])
def test_a_damaged_configuration_is_one_line(llama, tmp_path, capsys, broken):
    make_adapter(llama, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **broken}))
    assert "configuration and tensors do not go together" in fails(capsys, "inspect", tmp_path)


def test_another_method_is_shown_without_norms(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q"]}))
    save_file({"base_model.model.q.ia3_l": torch.ones(1, 4)}, tmp_path / "adapter_model.safetensors")
    found = inspect(capsys, tmp_path)
    assert (found["method"], found["parameters"], found["stored_whole"]) == ("IA3", 4, ["q.ia3_l"])
    assert main(["inspect", str(tmp_path)]) == 0 and "0 (no LoRA)" in capsys.readouterr().out


def test_a_grouped_convolution_and_a_bias_of_b(tmp_path, capsys):
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(6, 8, 3, groups=2), "up": torch.nn.Linear(5, 7)})
    tuning = peftops.attach(model, peftops.LoRA(rank=4, alpha=6, target_modules=["conv", "up"], lora_bias=True))
    for parameter in tuning.parameters():
        torch.nn.init.normal_(parameter)
    tuning.save(tmp_path / "adapter")
    found = inspect(capsys, tmp_path / "adapter")
    a, b, _ = model["conv"].factors("default")
    parts = [b[4 * g : 4 * g + 4].flatten(1) @ a[2 * g : 2 * g + 2].flatten(1) for g in range(2)]
    assert found["layers"]["conv"]["norm"] == pytest.approx(1.5 * torch.cat(parts).norm().item(), rel=1e-5)
    assert found["layers"]["up"]["norm"] == pytest.approx(model["up"].delta_weight("default").norm().item(), rel=1e-5)
    assert found["stored_whole"] == []
