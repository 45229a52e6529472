"""Small models with Hugging Face PEFT's adapters, as PEFT makes them and after `accelerate`."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import peft
import torch
from peftops.integrations import hf_peft, hf_peft_linear
from peftops.ops import lora_dropout_mask
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

_VOCABULARY = 60
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
}


def base(kind: str) -> nn.Module:
    """A model of two layers, hidden size 32, without dropout of its own; always the same weights."""
    torch.manual_seed(1)
    if kind == "llama":
        sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
        return LlamaForCausalLM(LlamaConfig(vocab_size=_VOCABULARY, num_hidden_layers=2, **sizes))
    if kind == "gpt2":
        silent = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, **silent))
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    silent = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(vocab_size=_VOCABULARY, num_labels=3, **sizes, **silent))


def config(kind: str = "llama", **changes) -> peft.LoraConfig:
    """Rank 4, scale 2, on every linear layer of the model's blocks."""
    given = dict(r=4, lora_alpha=8, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2")
    return peft.LoraConfig(**(given | changes))


def with_adapter(kind: str, dtype: torch.dtype = torch.float32, **changes) -> peft.PeftModel:
    """PEFT's own model, its factors filled."""
    model = peft.get_peft_model(base(kind).to(dtype), config(kind, **changes))
    fill(model)
    return model


def pair(kind: str, dtype: torch.dtype = torch.float32, **changes) -> tuple[peft.PeftModel, peft.PeftModel]:
    """(PEFT's model as it is, the same after `accelerate`), with equal parameters that they do not share."""
    oracle = with_adapter(kind, dtype, **changes)
    fused = copy.deepcopy(oracle)
    assert hf_peft.accelerate(fused) == hf_peft.coverage(fused).fused > 0
    return oracle, fused


def fill(model: nn.Module, adapter: str = "default", seed: int = 2) -> None:
    """Random factors for an adapter, B not zero, of a size at which the adapter counts as much as the base."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.data.copy_(0.5 * drawn)


def batch(kind: str, rows: int = 3) -> dict[str, Tensor]:
    """Token ids with labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(_VOCABULARY, (rows, 7), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(rows) % 3 if kind == "bert" else ids}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of every trained parameter by its name, and the logits."""
    model.zero_grad()
    result = model(**inputs)
    result.loss.backward()
    return {"logits": result.logits} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def logits(model, kind="llama", **more):
    """What the model says about the batch, without gradients."""
    with torch.no_grad():
        return model(**batch(kind), **more).logits


def both(models, act):
    """What `act` returns for PEFT's model and for the fused one."""
    return act(models[0]), act(models[1])


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Each tensor within `tolerance` of the wanted one's norm."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


class MaskedDropout(nn.Module):
    """Dropout with the operator's own mask, for PEFT's layers: draws its seed as the fused layer does."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64)
        mask = lora_dropout_mask(seed, x.numel() // x.shape[-1], x.shape[-1], self.p).view(x.shape)
        return torch.where(mask, x, 0) / (1 - self.p)


def with_the_operators_mask(model: nn.Module) -> nn.Module:
    """The PEFT model with every dropout of an adapter replaced by the one above, in place."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[name] = MaskedDropout(dropout.p).train(dropout.training)
    return model


@contextmanager
def fused_calls():
    """Counts the calls of the operator."""
    calls, real = [], hf_peft_linear.lora_linear

    def counted(*args):
        calls.append(args)
        return real(*args)

    hf_peft_linear.lora_linear = counted
    try:
        yield calls
    finally:
        hf_peft_linear.lora_linear = real


def layer_pair(in_features=24, out_features=20, bias=True, dtype=torch.float32, **changes):
    """(PEFT's layer, the fused one) around one linear."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    given = dict(r=4, lora_alpha=8, target_modules=["0"])
    model = peft.inject_adapter_in_model(peft.LoraConfig(**(given | changes)), model)
    fill(model)
    fused = copy.deepcopy(model)
    assert hf_peft.accelerate(fused) == 1
    return model[0], fused[0]


def run(layer, x, seed=7):
    """Output and all gradients."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = layer(1 * x)  # an in-place dropout may write into what it gets
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], upstream)
    return {"y": y.detach(), **dict(zip(["x", *trained], grads, strict=True))}
