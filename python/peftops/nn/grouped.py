"""Linear layers that hold several adapters and compute each row of a batch with its own, on the operator
:func:`peftops.ops.grouped_lora_linear`.

The factors of all adapters are stacked: `lora_a` [adapters, rank, in_features], `lora_b` [adapters, out_features,
rank], `lora_scales` [adapters] and `lora_ranks` [adapters], where an adapter without this layer has rank 0. Which row
uses which adapter stands in one :class:`Rows` object, which all layers of a model share: to change it recompiles
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import grouped_lora_linear
from .adapter import Adapter, Factors

NO_ADAPTER = -1
_ADDED = ("lora_a", "lora_b", "lora_scales", "lora_ranks", "rows")


class Rows:
    """The adapter of each row of a batch.

    ids: int64 [rows], a place in the stack or -1 for none; [1] counts for any number of rows; None: there is no adapter
    at all. repeats: how often each row may occur in succession, as beams and returned sequences do. length: tokens of a
    row in layers whose input is [rows * tokens, features].
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.repeats = 1
        self.length: int | None = None
        self._fixed: Tensor | None = None

    def assign(self, ids: Tensor, device: torch.device, repeats: int = 1, length: int | None = None) -> None:
        """Take over new ids. Without gradients they go into the same memory where their number is the same, for graphs
        that have recorded its address; with gradients into new memory, for backward may still need the old ones.
        """
        records = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():
            if records:
                self.ids = ids.to(device, torch.int64, copy=True)
            else:
                if self._fixed is None or self._fixed.shape != ids.shape or self._fixed.device != device:
                    self._fixed = torch.empty(ids.shape, dtype=torch.int64, device=device)
                self.ids = self._fixed.copy_(ids)
        self.repeats, self.length = repeats, length

    def of(self, x: Tensor) -> Tensor | None:
        """The ids of the tokens of x [..., features], of shape x.shape[:-1]; None where there is no adapter at all.

        Raises ValueError where x has other rows than the batch.
        """
        if self.ids is None:
            return None
        ids, shape = self.ids.to(x.device), x.shape[:-1]
        if ids.shape[0] == 1:
            return ids.view((1,) * len(shape)).expand(shape)
        repeats = self._repeats(ids.shape[0], shape)
        if repeats > 1:
            ids = ids.view(-1, 1).expand(-1, repeats).reshape(-1)
        return ids.view(-1, *(1 for _ in shape[1:])).expand(shape)

    def _repeats(self, rows: int, shape: torch.Size) -> int:
        # Not asked where it does not matter: torch.compile would guard on it.
        length = self.length if len(shape) == 1 and self.length is not None else 1
        for repeats in (1, self.repeats, length, self.repeats * length):
            if len(shape) > 0 and shape[0] == rows * repeats:
                return repeats
        raise ValueError(
            f"x is {list(shape)} tokens, but adapters were chosen for {rows} rows; the first dimension must be the "
            "batch (one adapter for all rows works with any)"
        )


