"""What the tests of layers that share their input have in common: counted calls, one step, comparisons."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from peftops.nn import sharing
from peftops.nn.sharing import Member


@pytest.fixture(autouse=True)
def few_rows_count(monkeypatch):
    """In modules that import it the small inputs of the tests stand for large ones."""
    monkeypatch.setattr(sharing, "FEW_ROWS", -1)


@contextmanager
def counted():
    """A list that gets the number of projections of each call for several layers."""
    calls, real = [], sharing.lora_linear_multi

    def call(x, weights, *rest):
        calls.append(len(weights))
        return real(x, weights, *rest)

    sharing.lora_linear_multi = call
    try:
        yield calls
    finally:
        sharing.lora_linear_multi = real


def groups(model):
    """The groups of a model, each once."""
    places = [m.sharing for m in model.modules() if isinstance(m, Member) and m.sharing is not None]
    return list({id(place.group): place.group for place in places}.values())


def nothing_waits():
    """Whether no output is kept for later."""
    return sharing._thread.held is None


def train_step(call, parameters, seed=3):
    """Output and gradients of `call` by name, and the next random number."""
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = None
    y = call()
    y.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return {"y": y.detach(), "next number": torch.rand(1), **gradients}


def assert_same(got, expected, exact=("y", "next number"), tolerance=1e-5):
    """The output and the generator to the bit, gradients within the tolerance of their norm."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name in exact:
            assert torch.equal(got[name], value), name
        else:
            error = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: {error:.1e}"
