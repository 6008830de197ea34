"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two OpenMP threads that wait for each other on busy cores cost more than these small problems.

    Tests about threads set their number themselves.
    """
    torch.set_num_threads(1)
