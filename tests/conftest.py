"""Fixtures and markers of all tests."""

import os

import pytest
import torch

from . import cuda_on_host, interpreter


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(interpreter.plugin())
    config.pluginmanager.register(cuda_on_host.Plugin())
    # Tests are small: one thread is fastest, and leaves the other cores alone. Threads are tested by their own tests.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("VCR_OPS_GPU_REHEARSAL"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, torch::empty of C++ ops included: what is read before it was written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def threads():
    """``threads(n)`` sets PyTorch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
