"""A saved adapter for the tests of files, what is done to it, and how loading it has to fail."""

import json

import pytest
import torch
from peftops.methods import LoRA, attach, load

from .models import Block, randomise

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
METHOD = LoRA(rank=3, alpha=5, dropout=0.1, target_modules=["q_proj", "up"], modules_to_save=["head"])


def save_block(folder):
    """Save an adapter of a :class:`Block` with values as after training."""
    tuning = attach(Block(), METHOD)
    randomise(tuning)
    tuning.save(folder)
    return folder


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    config.update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


def assert_refused(folder, error, match):
    """Loading fails, and the model is untouched."""
    model = Block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match):
        load(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys() and all(p.requires_grad for p in model.parameters())
