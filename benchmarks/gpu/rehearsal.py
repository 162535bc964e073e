"""The CPU in the place of a GPU: all of the benchmark but ``cuda.py`` runs, and the times mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..bandwidth import PASSES
from .device import Kernel, Times

NAMES = (*(one.name for one in PASSES), "other")


class _Log(TorchDispatchMode):
    """Each of PyTorch's ops as a kernel, named after the passes in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        name = NAMES[len(self.kernels) % len(NAMES)]
        self.kernels.append(Kernel(f"{name}_kernel", time.perf_counter() - begin))
        return result


class Rehearsal:
    """The composite on the CPU, and the C++ kernels as the second backend."""

    name = "cpu"
    backends: dict[str, str] = {"composite": "vcr_ops stand-in", "cpp": "vcr_ops C++"}  # noqa: RUF012
    backend = "composite"
    l2_bytes = 1 << 20

    def call(self, function: Callable[[], object]) -> Times:
        begin = time.perf_counter()
        function()
        taken = time.perf_counter() - begin
        return Times(taken, taken)

    def queued(self, function: Callable[[], object]) -> float:
        return self.call(function).device

    def new_pool(self) -> Any:
        return None

    def capture(self, function: Callable[[], object], pool: Any = None) -> Callable[[], object]:
        function()
        return function

    def segments(self, functions: list[Callable[[], object]]) -> list[list[Kernel]]:
        parts = []
        for function in functions:
            with _Log() as log:
                function()
            parts.append(log.kernels)
        return parts

    def peak_bytes(self, function: Callable[[], object]) -> int:
        function()
        return 0

    def free(self) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {
            "gpu": "rehearsal on the CPU",
            "l2_mib": self.l2_bytes / 2**20,
            "peak_gbps": 100.0,
            "torch": torch.__version__,
        }