class GroupedLike(nn.Module):
    """A linear layer with stacked adapters; a mixin that stands before the layer's own class.

    Input [..., in_features], output [..., out_features]. There is no dropout. The base weight stays what it was, in its
    requires_grad too; the stacked factors begin as not trained.
    """

    _base_class: type[nn.Module]

    def __init__(self, *_args, **_kwargs) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} adapts an existing layer: use {name}.adapt_(layer, rows, adapters, rank, dtype)")

    # The operator's view of the base weight, [out_features, in_features].
    def _weight(self) -> Tensor:
        return self.weight

    @classmethod
    def adapt_(cls, layer: nn.Module, rows: Rows, adapters: int, rank: int, dtype: torch.dtype) -> GroupedLike:
        """Turn `layer` into one with room for so many adapters of up to this rank, in place; all are empty."""
        if type(layer) is not cls._base_class:
            raise TypeError(f"{cls.__name__} cannot adapt a {type(layer).__name__}")
        layer.__class__ = cls
        layer.rows = rows
        layer._stack(*cls._empty(layer, adapters, rank, dtype))
        return layer

    def put_(self, place: int, adapter: Adapter, factors: Factors) -> None:
        """Fill one place of the stack, which grows to the adapter's rank and to its factors' precision."""
        wide = torch.promote_types(self.lora_a.dtype, adapter.adapter_dtype or self.weight.dtype)
        self.reserve_(self.lora_a.shape[0], adapter.rank, wide)
        with torch.no_grad():
            self.clear_(place)
            self.lora_a[place, : adapter.rank].copy_(factors.a)
            self.lora_b[place, :, : adapter.rank].copy_(factors.b)
            self.lora_scales[place] = adapter.scaling
            self.lora_ranks[place] = adapter.rank

    def clear_(self, place: int) -> None:
        """Empty one place of the stack, if it has it: rows that use it get the base layer's output."""
        with torch.no_grad():
            for stacked in (self.lora_a, self.lora_b, self.lora_scales, self.lora_ranks):
                stacked[place : place + 1] = 0

    def reserve_(self, adapters: int, rank: int, dtype: torch.dtype) -> None:
        """Let there be room for so many adapters of up to this rank in this dtype; nothing shrinks."""
        held, held_rank, _ = self.lora_a.shape
        if adapters <= held and rank <= held_rank and dtype == self.lora_a.dtype:
            return
        a, b, scales, ranks = self._empty(self, max(adapters, held), max(rank, held_rank), dtype)
        with torch.no_grad():
            a[:held, :held_rank].copy_(self.lora_a)
            b[:held, :, :held_rank].copy_(self.lora_b)
            scales[:held].copy_(self.lora_scales)
            ranks[:held].copy_(self.lora_ranks)
        self._stack(a, b, scales, ranks, self.lora_a.requires_grad)

    def remove_(self) -> nn.Module:
        """Take the adapters out and give the layer its own class back, in place."""
        self.take_off_()
        return self

    def take_off_(self) -> dict[str, object]:
        """:meth:`remove_`, and what :meth:`put_on_` needs to undo it."""
        taken = {name: getattr(self, name) for name in _ADDED}
        for name in _ADDED:
            delattr(self, name)
        self.__class__ = self._base_class
        return taken

    @classmethod
    def put_on_(cls, layer: nn.Module, taken: dict[str, object]) -> None:
        """Undo :meth:`take_off_`."""
        layer.__class__ = cls
        layer.rows = taken["rows"]
        layer._register(*(taken[name] for name in ("lora_a", "lora_b", "lora_scales", "lora_ranks")))

    @property
    def empty(self) -> bool:
        """Whether no adapter has this layer."""
        return not bool(self.lora_ranks.any())

    def forward(self, x: Tensor) -> Tensor:
        """Each row with its own adapter; without any selection the base layer."""
        ids = self.rows.of(x)
        if ids is None:
            return super().forward(x)
        held = self.lora_a, self.lora_b, self.lora_scales
        return grouped_lora_linear(x, self._weight(), self.bias, *held, ids, self.lora_ranks)

    @classmethod
    def _empty(cls, layer: nn.Module, adapters: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out_features, in_features = cls._weight(layer).shape
        device = layer.weight.device
        return (
            torch.zeros(adapters, rank, in_features, dtype=dtype, device=device),
            torch.zeros(adapters, out_features, rank, dtype=dtype, device=device),
            torch.zeros(adapters, dtype=torch.float32, device=device),
            torch.zeros(adapters, dtype=torch.int64, device=device),
        )

    def _stack(self, a: Tensor, b: Tensor, scales: Tensor, ranks: Tensor, trained: bool = False) -> None:
        self._register(nn.Parameter(a, trained), nn.Parameter(b, trained), scales, ranks)

    def _register(self, a: nn.Parameter, b: nn.Parameter, scales: Tensor, ranks: Tensor) -> None:
        self.lora_a, self.lora_b = a, b
        self.register_buffer("lora_scales", scales, persistent=False)
        self.register_buffer("lora_ranks", ranks, persistent=False)

    def _apply(self, fn, recurse=True):
        # Scales stay float32, and so do factors that are float32 over a 16-bit weight.
        kept = {"lora_scales": self.lora_scales}
        if self.lora_a.dtype != self.weight.dtype:
            kept.update(lora_a=self.lora_a.data, lora_b=self.lora_b.data)
        super()._apply(fn, recurse)
        narrow = self.weight.dtype in (torch.bfloat16, torch.float16)
        for name, before in kept.items():
            moved = getattr(self, name)
            if moved.dtype != before.dtype and (narrow or name == "lora_scales"):
                moved.data = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        held, rank, _ = self.lora_a.shape
        return f"{super().extra_repr()}; adapters={held}, rank={rank}"


class GroupedLoRALinear(GroupedLike, nn.Linear):
    """`nn.Linear` with stacked adapters, one for each row of a batch; see :class:`GroupedLike`."""

    _base_class = nn.Linear
