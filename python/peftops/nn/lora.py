r"""LoRA layers: y = f(x; W) + sum_i s_i * (B_i A_i) drop(x) (Hu et al., "LoRA", ICLR 2022, equation 3).

One module owns the frozen base weight and the factors of any number of adapters: `weight` and `bias` keep their names,
the factors of the adapter NAME are `lora_a.NAME` [rank, in_features] and `lora_b.NAME` [out_features, rank]. A layer
becomes a LoRA layer by a change of its class, so that its identity, hooks and parameter objects stay what they were.

Which adapters act, and how strongly, are tensors (`lora_scale.NAME`): to activate, scale or switch off recompiles
nothing under torch.compile. There every adapter that is present is computed, one that is not active with the scale 0;
outside of it only the active ones are.

Dtypes: the factors have the base weight's dtype, or float32 over a bfloat16 or float16 base
(`adapter_dtype=torch.float32`, what Hugging Face PEFT does by default). `module.to(bfloat16)`, `half()` and `float()`
convert the base weight as everywhere in torch; factors asked for in float32 and the scale stay float32, other factors
follow the base weight.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from . import inits
from .adapter import ADAPTER, BASE_DTYPES, Adapter, ByName, Factors, Scales, check_name, factor_dtype, name_of
from .dtensor import is_dtensor

# Everything that adapt_ gives to a layer: remove_ takes it away again.
_ADDED = ("adapters", "active", "disabled", "merged", "initial", "_kept", "_original")
_ADDED += ("lora_a", "lora_b", "lora_bias", "lora_scale", "sharing", "packed")
# Base class -> LoRA class; each LoRA class enters itself.
_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {}


class LoRALayer(nn.Module):
    """What LoRA adds to a layer; a mixin that stands before the layer's own class.

    Attributes: adapters, name -> hyperparameters; active, name -> weight by which its scale is multiplied; disabled,
    whether all are switched off; merged, whether `weight` holds the sum; initial, name -> the first factors of an
    adapter whose initialisation changed the base weight.
    """

    _base_class: type[nn.Module]

    def __init_subclass__(cls, **options) -> None:
        super().__init_subclass__(**options)
        if "_base_class" in vars(cls):
            _CLASSES[cls._base_class] = cls

    def __init__(self, *_args, **_kwargs) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} adapts an existing layer: use {name}.adapt_(layer, Adapter(rank=...))")

    # ---- what a kind of layer defines ----------------------------------------------------------------------------

    @classmethod
    def _factor_shapes(cls, layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A, whose first dimension is the rank, and of B, whose second one is."""
        raise NotImplementedError

    @classmethod
    def _why_not(cls, layer: nn.Module, adapter: Adapter) -> str | None:
        """The reason why this kind of layer cannot carry `adapter`; None where it can."""
        return None

    @classmethod
    def _start(cls, layer: nn.Module, adapter: Adapter) -> inits.Start:
        """The values that the factors start from, in float32 on the host."""
        raise NotImplementedError

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A in the shape of `weight`."""
        raise NotImplementedError

    def why_not_merge(self) -> str | None:
        """The reason why the adapters cannot be merged into the weight; None where they can."""
        return None

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The layer's output with these adapters, each with its scale from `lora_scale`."""
        raise NotImplementedError

    # ---- adapters ------------------------------------------------------------------------------------------------

    @classmethod
    def adapt_(
        cls,
        layer: nn.Module,
        adapter: Adapter,
        name: str = ADAPTER,
        factors: Factors | None = None,
        capacity: int | None = None,
    ) -> LoRALayer:
        """Turn `layer` into a LoRA layer in place: its class changes, its parameters are frozen, the active adapter
        `name` is added.

        factors: values to take over instead of drawing new ones; they are converted to the dtype and device of the
            layer's.
        capacity: ranks to hold memory for, so that :meth:`swap_` can later take over up to so many without a change of
            shapes; None = the rank.

        Raises TypeError for a layer that :func:`why_not` names a reason against, ValueError for an adapter that does
        not fit; the layer is then untouched.
        """
        reason = why_not(layer)
        if reason is not None:
            raise TypeError(f"this layer cannot carry LoRA: {reason}")
        if not issubclass(cls, type(layer)):
            raise TypeError(f"{cls.__name__} cannot adapt a {type(layer).__name__}")
        check_name(name)
        ready = cls._ready(layer, adapter, factors, capacity)
        layer.__class__ = cls
        layer.adapters, layer.active, layer.initial = {}, {}, {}
        layer.disabled, layer.merged, layer._kept, layer._original = False, False, None, None
        layer.lora_a, layer.lora_b, layer.lora_bias = ByName(), ByName(), ByName()
        layer.lora_scale, layer.sharing, layer.packed = Scales(), None, None
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
        layer._insert(name, adapter, *ready)
        layer.set_active({name: 1.0})
        return layer

    @classmethod
    def _around(cls, layer: nn.Module, adapter: Adapter, call: str) -> LoRALayer:
        """A new layer with `adapter` on the parameters of `layer`, the same objects, now frozen. `layer` keeps its
        class, and its hooks for itself. Raises as :meth:`adapt_`, naming the `call`.
        """
        if reason := why_not(layer):
            raise TypeError(f"{call}: this layer cannot carry LoRA: {reason}")
        twin = copy.copy(layer)  # shares all that it holds, the registries of torch.nn.Module among it
        for key, value in vars(layer).items():
            if isinstance(value, (dict, set)):
                setattr(twin, key, type(value)() if "_hooks" in key else value.copy())
        return cls.adapt_(twin, adapter)

    def add_(self, name: str, adapter: Adapter, factors: Factors | None = None, capacity: int | None = None) -> None:
        """One more adapter, not active; arguments as those of :meth:`adapt_`.

        Raises ValueError for a name that is taken and an adapter that does not fit; the layer is then untouched.
        """
        check_name(name)
        if name in self.adapters:
            raise ValueError(f"name is {name!r}, but this layer has an adapter of that name")
        values, start = self._ready(self, adapter, factors, capacity)
        if start is not None and start.residual is not None:
            raise ValueError(f"init is {adapter.init!r}, which changes the base weight under the other adapters")
        self._insert(name, adapter, values, start)

    def ready_to_swap(self, name: str, adapter: Adapter, factors: Factors) -> Factors:
        """Values for :meth:`take_`, in the layer's dtype and device and of the capacity of `name` or more. Raises
        ValueError for an adapter that does not fit.
        """
        ready, _ = self._ready(self, adapter, factors, max(adapter.rank, self.capacity(name)))
        no_bias = ready.bias is None and name in self.lora_bias
        return ready._replace(bias=torch.zeros_like(self.lora_bias[name])) if no_bias else ready

    def swap_(self, name: str, adapter: Adapter, factors: Factors) -> None:
        """Put another adapter into the place of `name`: into the same memory where rank and dtype fit, else into new
        memory of the same parameter objects. The rest of the place is filled with zeros; gradients are dropped.

        Raises ValueError for an adapter that does not fit; the layer is then untouched.
        """
        self.take_(name, adapter, self.ready_to_swap(name, adapter, factors))

    def take_(self, name: str, adapter: Adapter, ready: Factors) -> None:
        """The second half of :meth:`swap_`, for what :meth:`ready_to_swap` returned."""
        with torch.no_grad():
            for held, value in zip((self.lora_a, self.lora_b, self.lora_bias), ready, strict=True):
                if value is None:
                    continue
                if name not in held:
                    held[name] = nn.Parameter(value, requires_grad=self.lora_b[name].requires_grad)
                elif held[name].shape == value.shape and held[name].dtype == value.dtype:
                    held[name].copy_(value)
                elif is_dtensor(value):  # whose storage cannot be exchanged
                    held[name] = nn.Parameter(value, requires_grad=held[name].requires_grad)
                else:
                    held[name].data = value
                held[name].grad = None
        self.adapters[name] = adapter
        self._refresh_scales()

    def clear_(self, name: str) -> None:
        """Fill an adapter with zeros: it is there and adds nothing."""
        with torch.no_grad():
            for held in (self.lora_a, self.lora_b, self.lora_bias):
                if name in held:
                    held[name].zero_()
                    held[name].grad = None

    def delete_(self, name: str) -> None:
        """Take one adapter out; where its initialisation changed the base weight, that is restored."""
        if name in self.initial:
            self._restore_original()
            del self.initial[name]
        for key in self.factor_parameters(name):
            del getattr(self, key)[name]
        self.lora_scale.drop(name)
        del self.adapters[name]
        self.active.pop(name, None)

    def remove_(self) -> nn.Module:
        """Take all adapters out and give the layer its own class back, in place. A base weight that an initialisation
        changed is restored; a merged one stays as it is.
        """
        self._restore_original()
        for name in _ADDED:
            delattr(self, name)
        self.__class__ = self._base_class
        return self

    def set_active(self, weights: dict[str, float]) -> None:
        """Let these adapters act, name -> weight by which the scale is multiplied, and no others; 0 is not active."""
        self.active = {name: weight for name, weight in weights.items() if weight}
        self._refresh_scales()

    def set_disabled(self, disabled: bool) -> None:
        """Switch all adapters off or on. Off, the layer is the base layer, bit for bit."""
        if disabled != self.disabled and self._original is not None:
            # Storages are exchanged and nothing is written: a recorded graph can still run backward afterwards.
            base = self._original.to(self.weight.device, self.weight.dtype)
            self._original, self.weight.data = self.weight.data, base
        self.disabled = disabled
        self._refresh_scales()

    def capacity(self, name: str) -> int:
        """Ranks that the adapter's memory holds."""
        return self.lora_a[name].shape[0]

    def factors(self, name: str) -> Factors:
        """The adapter's own ranks, without what is only held ready."""
        adapter = self.adapters[name]
        bias = self.lora_bias[name] if adapter.lora_bias else None  # a swap may have left an empty one
        return Factors(self.lora_a[name][: adapter.rank], self.lora_b[name][:, : adapter.rank], bias)

    def factor_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Attribute -> parameter of one adapter: lora_a, lora_b and, where it has one, lora_bias."""
        held = {key: getattr(self, key) for key in ("lora_a", "lora_b", "lora_bias")}
        return {key: parameters[name] for key, parameters in held.items() if name in parameters}

    def reset_lora_parameters(self) -> None:
        """Draw the factors anew: for factors that come from the meta device by way of `to_empty`."""
        with torch.no_grad():
            for name, adapter in self.adapters.items():
                start = self._start(self, adapter)
                if start.residual is not None:
                    raise RuntimeError(f"reset_lora_parameters: init {adapter.init!r} would change the base weight")
                self.clear_(name)
                own = self.factors(name)
                own.a.copy_(start.a)
                own.b.copy_(start.b)

    @classmethod
    def _ready(
        cls, layer: nn.Module, adapter: Adapter, factors: Factors | None, capacity: int | None = None
    ) -> tuple[Factors, inits.Start | None]:
        """Values in the layer's dtype and device, padded to `capacity`, and where they were drawn from."""
        reason = cls._why_not(layer, adapter)
        if reason is not None:
            raise ValueError(f"this layer cannot carry the adapter: {reason}")
        weight = layer.weight
        dtype = factor_dtype(weight.dtype, adapter.adapter_dtype)
        capacity = adapter.rank if capacity is None else capacity
        if capacity < adapter.rank:
            raise ValueError(f"capacity is {capacity}, but it must be at least the rank, {adapter.rank}")
        shapes = cls._factor_shapes(layer, capacity)
        start = None
        if factors is None:
            start = cls._start(layer, adapter)
            factors = Factors(start.a, start.b)
        a, b = (torch.zeros(shape, dtype=dtype, device=weight.device) for shape in shapes)
        a[: adapter.rank].copy_(factors.a)
        b[:, : adapter.rank].copy_(factors.b)
        bias = None
        if adapter.lora_bias:
            bias = torch.zeros(shapes[1][0], dtype=dtype, device=weight.device)
            if factors.bias is not None:
                bias.copy_(factors.bias)
        return Factors(a, b, bias), start

    def _insert(self, name: str, adapter: Adapter, values: Factors, start: inits.Start | None) -> None:
        if start is not None and start.residual is not None:
            self._original = self.weight.detach().to("cpu", copy=True)
            self.initial[name] = Factors(start.a, start.b)
            with torch.no_grad():
                self.weight.copy_(start.residual)
        self.adapters[name] = adapter
        for held, value in zip((self.lora_a, self.lora_b, self.lora_bias), values, strict=True):
            if value is not None:
                held[name] = nn.Parameter(value)
        self._refresh_scales()

    def _restore_original(self) -> None:
        # Switched off, it is in its place already; what was merged is to stay.
        if self._original is not None and not self.disabled and not self.merged:
            with torch.no_grad():
                self.weight.copy_(self._original)
        self._original = None

    def _refresh_scales(self) -> None:
        for name, adapter in self.adapters.items():
            value = 0.0 if self.disabled else adapter.scaling * self.active.get(name, 0.0)
            self.lora_scale.put(name, value, self.weight.device)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and is_dtensor(param) and not is_dtensor(self._parameters.get("weight")):
            raise RuntimeError(
                "a layer with an adapter cannot be parallelized: its factors would keep their shape; call "
                "parallelize_module first, then peftops.attach or peftops.load"
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # load_state_dict(assign=True) brings a layer off the meta device, but no scale: they are not in a state_dict.
        self._refresh_scales()

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's input and output. Dropout acts in training mode only; its seed comes from torch's generator,
        so that checkpointing replays it.
        """
        names = () if self.merged else self._computed()
        return self._adapted(x, names) if names else super().forward(x)

    def _computed(self) -> tuple[str, ...]:
        # What acts is not asked under torch.compile, which would guard on it and compile anew.
        if torch.compiler.is_compiling():
            return tuple(self.adapters)
        return () if self.disabled else tuple(self.active)

    def _scale(self, name: str) -> Tensor:
        return getattr(self.lora_scale, name)

    def _acting(self, name: str, value: Tensor) -> Tensor:
        """`value`, or zeros where the adapter is computed without being active: its NaN must not come through."""
        return torch.where(self._scale(name) != 0, value, 0) if torch.compiler.is_compiling() else value

    def _bias_with(self, names: Iterable[str]) -> Tensor | None:
        """The base bias and the scaled biases of B, in the base weight's dtype."""
        bias = self.bias
        for name in names:
            if self.adapters[name].lora_bias:
                scaled = self._scale(name) * self._acting(name, self.lora_bias[name])
                bias = (scaled if bias is None else bias + scaled).to(self.weight.dtype)
        return bias

    # ---- merging -------------------------------------------------------------------------------------------------

    def delta_weight(self, name: str) -> Tensor:
        """s B A in the shape of `weight`, times the weight it is active with, in float32 (float64 over a float64
        base).
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            a, b, _ = self.factors(name)
            dtype = self._sum_dtype()
            return self._merge_scale(name) * self._product(a.detach().to(dtype), b.detach().to(dtype))

    @torch.no_grad()
    def merge(
        self, keep_base: bool = True, measure: Callable[[Tensor, Tensor, Tensor], object] | None = None
    ) -> object | None:
        """weight <- weight + sum of s B A over the active adapters, summed in float32 (float64 over a float64 base) and
        rounded once; likewise the bias. A merged layer stays as it is.

        keep_base: keep the bits of the base in host memory, so that :meth:`unmerge` restores them exactly. A later
        `merge(keep_base=False)` frees them.
        measure: called with the weight before, the exact delta and the weight afterwards; its result is returned.

        Raises RuntimeError where :meth:`why_not_merge` names a reason.
        """
        if reason := self.why_not_merge():
            raise RuntimeError(f"merge: {reason}")
        if self.merged:
            if not keep_base:
                self._kept = self._original = None
            return None
        names = list(self.active)
        kept = {"weight": self.weight.detach().to("cpu", copy=True), "bias": self._host_bias()} if keep_base else None
        before = delta = None
        if names:
            delta = self.delta_weight(names[0])
            for name in names[1:]:
                delta += self.delta_weight(name)
            bias = self._bias_delta(names)
            before = self.weight.detach().clone() if measure is not None else None
            self.weight.copy_(delta + self.weight)
            self._add_to_bias(bias)
        self._kept, self.merged = kept, True
        if not keep_base:
            self._original = None
        return measure(before, delta, self.weight.detach()) if names and measure is not None else None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the bits of the base back; a layer that is not merged stays as it is.

        Raises RuntimeError after `merge(keep_base=False)`.
        """
        if not self.merged:
            return
        if self._kept is None:
            raise RuntimeError("unmerge: the base weights were freed by merge(keep_base=False)")
        self.weight.copy_(self._kept["weight"])
        if self._kept["bias"] is not None:
            self.bias.copy_(self._kept["bias"])
        elif getattr(self, "bias", None) is not None:
            self.bias = None
        self.merged, self._kept = False, None

    def _host_bias(self) -> Tensor | None:
        bias = getattr(self, "bias", None)
        return None if bias is None else bias.detach().to("cpu", copy=True)

    def _bias_delta(self, names: Sequence[str]) -> Tensor | None:
        biases = [(self._merge_scale(name), self.lora_bias[name]) for name in names if name in self.lora_bias]
        return sum(scale * bias.detach().to(self._sum_dtype()) for scale, bias in biases) if biases else None

    def _add_to_bias(self, delta: Tensor | None) -> None:
        if delta is None:
            return
        if self.bias is None:
            self.bias = nn.Parameter(delta.to(self.weight.dtype), requires_grad=False)
        else:
            self.bias.copy_(delta + self.bias)

    def _merge_scale(self, name: str) -> float:
        # The operator's scale is a float32 tensor, so the merged weight takes the same number.
        scale = self.adapters[name].scaling * self.active.get(name, 1.0)
        return torch.tensor(scale, dtype=torch.float32, device="cpu").item()

    def _sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    # ---- conversions ---------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse=True):
        wide = set()
        for name, adapter in self.adapters.items():
            if adapter.adapter_dtype == torch.float32:
                for parameter in self.factor_parameters(name).values():
                    wide.update((id(parameter), id(parameter.grad)))

        def factor(tensor):
            moved = fn(tensor)
            if id(tensor) not in wide or moved.dtype not in (torch.bfloat16, torch.float16):
                return moved
            return tensor.to(moved.device, torch.float32)

        super()._apply(fn, recurse=False)
        if recurse:
            for held in (self.lora_a, self.lora_b, self.lora_bias):
                held._apply(factor)
            self.lora_scale._apply(fn)
        return self

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for name, adapter in self.adapters.items():
            dropout = f", dropout={adapter.dropout:g}" if adapter.dropout else ""
            parts.append(f"{name}: rank={adapter.rank}, alpha={adapter.alpha:g}{dropout}")
        return "; ".join(parts)


def lora_class(layer: nn.Module) -> type[LoRALayer] | None:
    """The LoRA class for a layer's exact class, or for the one that it had before; None where there is none."""
    # A Conv1D can only exist where transformers is loaded already.
    if "transformers.pytorch_utils" in sys.modules:
        from . import conv1d  # noqa: F401  (enters itself)
    if isinstance(layer, LoRALayer):
        return type(layer)
    found = _CLASSES.get(type(layer))
    if type(layer) is nn.Linear and is_dtensor(layer._parameters.get("weight")):
        from .tensor_parallel import ShardedLoRALinear

        return ShardedLoRALinear
    return found


def why_not(layer: nn.Module) -> str | None:
    """The reason why `layer` cannot carry LoRA; None where it can."""
    kind = type(layer).__name__
    if isinstance(layer, LoRALayer):
        return "it carries an adapter already"
    if lora_class(layer) is None:
        base = next((known for known in _CLASSES if isinstance(layer, known)), None)
        if base is not None:
            return f"{kind} is a subclass of {base.__name__}, whose weight may be read or stored in another way"
        return f"{kind} is neither a linear layer, an embedding nor a convolution that LoRA knows"
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters (weight_norm, spectral_norm or pruning)"
    if is_dtensor(layer.weight):
        from . import tensor_parallel

        return tensor_parallel.why_not(layer)
    if type(layer.weight) is not nn.Parameter:
        return f"its weight is a {type(layer.weight).__name__}, not a plain parameter"
    if layer.weight.dtype not in BASE_DTYPES:
        return f"its weight is {name_of(layer.weight.dtype)}"
    if taken := [name for name in _ADDED if hasattr(layer, name)]:
        return f"it has an attribute {taken[0]!r} of its own, which an adapter needs"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by accelerate's offloading hooks, for example)"
    return None
