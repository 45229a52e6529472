"""Every test of the modules starts from the seed, on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(seed, one_thread):
    torch.manual_seed(seed)


@pytest.fixture
def fresh_compiler():
    """All layers share the code of one forward, for which dynamo keeps a few graphs at most."""
    torch.compiler.reset()
