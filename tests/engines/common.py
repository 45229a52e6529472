"""A small adapted model, its data, and what two runs must share."""

import peftops
import torch

from ..methods.models import llama

VOCABULARY = 60


def adapted(seed=0, dtype=torch.float32, lora=None, **options):
    """A random Llama (attention dropout 0.1) with LoRA on it: the same numbers for the same seed."""
    torch.manual_seed(seed)
    model = llama(**{"attention_dropout": 0.1, **options}).to(dtype)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.25, **(lora or {})}
    tuning = peftops.attach(model, peftops.LoRA(**lora))
    with torch.no_grad():  # away from B = 0, where A gets no gradient
        for name, parameter in tuning.named_parameters():
            if ".lora_b." in name:
                parameter.normal_(std=0.05)
    return model, tuning


def sequences(rows, length=12, seed=1):
    """Token ids [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def examples(rows, length=12):
    """A data set as Trainer takes it."""
    return [{"input_ids": ids, "labels": ids} for ids in sequences(rows, length)]


def values(tuning):
    """Copies of the trained parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in tuning.named_parameters()}


def assert_equal(actual, expected):
    """Two dictionaries of tensors have the same names and bits."""
    assert actual.keys() == expected.keys() and len(expected) > 0
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def assert_close(actual, expected, tolerance=1e-5):
    """The same names; each tensor differs by at most `tolerance` of its norm."""
    assert actual.keys() == expected.keys() and len(expected) > 0
    for name, tensor in expected.items():
        error = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


def state(model):
    """Copies of the whole state_dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
