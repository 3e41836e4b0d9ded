"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models this small run faster on one thread, many times faster where the other cores are busy."""
    torch.set_num_threads(1)
