"""Who puts LoRA over a linear in lora.py's cases: peftops, Hugging Face PEFT as people run it, and Unsloth's order of
matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RANK, ALPHA = 16, 32
SCALE = ALPHA / RANK  # for every rank
OURS, PEFT, COMPILED = "peftops", "PEFT", "PEFT compiled"
OURS_FP32, PEFT_FP32 = f"{OURS}, fp32 factors", f"{PEFT}, fp32 factors"
PACKED, PACKED_BASE = f"{OURS}, packed", f"{OURS}, packed, without LoRA"
PEFT_AUTOCAST, UNSLOTH = f"{PEFT}, autocast", "Unsloth's order"


# ---- layers ----------------------------------------------------------------------------------------------------------


def peftops_layer(linear: nn.Linear, dropout: float, factor_dtype: torch.dtype | None, rank: int = RANK) -> nn.Module:
    from peftops.nn import LoRALinear

    return LoRALinear.from_linear(
        linear, rank=rank, alpha=int(SCALE * rank), dropout=dropout, adapter_dtype=factor_dtype
    )


def peft_layer(linear: nn.Linear, dropout: float, factor_dtype: torch.dtype | None, rank: int = RANK) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), lora_dropout=dropout)
    layer = Linear(linear, "default", config, r=rank, lora_alpha=int(SCALE * rank))
    for factor in factors(layer):
        factor.data = factor.data.to(factor_dtype or linear.weight.dtype)
    return layer


class UnslothLayer(nn.Module):
    """A linear with LoRA as Unsloth orders its matrix products (kernels/fast_lora.py of its 2026 releases, described,
    not copied): s x A^T B^T is accumulated into x W^T, nothing but x is kept, and backward makes x A^T again.
    """

    def __init__(self, linear: nn.Linear, dropout: float, rank: int):
        super().__init__()
        self.weight, self.dropout = linear.weight, dropout
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        y = _UnslothOrder.apply(x.reshape(-1, x.shape[-1]), self.weight, self.lora_a, self.lora_b, p)
        return y.view(*x.shape[:-1], y.shape[-1])


class _UnslothOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, p):
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        ctx.save_for_backward(x, weight, a, b, mask)
        ctx.p = p
        y = x @ weight.t()
        return y.addmm_(dropped @ a.t(), b.t(), alpha=SCALE)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, mask = ctx.saved_tensors
        keep = 1 / (1 - ctx.p)
        dropped = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, keep)
        down = dy @ b
        grad_a = (down.t() @ dropped).mul_(SCALE)
        grad_b = (dy.t() @ (dropped @ a.t())).mul_(SCALE)
        grad_x = dy @ weight
        if mask is None:
            grad_x.addmm_(down, a, alpha=SCALE)
        else:
            grad_x.add_(torch.ops.aten.native_dropout_backward(down @ a, mask, keep), alpha=SCALE)
        return grad_x, None, grad_a, grad_b, None


def unsloth_layer(linear: nn.Linear, dropout: float, factor_dtype: torch.dtype | None, rank: int = RANK) -> nn.Module:
    return UnslothLayer(linear, dropout, rank)


class PackedLayer(nn.Module):
    """LoRA of some rank, 0 too, on a packed weight."""

    def __init__(self, linear: nn.Linear, dropout: float, rank: int):
        super().__init__()
        self.out_features = linear.out_features
        self.register_buffer("packed", torch.ops.peftops.pack_weight(linear.weight.detach()))
        self.register_buffer("scale", torch.tensor(SCALE))
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.lora_a, self.lora_b)
        return torch.ops.peftops.lora_linear_packed(x, self.packed, None, *factors, self.scale, self.out_features)


# ---- kinds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A contender that puts LoRA over a linear. factor_dtype None = the base's."""

    name: str
    builder: Callable[[nn.Linear, float, torch.dtype | None, int], nn.Module]
    factor_dtype: torch.dtype | None = None
    compiled: bool = False
    autocast: bool = False  # to bfloat16, as transformers' Trainer runs a model with bf16=True

    def run(self, call: Callable, device: str) -> Callable:
        """`call` as this contender is run."""
        if self.autocast:
            return torch.autocast(device, torch.bfloat16)(call)
        if self.compiled:
            torch._dynamo.reset()
            return torch.compile(call, dynamic=False)
        return call


def kinds(dtype: torch.dtype, compiled: bool) -> list[Kind]:
    result = [Kind(OURS, peftops_layer), Kind(PEFT, peft_layer), Kind(UNSLOTH, unsloth_layer)]
    if dtype != torch.float32:
        result += [Kind(OURS_FP32, peftops_layer, torch.float32), Kind(PEFT_FP32, peft_layer, torch.float32)]
    if dtype == torch.bfloat16:
        result.append(Kind(PEFT_AUTOCAST, peft_layer, torch.float32, autocast=True))
    return result + ([Kind(COMPILED, peft_layer, compiled=True)] if compiled else [])


def packed_kinds() -> list[Kind]:
    """LoRA on a packed weight, and that weight alone."""
    return [
        Kind(PACKED, lambda linear, dropout, factor_dtype, rank: PackedLayer(linear, dropout, rank)),
        Kind(PACKED_BASE, lambda linear, dropout, factor_dtype, rank: PackedLayer(linear, dropout, 0)),
    ]


def factors(module: nn.Module) -> list[Tensor]:
    """Parameters A, B of every LoRA layer inside, in the order of the layers; PEFT and peftops name them alike but for
    case.
    """
    named = [(name.lower(), p) for name, p in module.named_parameters()]
    return [p for name, p in named if "lora_a" in name or "lora_b" in name]


def fill_factors(layer: nn.Module, in_features: int, seed: int) -> None:
    """The same values in every contender: bfloat16 numbers, with B not zero, so that LoRA's part is as large as the
    base's.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = factors(layer)
    with torch.no_grad():
        a.copy_((torch.randn(a.shape, generator=generator) / in_features**0.5).bfloat16())
        b.copy_((torch.randn(b.shape, generator=generator) / max(b.shape[1], 1) ** 0.5).bfloat16())


def shell(weight: nn.Parameter) -> nn.Linear:
    """An nn.Linear of its own around a shared, frozen weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def frozen(*shape: int, dtype: torch.dtype, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter((torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype), requires_grad=False)
