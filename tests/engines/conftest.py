"""No network, one thread, and two processes that all distributed tests share."""

import os

import pytest
import torch

from .ranks import Ranks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def seeded(one_thread, own_precision):
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks():
    """Runs a function on two ranks: `ranks(function, *arguments)` calls `function(rank, *arguments)` on each."""
    both = Ranks()
    yield both.run
    both.close()
