"""One operator call for the projections of a model that read the same input (q, k and v; gate and up), without a change
of the model's code.

Layers that are known to read one tensor form a :class:`Group`. The first of them that is called computes the outputs of
all with :func:`peftops.ops.lora_linear_multi`; each other one takes its own when it is called with that very tensor.
Nothing is taken on trust: an output is handed over only if all that it depends on is at that moment what it was when it
was computed, the state of torch's generator included; else the layer computes it itself. Outputs that nobody asked for
are dropped, and the group dissolves.

Outputs have the bits that the layers compute by themselves where the operator promises it (on the CPU). The gradient of
the shared input is summed within the operator, so that its last bits differ, and the layers have one node in autograd's
graph: backward runs through it once, unless the graph is retained.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import lora_linear_multi

# Children of one module that read the same tensor, in the order in which models call them.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# Parts of the names of modules whose queries come from one tensor, keys and values from another.
_CROSS = ("cross", "encdec", "encoder_attn", "attn2")
_PLAIN = (nn.Parameter, Tensor)
# Without gradients, up to so many rows, each layer is called: to keep the books takes longer than one call saves.
FEW_ROWS = 64


class Operands(NamedTuple):
    """What a layer hands to :func:`peftops.ops.lora_linear` beside x and a seed."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor
    dropout_p: float


class Place(NamedTuple):
    """Where a layer stands in its group."""

    group: Group
    index: int


class Member(nn.Module):
    """What a layer needs to be in a group; a mixin. `sharing` is its place there, or None."""

    sharing: Place | None = None

    def operands(self, x: Tensor) -> Operands | None:
        """What a call with x hands to the operator; None where it is anything but one call of it."""
        raise NotImplementedError

    def shared_output(self, x: Tensor) -> Tensor | None:
        """The layer's output by way of its group; None where the layer has to compute it itself."""
        if self.sharing is None or torch.compiler.is_compiling():
            return None
        return self.sharing.group.output(self.sharing.index, self, x)

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.sharing is not None:  # a copy, whose group is a copy as well
            self.sharing.group.join(self.sharing.index, self)


# ---- groups ----------------------------------------------------------------------------------------------------------


def share_inputs(model: nn.Module, kind: type[Member]) -> int:
    """Put the layers of this very class that are known to read the same input into groups; how many groups there are.

    They are children of one module with the names of a family (:data:`FAMILIES`) and as many input features. Where a
    name says that the queries come from another tensor, keys and values are a group without them.
    """
    unshare_inputs(model)
    count = 0
    for name, parent in model.named_modules():
        crossed = any(part in name.lower() for part in _CROSS)
        for family in FAMILIES:
            names = family[1:] if crossed and len(family) == 3 else family
            layers = [layer for key in names if type(layer := parent._modules.get(key)) is kind]
            if len(set(layers)) > 1 and len({layer.in_features for layer in layers}) == 1:
                _group(layers)
                count += 1
    return count


def unshare_inputs(model: nn.Module) -> None:
    """Dissolve the groups in a model."""
    for module in model.modules():
        if isinstance(module, Member) and module.sharing is not None:
            module.sharing.group.dissolved = True
            module.sharing = None


def _group(layers: list[Member]) -> None:
    group = Group(len(layers))
    for index, layer in enumerate(layers):
        layer.sharing = Place(group, index)
        group.join(index, layer)


class Group:
    """Layers that read the same input. It holds them weakly; a copy of it waits for the copies of the layers."""

    def __init__(self, count: int):
        self.dissolved = False
        self._members: list[weakref.ref | None] = [None] * count
        self._calls: deque[int] = deque(maxlen=count)
        self._first: int | None = None  # who alone may compute, known after a wrong order
        self._scales: tuple[list[tuple[Tensor, int]], Tensor] | None = None

    def __getstate__(self):
        return len(self._members), self.dissolved

    def __setstate__(self, state):
        self.__init__(state[0])
        self.dissolved = state[1]

    def join(self, index: int, layer: Member) -> None:
        """Take a layer in, unless its place is taken."""
        if self._member(index) is None:
            self._members[index] = weakref.ref(layer)

    def _member(self, index: int) -> Member | None:
        reference = self._members[index]
        return None if reference is None else reference()

    def output(self, index: int, layer: Member, x: Tensor) -> Tensor | None:
        """The output of `layer` for x; None where it has to compute it itself."""
        if self.dissolved or self._member(index) is not layer or not _ordinary(x):
            return None
        order = self._order(index)
        self._calls.append(index)
        held = _thread.held
        if held is not None and held.group is self and index != held.first:
            return self._take(held, index, layer, x) if index in held.values else None
        _thread.held = None
        if held is not None:
            held.group.dissolved = True  # what it computed was in vain
        return None if self.dissolved or self._first not in (None, index) else self._compute(order, x)

    def _order(self, first: int) -> list[int]:
        """The order of the calls that begin with this one: as the last time, or else as the family lists them."""
        count, last = len(self._members), list(self._calls)
        if last[:1] == [first] and len(set(last)) == count:
            return last
        return [(first + i) % count for i in range(count)]

    def _take(self, held: Held, index: int, layer: Member, x: Tensor) -> Tensor | None:
        _thread.held, waiting = None, held.values.pop(index)
        operands = layer.operands(x)
        same = held.x is x and held.surroundings == _surroundings(x.device) and _same(held.facts, _facts(x))
        same = same and operands is not None and _same(waiting.facts, _facts(*operands[:5]))
        same = same and operands.dropout_p == held.dropout_p
        if same and (waiting.before is None or torch.equal(_generator(x.device).get_state(), waiting.before)):
            if waiting.after is not None:
                _generator(x.device).set_state(waiting.after)
            _thread.held = held if held.values else None
            return waiting.y
        # With the random numbers alone in another order it is worth a second try, in the order that is seen now.
        self.dissolved = not same or self._first is not None
        self._first = held.first
        return None

    def _compute(self, order: list[int], x: Tensor) -> Tensor | None:
        found = {i: _operands(self._member(i), self, x) for i in order}
        own = found[order[0]]
        if own is None:
            return None
        order = [i for i in order if found[i] is not None and _alike(x, own, found[i])]
        if len(order) < 2:
            return None
        operands = [found[i] for i in order]
        seeds, states = None, [None] * (len(order) + 1)
        if own.dropout_p > 0:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            seeds, states = _draw(x.device, len(order))
        *lists, scales, _ = map(list, zip(*operands, strict=True))
        ys = lora_linear_multi(x, *lists, self._stacked(scales), own.dropout_p, seeds)
        waiting = {
            i: Waiting(y, _facts(*part[:5]), *around)
            for i, y, part, *around in zip(order, ys, operands, states[:-1], states[1:], strict=True)
        }
        y = waiting.pop(order[0]).y
        _thread.held = Held(self, order[0], x, _facts(x), _surroundings(x.device), own.dropout_p, waiting)
        return y

    def _stacked(self, scales: list[Tensor]) -> Tensor:
        """The layers' scales as one tensor, made anew only where one of them is another one."""
        facts = _facts(*scales)
        if self._scales is None or not _same(self._scales[0], facts):
            self._scales = facts, torch.stack(scales)
        return self._scales[1]


