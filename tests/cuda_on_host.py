"""Runs the CUDA C++ backend without a GPU: its bindings and kernels, executed on the host on CPU tensors.

``VCR_OPS_CUDA_ON_HOST=LIBRARY`` turns it on, for tests marked ``cuda``; ``tests/kernels/cuda/run.sh library`` builds
the library. Fibers stand for a GPU's threads, and what only a GPU's driver can show (streams, devices) isn't seen.
"""

import functools
import os

import pytest
import torch

from vcr_ops import backend, library
from vcr_ops.ops import dispatch

LIBRARY = os.environ.get("VCR_OPS_CUDA_ON_HOST", "")
KEY = "PrivateUse1"  # of the library's ops


def turn_on() -> None:
    """Let the backend "cuda" take CPU tensors, and run the library's ops."""
    torch.ops.load_library(os.path.abspath(LIBRARY))
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
    for name in library.OPS:
        op = getattr(torch.ops.vcr_ops, name).default
        kernel = torch.library.get_kernel(op, KEY)
        dispatch._functions[op, "cuda"] = functools.partial(kernel.call_boxed, keys)
    backend.BACKENDS["cuda"] = backend.Backend("cuda", ("cpu",), "CUDA kernels on the host", lambda case: None)


class Plugin:
    """Leaves the marked tests out where there is no library."""

    def pytest_configure(self, config: pytest.Config) -> None:
        if LIBRARY:
            turn_on()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not LIBRARY:
            marked = [item for item in items if item.get_closest_marker("cuda")]
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if not item.get_closest_marker("cuda")]
