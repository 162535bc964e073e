"""Every test runs with each backend, those of values first. ``VCR_OPS_GPU_TEST_SECONDS=S`` leaves out what hasn't begun
after so many seconds, so that a report is written.
"""

import os
import time
from pathlib import Path

import pytest

from .machine import BACKENDS

START = time.monotonic()
SECONDS = float(os.environ.get("VCR_OPS_GPU_TEST_SECONDS", "inf"))
FIRST = Path(__file__).with_name("test_parity.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path != FIRST)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """What is tested."""
    return request.param


@pytest.fixture(autouse=True)
def in_time() -> None:
    if time.monotonic() - START > SECONDS:
        pytest.skip("out of time")
