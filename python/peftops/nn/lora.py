r"""LoRA layers: y = x W^T + bias + scale * drop(x) A^T B^T (Hu et al., "LoRA", ICLR 2022, equation 3).

One module owns the frozen base weight and the factors: `weight` and `bias` keep their names, the factors of the
adapter NAME are `lora_a.NAME` [rank, in_features] and `lora_b.NAME` [out_features, rank]. A layer becomes a LoRA layer
by a change of its class, so that its identity, hooks and parameter objects stay what they were.

Dtypes: the factors have the base weight's dtype, or float32 over a bfloat16 or float16 base
(`adapter_dtype=torch.float32`, what Hugging Face PEFT does by default). `module.to(bfloat16)`, `half()` and `float()`
convert the base weight as everywhere in torch; factors asked for in float32 and the scale stay float32, other factors
follow the base weight.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from ..ops import lora_linear

ADAPTER = "default"
INITS = ("kaiming", "gaussian")
# Everything that adapt_ gives to a layer: remove_ takes it away again.
_ADDED = ("rank", "alpha", "scaling", "use_rslora", "lora_dropout", "lora_init", "adapter_dtype")
_ADDED += ("merged", "disabled", "_base_weight", "lora_a", "lora_b", "lora_scale")
BASE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def factor_dtype(base: torch.dtype, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """Dtype of the factors over a base weight of dtype `base`; ValueError where the operator has no such pair."""
    if adapter_dtype is None or adapter_dtype == base:
        return base
    if adapter_dtype == torch.float32 and base in (torch.bfloat16, torch.float16):
        return adapter_dtype
    raise ValueError(
        f"adapter_dtype is {name_of(adapter_dtype)}, but over a {name_of(base)} weight it must be {name_of(base)}"
        + (" or float32" if base in (torch.bfloat16, torch.float16) else "")
    )


def check_hyperparameters(rank: int, alpha: float, dropout: float, init: str) -> None:
    """Raise ValueError, naming the argument, for a hyperparameter outside its range."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}, but it must be an integer of at least 1")
    if not _is_number(alpha) or alpha <= 0:
        raise ValueError(f"alpha is {alpha!r}, but it must be a positive number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}, but it must be in [0, 1)")
    if init not in INITS:
        raise ValueError(f"init is {init!r}, but it must be one of {', '.join(map(repr, INITS))}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class LoRALayer(nn.Module):
    """What LoRA adds to a linear layer; a mixin that stands before the layer's own class.

    Attributes: rank; alpha; scaling, the number s that multiplies the adapter; lora_dropout, its p; merged, whether
    `weight` holds the sum; disabled, whether the adapter is switched off.
    """

    _base_class: type[nn.Module]

    # The operator's view of the base weight, [out_features, in_features].
    def _weight(self) -> Tensor:
        return self.weight

    @classmethod
    def adapt_(
        cls,
        layer: nn.Module,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        init: str = "kaiming",
        use_rslora: bool = False,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> LoRALayer:
        """Turn `layer` into a LoRA layer in place: its class changes, its parameters are frozen, factors are added.

        factors: A [rank, in_features] and B [out_features, rank] to take over instead of drawing new ones; they are
            converted to the dtype and device of the layer's. The other arguments are those of
            :meth:`LoRALinear.from_linear`.

        Raises TypeError for a layer that :func:`why_not` names a reason against, ValueError for a hyperparameter out of
        range; the layer is then untouched.
        """
        alpha = rank if alpha is None else alpha
        reason = why_not(layer)
        if reason is not None:
            raise TypeError(f"this layer cannot carry LoRA: {reason}")
        if not issubclass(cls, type(layer)):
            raise TypeError(f"{cls.__name__} cannot adapt a {type(layer).__name__}")
        check_hyperparameters(rank, alpha, dropout, init)
        weight = layer.weight
        dtype = factor_dtype(weight.dtype, adapter_dtype)
        out_features, in_features = cls._weight(layer).shape
        if factors is None:
            lora_a = torch.empty(rank, in_features, dtype=dtype, device=weight.device)
            lora_b = torch.zeros(out_features, rank, dtype=dtype, device=weight.device)
            _init_down(lora_a, rank, init)
        else:
            lora_a, lora_b = (factor.detach().to(weight.device, dtype, copy=True) for factor in factors)
        scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        scale = torch.full((), scaling, dtype=torch.float32, device=weight.device)

        # Nothing below can fail.
        layer.__class__ = cls
        layer.rank, layer.alpha, layer.scaling, layer.use_rslora = rank, alpha, scaling, use_rslora
        layer.lora_dropout, layer.lora_init, layer.adapter_dtype = float(dropout), init, adapter_dtype
        layer.merged, layer.disabled, layer._base_weight = False, False, None
        layer.lora_a = nn.ParameterDict({ADAPTER: nn.Parameter(lora_a)})
        layer.lora_b = nn.ParameterDict({ADAPTER: nn.Parameter(lora_b)})
        layer.register_buffer("lora_scale", scale, persistent=False)
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
        return layer

    def remove_(self) -> nn.Module:
        """Take the factors out and give the layer its own class back, in place; weight and bias stay as they are."""
        for name in _ADDED:
            delattr(self, name)
        self.__class__ = self._base_class
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features].

        Dropout acts in training mode only; its seed comes from torch's generator, so that checkpointing replays it.
        """
        if self.merged:
            return super().forward(x)
        p, seed = 0.0, None
        # Switched off, the layer must not advance the generator, from which the base model's own dropout draws.
        if self.training and self.lora_dropout > 0 and not self.disabled:
            p, seed = self.lora_dropout, torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=x.device)
        lora_a, lora_b = self.lora_a[ADAPTER], self.lora_b[ADAPTER]
        return lora_linear(x, self._weight(), self.bias, lora_a, lora_b, self.lora_scale, p, seed)

    def delta_weight(self) -> Tensor:
        """s B A, [out_features, in_features], in float32 (float64 over a float64 base)."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(self.weight.device.type, enabled=False):
            # The operator's scale is a float32 tensor, so the merged weight takes the same number.
            scale = torch.tensor(self.scaling, dtype=torch.float32).item()
            return scale * (self.lora_b[ADAPTER].detach().to(dtype) @ self.lora_a[ADAPTER].detach().to(dtype))

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """weight <- weight + s B A, summed in float32 (float64 over a float64 base) and rounded once.

        A merged layer stays as it is.

        keep_base: keep the base weight's bits in host memory, so that :meth:`unmerge` restores them exactly. A later
        `merge(keep_base=False)` frees them.
        """
        if not self.merged:
            delta = self.delta_weight()
            if keep_base:
                self._base_weight = self.weight.detach().to("cpu", copy=True)
            weight = self._weight()
            weight.copy_(delta.add_(weight))
            self.merged = True
        elif not keep_base:
            self._base_weight = None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight's bits back; a layer that is not merged stays as it is.

        Raises RuntimeError after `merge(keep_base=False)`.
        """
        if not self.merged:
            return
        if self._base_weight is None:
            raise RuntimeError("unmerge: the base weights were freed by merge(keep_base=False)")
        self.weight.copy_(self._base_weight)
        self.merged, self._base_weight = False, None

    def set_disabled(self, disabled: bool) -> None:
        """Switch the adapter off or on. Off, the operator takes the base layer's own path, bit for bit.

        The scale gets a new tensor and is not written in place: a graph that was recorded before may still need the
        old value.
        """
        self.disabled = disabled
        self.lora_scale = self._fresh_scale(self.lora_scale.device)

    def reset_lora_parameters(self) -> None:
        """Draw A anew and set B to 0: for factors that come from the meta device by way of `to_empty`."""
        with torch.no_grad():
            _init_down(self.lora_a[ADAPTER], self.rank, self.lora_init)
            self.lora_b[ADAPTER].zero_()

    def _fresh_scale(self, device: torch.device) -> Tensor:
        return torch.full((), 0.0 if self.disabled else self.scaling, dtype=torch.float32, device=device)

    def _apply(self, fn, recurse=True):
        def base(tensor):
            moved = fn(tensor)
            # The scale is refilled and not converted: bfloat16 would round it, to_empty would leave it uninitialised.
            return self._fresh_scale(moved.device) if tensor is scale and moved is not tensor else moved

        def factor(tensor):
            moved = fn(tensor)
            if self.adapter_dtype != torch.float32 or moved.dtype not in (torch.bfloat16, torch.float16):
                return moved
            return tensor.to(moved.device, torch.float32)

        scale = self.lora_scale
        super()._apply(base, recurse=False)
        if recurse:
            self.lora_a._apply(factor)
            self.lora_b._apply(factor)
        return self

    def extra_repr(self) -> str:
        dropout = f", dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}{dropout}"


class LoRALinear(LoRALayer, nn.Linear):
    """`nn.Linear` with a LoRA adapter on the operator :func:`peftops.ops.lora_linear`; made by :meth:`from_linear`.

    weight [out_features, in_features] and bias [out_features] are frozen; lora_a [rank, in_features] and lora_b
    [out_features, rank] are trained. Input [..., in_features], output [..., out_features].
    """

    _base_class = nn.Linear

    def __init__(self, *_args, **_kwargs) -> None:
        raise TypeError("LoRALinear adapts an existing layer: use LoRALinear.from_linear(linear, rank=...)")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        init: str = "kaiming",
        use_rslora: bool = False,
    ) -> LoRALinear:
        """A new layer on the parameters of `linear` (the same objects, now frozen); `linear` itself keeps its class.

        rank: rank r of the adapter; above min(in_features, out_features) is legal.
        alpha: s = alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, 2023); None = rank.
        dropout: p of the dropout on the adapter's input, in training mode only.
        adapter_dtype: None = the base weight's, or `torch.float32`.
        init: "kaiming" draws A as `nn.Linear` does, U(-1/sqrt(in_features), 1/sqrt(in_features)); "gaussian" draws
            N(0, 1/rank^2). B starts at 0.

        Raises TypeError for a layer that cannot carry LoRA, ValueError for a hyperparameter out of range.
        """
        reason = why_not(linear)
        if reason is not None:
            raise TypeError(f"from_linear: this layer cannot carry LoRA: {reason}")
        layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        return cls.adapt_(
            layer,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            adapter_dtype=adapter_dtype,
            init=init,
            use_rslora=use_rslora,
        )


def lora_class(layer: nn.Module) -> type[LoRALayer] | None:
    """The LoRA class for a layer's exact class; None where there is none."""
    if type(layer) is nn.Linear:
        return LoRALinear
    # A Conv1D can only exist where transformers is loaded already.
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and type(layer) is transformers.Conv1D:
        from .conv1d import LoRAConv1D

        return LoRAConv1D
    return None


