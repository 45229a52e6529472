"""No network, one thread, and two processes that all distributed tests share."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState

from .ranks import Ranks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """Trainer with bf16=True leaves it in the environment and in accelerate's state, for every later Trainer."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def ranks():
    """Runs a function on two ranks: `ranks(function, *arguments)` calls `function(rank, *arguments)` on each."""
    both = Ranks()
    yield both.run
    both.close()
