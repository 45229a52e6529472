"""Which trainable parameters a training step really trains, and why the others get no gradient."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from ..nn.lora import LoRALayer
from .probe import arguments_of, gradients_kept, preserved, tensors_in

# A factor's partner: where one of the two is zero, as at the start of a training, the other's gradient is zero.
_PARTNERS = {"lora_a": "lora_b", "lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_PARTNERS.update({b: a for a, b in _PARTNERS.items()})
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class Finding:
    """One parameter that the step does not train.

    parameter: its full name, or "" for the model as a whole. kind: "nothing trainable", "merged", "disabled",
    "inactive", "not called", "checkpoint", "no_grad", "cut", "unused", "no gradient", "zero" or "not finite". reason:
    what was seen. advice: what to do. expected: whether it belongs to a healthy start (the factor beside one that is
    zero).
    """

    parameter: str
    kind: str
    reason: str
    advice: str
    expected: bool = False


@dataclass(frozen=True)
class TrainableReport:
    """What :func:`check_trainable` saw; `print` shows a list.

    findings: of the parameters that get no useful gradient; trainable: number of parameter tensors that ask for a
    gradient; trained: of those, the ones that got a finite gradient that is not zero; loss: the loss of the step.
    """

    findings: tuple[Finding, ...]
    trainable: int
    trained: int
    loss: float

    @property
    def ok(self) -> bool:
        """Whether every finding is one that is expected at the start of a training."""
        return all(finding.expected for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.trained} of {self.trainable} trainable parameter tensors got a gradient; loss {self.loss:g}"]
        groups: dict[tuple, list[Finding]] = {}
        for finding in sorted(self.findings, key=lambda finding: finding.expected):
            key = finding.expected, finding.kind, _without_numbers(finding.reason), finding.advice
            groups.setdefault(key, []).append(finding)
        for (expected, kind, _, advice), members in groups.items():
            names: dict[str, int] = {}
            for member in members:
                name = _without_numbers(member.parameter)
                names[name] = names.get(name, 0) + 1
            first = "" if len(members) == 1 else f" (first: {members[0].parameter})"
            lines.append(f"{'expected' if expected else 'PROBLEM'}, {kind}: {members[0].reason}{first}")
            lines += [f"    {name}" + (f" ({count})" if count > 1 else "") for name, count in names.items() if name]
            lines.append(f"  -> {advice}")
        if self.ok:
            later = " from the second step on" if self.findings else ""
            lines.append(f"ok: every trainable parameter is trained{later}")
        return "\n".join(lines)


def check_trainable(
    model: nn.Module,
    batch: Tensor | tuple | list | Mapping,
    loss: Callable[[object], Tensor] | None = None,
) -> TrainableReport:
    """Run one forward and backward and report each trainable parameter that gets no gradient, and why.

    batch: what the model is called with: one tensor, a tuple or list of positional arguments, or a mapping of keyword
        arguments, on the model's device.
    loss: from the model's output to a scalar tensor. None takes `output.loss` (or `output["loss"]`), and where there is
        none, a fixed random projection of all floating outputs (a sum of squares would have no gradient at a head that
        starts at zero, nor behind a layer norm).

    The model runs in training mode (a model whose top is in training mode keeps the mode of every part). Afterwards
    gradients, modes, buffers such as BatchNorm's statistics, and the state of the random number generators are what
    they were, and no hook is left, also after an error. Works on plain models, adapted ones and Hugging Face PEFT's.
    A compiled model runs eagerly.

    Raises TypeError for something that is no module, ValueError where there is no loss, and what the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_trainable: model is a {type(model).__name__}, but it must be a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)
    arguments, keywords = arguments_of(batch)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        return TrainableReport((_nothing_trainable(model),), 0, 0, float("nan"))
    with ExitStack() as stack:
        stack.enter_context(preserved(model, arguments, keywords))
        stack.enter_context(_eager(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if not model.training:
            model.train()
        watch = stack.enter_context(_watched(model))
        value = _loss_of(model(*arguments, **keywords), loss)
        watch.recording = False
        nodes, leaves = _graph(value)
        stack.enter_context(gradients_kept(leaves))
        if value.requires_grad:
            value.backward()
        inspector = _Inspector(model, watch, nodes, {id(leaf) for leaf in leaves})
        found = [inspector.finding(name, parameter) for name, parameter in trainable.items()]
    findings = [finding for finding in found if finding is not None]
    trained = len(trainable) - len(findings)
    if not value.isfinite():
        findings.insert(0, _not_finite("", f"the loss is {value.item()}", watch))
    return TrainableReport(tuple(findings), len(trainable), trained, value.item())


# ---- why a parameter gets no gradient --------------------------------------------------------------------------------


@dataclass
class _Call:
    """One call of a module: the modules around it, whether grad mode was on, the name of the reentrantly checkpointed
    block around it whose inputs ask for no gradient, and the graph nodes of its outputs.
    """

    path: tuple[str, ...]
    grad: bool
    block: str | None
    in_checkpoint: bool
    nodes: list = field(default_factory=list)


class _Watch:
    """The calls of every module during the forward."""

    def __init__(self):
        self.recording = True
        self.calls: dict[str, list[_Call]] = {}
        self.first_not_finite: str | None = None
        self._open: list[tuple[str, _Call, object]] = []

    def enter(self, name: str) -> None:
        if not self.recording:
            return
        frame = _checkpoint_frame()
        block = None
        # Only tensors among the checkpoint's own arguments count, not those in a tuple or bound by a closure.
        inputs = [] if frame is None else [item for item in frame.f_locals["args"] if isinstance(item, Tensor)]
        if frame is not None and not any(tensor.requires_grad for tensor in inputs):
            inside = [opened for opened, _, other in self._open if other is frame]
            block = inside[0] if inside else name
        path = tuple(opened for opened, _, _ in self._open)
        call = _Call(path, torch.is_grad_enabled(), block, frame is not None)
        self.calls.setdefault(name, []).append(call)
        self._open.append((name, call, frame))

    def leave(self, name: str, output: object) -> None:
        if not self.recording or not self._open:
            return
        _, call, _ = self._open.pop()
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                call.nodes.append(tensor.grad_fn)
            floating = tensor.is_floating_point() and not tensor.is_meta
            if self.first_not_finite is None and floating and not tensor.detach().isfinite().all():
                self.first_not_finite = name


class _Inspector:
    def __init__(self, model: nn.Module, watch: _Watch, nodes: set, leaves: set[int]):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.watch, self.nodes, self.leaves = watch, nodes, leaves

    def finding(self, name: str, parameter: nn.Parameter) -> Finding | None:
        gradient = parameter.grad
        if gradient is None:
            return Finding(name, *self._no_gradient(name, parameter))
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        if not values.isfinite().all():
            count = int((~values.isfinite()).sum())
            return _not_finite(name, f"{count} of {values.numel()} gradient entries are NaN or infinite", self.watch)
        return self._zero_gradient(name, parameter) if values.numel() and not values.any() else None

    def _zero_gradient(self, name: str, parameter: nn.Parameter) -> Finding:
        state = self._adapter_state(self._unit(name), name)
        if state is not None:
            return Finding(name, *state)
        partner = self._partner(name)
        if partner is None or self.parameters[partner].any():
            return Finding(
                name,
                "zero",
                "the gradient is exactly zero",
                "what follows may be zero at its start (then a second step trains it) or dead: a ReLU that is off, "
                "labels that are all masked, a branch multiplied by zero",
            )
        if not parameter.any():
            return Finding(
                name,
                "zero",
                "both factors are zero, so neither will ever get a gradient",
                "draw the adapter anew, or load one that is not all zeros",
            )
        return Finding(
            name,
            "zero",
            "the gradient is zero because the other factor is zero, as it is before the first step",
            "nothing: the first step changes that factor, then this one is trained as well",
            expected=True,
        )

    def _partner(self, name: str) -> str | None:
        parts = name.split(".")
        for index, part in enumerate(parts):
            if part in _PARTNERS:
                partner = ".".join([*parts[:index], _PARTNERS[part], *parts[index + 1 :]])
                return partner if partner in self.parameters else None
        return None

    def _no_gradient(self, name: str, parameter: nn.Parameter) -> tuple[str, str, str]:
        """Kind, reason, advice."""
        units = [self._unit(other) for other in self.names[id(parameter)]]
        unit = next((path for path in units if path in self.watch.calls), units[0])
        state = self._adapter_state(unit, name)
        if state is not None:
            return state
        calls = self.watch.calls.get(unit)
        shown = unit or "the model"
        if not calls:
            return (
                "not called",
                f"{shown} was not called in this forward",
                "a dead branch, or one that this batch does not take: call it, or freeze it with requires_grad_(False)",
            )
        if all(call.block is not None for call in calls):
            return (
                "checkpoint",
                f"{calls[0].block} is checkpointed with use_reentrant=True and none of its inputs requires a gradient, "
                "so nothing inside it is trained",
                "pass use_reentrant=False (transformers: model.gradient_checkpointing_enable("
                'gradient_checkpointing_kwargs={"use_reentrant": False})), or call '
                "model.enable_input_require_grads() before training",
            )
        if not any(call.grad or call.in_checkpoint for call in calls):
            return (
                "no_grad",
                f"{shown} runs with gradients switched off",
                "take torch.no_grad(), inference_mode or set_grad_enabled(False) away from around this call",
            )
        if not any(call.nodes or call.in_checkpoint for call in calls):
            return (
                "unused",
                f"{shown} was called, but its output requires no gradient: its forward does not use this parameter, or "
                "cuts the graph itself",
                "look for detach(), a merged, tied or replaced weight, or an output of integers in that forward",
            )
        if not any(self._reaches(call) for call in calls):
            return self._cut(shown, calls)
        if id(parameter) not in self.leaves:
            return (
                "unused",
                f"{shown} was called and its output reaches the loss, but its forward does not use this parameter",
                "the weight may be tied, replaced or detached at run time: train the tensor that is used, or freeze "
                "this one",
            )
        return (
            "no gradient",
            "it is part of the loss, but no gradient came back",
            "an autograd function behind it returns None for it",
        )

    def _cut(self, shown: str, calls: list[_Call]) -> tuple[str, str, str]:
        around = [path for call in calls for path in call.path]
        inner = [path for path in around if any(self._reaches(call) for call in self.watch.calls[path])]
        where = ""
        if inner:
            innermost = max(inner, key=around.index)
            where = f"; it is lost inside {innermost or 'the forward of the model itself'}, whose own output does"
        return (
            "cut",
            f"{shown} was called, but its output does not reach the loss{where}",
            "its output is not used, or the graph is cut behind it by detach(), .item(), numpy(), argmax or a "
            "conversion to integers",
        )

    def _reaches(self, call: _Call) -> bool:
        return any(node in self.nodes for node in call.nodes)

    def _unit(self, name: str) -> str:
        """The module whose call uses the parameter: the adapted layer of a factor, else the nearest one that can be
        called.
        """
        parts = name.split(".")[:-1]
        for length in range(len(parts), -1, -1):
            path = ".".join(parts[:length])
            if _adapter_of(self.modules[path], name[len(path) :].lstrip(".")) is not None:
                return path
        while parts and isinstance(self.modules[".".join(parts)], _CONTAINERS):
            parts.pop()
        return ".".join(parts)

    def _adapter_state(self, unit: str, name: str) -> tuple[str, str, str] | None:
        layer = self.modules[unit]
        adapter = _adapter_of(layer, name[len(unit) :].lstrip("."))
        if adapter is None:
            return None
        if getattr(layer, "merged", False):
            return "merged", f"{unit} is merged and runs as a plain layer", "unmerge before training"
        ours = isinstance(layer, LoRALayer)
        if layer.disabled if ours else layer.disable_adapters:
            return "disabled", f"the adapters of {unit} are switched off", "switch them on before training"
        if adapter not in (layer.active if ours else layer.active_adapters):
            return (
                "inactive",
                f"adapter {adapter!r} is trainable but not active",
                f"activate it (peftops: tuning.activate({adapter!r}); PEFT: model.set_adapter({adapter!r})) or freeze "
                "it",
            )
        return None


def _adapter_of(layer: nn.Module, inner: str) -> str | None:
    """The adapter to which the parameter `inner` of an adapted layer, ours or PEFT's, belongs; None for any other."""
    kind, _, rest = inner.partition(".")
    if isinstance(layer, LoRALayer):
        owned = kind in ("lora_a", "lora_b", "lora_bias")
    else:
        owned = isinstance(getattr(layer, "active_adapters", None), list)
        owned = owned and kind in (*getattr(layer, "adapter_layer_names", ()), "modules_to_save")
    return rest.partition(".")[0] if owned and rest else None


def _not_finite(name: str, reason: str, watch: _Watch) -> Finding:
    source = watch.first_not_finite
    where = f"; the first output that is not finite is that of {source or 'the model'}" if source is not None else ""
    return Finding(
        name,
        "not finite",
        reason + where,
        "look at that layer's input and weights, at labels that are all ignored (a mean over nothing), and at float16 "
        "(use bfloat16, or a GradScaler)",
    )


def _nothing_trainable(model: nn.Module) -> Finding:
    frozen = [name for name, _ in model.named_parameters() if "lora_" in name]
    reason, advice = (
        "no parameter of the model requires a gradient",
        "set requires_grad_(True) on what is to be trained",
    )
    if frozen:
        reason += f"; the adapter's are frozen ({frozen[0]}, ...)"
        advice = (
            "load with trainable=True (peftops.load) or is_trainable=True (PeftModel.from_pretrained), and leave "
            "disabled() or disable_adapter()"
        )
    return Finding("", "nothing trainable", reason, advice)


# ---- the step --------------------------------------------------------------------------------------------------------


def _loss_of(output: object, loss: Callable[[object], Tensor] | None) -> Tensor:
    if loss is not None:
        value = loss(output)
    elif isinstance(output, Mapping) and output.get("loss") is not None:
        value = output["loss"]
    else:
        value = getattr(output, "loss", None)
    if value is None:
        floating = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        if not floating:
            raise ValueError("check_trainable: the output holds no floating tensor; pass loss=, a function of it")
        value = sum(_projection(tensor) for tensor in floating)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shown = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"check_trainable: the loss is {shown}, but it must be a floating tensor of one element")
    return value.reshape(())


def _projection(tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(tensor.numel())
    direction = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return (tensor.float() * direction).sum() / max(tensor.numel(), 1) ** 0.5


def _checkpoint_frame():
    """The frame of the innermost reentrant checkpoint that is running its forward, if any."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame


def _graph(value: Tensor) -> tuple[set, list[Tensor]]:
    """All nodes of the graph behind `value`, and the leaf tensors that would get a gradient."""
    nodes, leaves, pending = set(), [], [value.grad_fn]
    if value.grad_fn is None and value.requires_grad:
        leaves.append(value)
    while pending:
        node = pending.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        pending += [following for following, _ in node.next_functions]
    return nodes, leaves


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|\s|$)", "*", name)


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    watch = _Watch()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name), prepend=True)
            stack.callback(before.remove)
            after = module.register_forward_hook(lambda *a, name=name: watch.leave(name, a[-1]), always_call=True)
            stack.callback(after.remove)
        yield watch


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Without the compiler: a compiled forward calls no hook."""
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