def why_not(layer: nn.Module) -> str | None:
    """The reason why `layer` cannot carry LoRA; None where it can."""
    kind = type(layer).__name__
    if isinstance(layer, LoRALayer):
        return "it carries an adapter already"
    if lora_class(layer) is None:
        if isinstance(layer, nn.Linear):
            return f"{kind} is a subclass of nn.Linear, whose weight may be read or stored in another way"
        return f"{kind} is neither nn.Linear nor transformers' Conv1D"
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters (weight_norm, spectral_norm or pruning)"
    if type(layer.weight) is not nn.Parameter:
        return f"its weight is a {type(layer.weight).__name__}, not a plain parameter"
    if layer.weight.dtype not in BASE_DTYPES:
        return f"its weight is {name_of(layer.weight.dtype)}"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by accelerate's offloading hooks, for example)"
    return None


def _init_down(lora_a: Tensor, rank: int, init: str) -> None:
    """Draw A on the host in float32, so that a seed gives the same factors on every device and in every dtype."""
    if lora_a.is_meta:
        return
    drawn = torch.empty(lora_a.shape, dtype=torch.float32, device="cpu")
    if init == "gaussian":
        nn.init.normal_(drawn, std=1 / rank)
    elif drawn.numel():
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    lora_a.copy_(drawn)
