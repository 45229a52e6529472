"""Every test of the methods starts from the seed, on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded(seed, one_thread):
    torch.manual_seed(seed)
