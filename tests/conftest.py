"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch

# What the tests of the kernels are in. Elsewhere other libraries' operators would be told to be deterministic too.
POISONED = frozenset({"test_functional", "test_ops", "test_deferred", "test_similarity", "test_half_types"})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two OpenMP threads that wait for each other on busy cores cost more than these small problems.

    Tests about threads set their number themselves.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests of the kernels, uninitialised memory is NaN: what nobody wrote cannot pass for a small number."""
    if request.module.__name__ not in POISONED:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