# ---- outputs that wait -----------------------------------------------------------------------------------------------


class Waiting(NamedTuple):
    """An output, the facts about its layer's operands, the generator's state before and after its seed was drawn."""

    y: Tensor
    facts: list
    before: Tensor | None
    after: Tensor | None


@dataclass
class Held:
    """Outputs for x that layers of a group have not asked for yet, by their index; first: the layer that was called."""

    group: Group
    first: int
    x: Tensor
    facts: list
    surroundings: tuple
    dropout_p: float
    values: dict[int, Waiting]


class _Thread(threading.local):
    """At most one group's outputs wait in a thread; those of the next call take their place."""

    held: Held | None = None


_thread = _Thread()


def _facts(*tensors: Tensor | None) -> list[tuple | None]:
    """What must not change between a computation and its use: which tensors, their contents, what is recorded."""
    return [None if t is None else (t, t._version, t.data_ptr(), t.requires_grad) for t in tensors]


def _same(a: list, b: list) -> bool:
    pairs = zip(a, b, strict=True)
    return all(p is q if p is None or q is None else p[0] is q[0] and p[1:] == q[1:] for p, q in pairs)


def _surroundings(device: torch.device) -> tuple:
    kind = device.type
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None
    return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), stream


def _generator(device: torch.device) -> torch.Generator:
    return torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]


def _draw(device: torch.device, count: int) -> tuple[Tensor, list[Tensor]]:
    """A seed for each layer in the order of their calls, and the generator's states around them. Afterwards it stands
    where it would stand after the first layer's own call.
    """
    generator, seeds = _generator(device), []
    states = [generator.get_state()]
    for _ in range(count):
        seeds.append(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device))
        states.append(generator.get_state())
    generator.set_state(states[1])
    return torch.cat(seeds), states


# ---- what can be shared ----------------------------------------------------------------------------------------------


def _ordinary(x: Tensor) -> bool:
    """Whether nothing but this call itself decides what is computed and recorded, and it is worth while.

    Hooks on saved tensors are those of non-reentrant checkpointing, whose recomputation has to save what the first pass
    has saved, whatever became of the group meanwhile.
    """
    return (
        type(x) in _PLAIN
        and x.device.type in ("cpu", "cuda")
        and x.dim() > 0
        and (torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1])
        and not x.is_inference()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not _has_any_global_hook()
    )


def intercepted(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def fits(operands: Operands, x: Tensor) -> bool:
    """Whether the operator takes these operands beside x."""
    tensors = [t for t in operands[:5] if t is not None]
    if any(type(t) not in _PLAIN or t.device != x.device for t in tensors):
        return False
    weight, _, down, up, *_ = operands
    if weight.dim() != 2 or down.dim() != 2 or up.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    if down.dtype != up.dtype:
        return False
    return x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)


def go_together(a: Operands, b: Operands) -> bool:
    """Whether one call of the operator takes both."""
    if a.dropout_p != b.dropout_p:
        return False
    return (a.weight.dtype, a.lora_a.dtype) == (b.weight.dtype, b.lora_a.dtype)


def _alike(x: Tensor, a: Operands, b: Operands) -> bool:
    """Whether one call takes both, and their outputs are parts of autograd's graph or neither of them is: a common node
    makes both one.
    """
    return go_together(a, b) and (x.requires_grad or not torch.is_grad_enabled() or _trains(a) == _trains(b))


def _trains(operands: Operands) -> bool:
    return any(t is not None and t.requires_grad for t in operands[:5])


def _operands(layer: Member | None, group: Group, x: Tensor) -> Operands | None:
    """What a layer of the group would hand to the operator for x; None where it has to be called itself."""
    place = getattr(layer, "sharing", None)
    if place is None or place.group is not group or intercepted(layer):
        return None
    operands = layer.operands(x)
    if operands is None or not fits(operands, x) or any(t is not None and t.is_inference() for t in operands[:5]):
        return None
    return operands
