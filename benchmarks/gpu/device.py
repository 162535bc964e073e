"""What the benchmark asks of a device. ``cuda.py`` answers for a GPU, ``rehearsal.py`` stands in for one on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol


class Kernel(NamedTuple):
    """One kernel, copy or fill that the device ran."""

    name: str
    seconds: float


class Times(NamedTuple):
    """Seconds of one call: on the device, from an idle one to its end; and until the host was done with it."""

    device: float
    host: float


class Device(Protocol):
    """A device and its clock.

    name: torch's. backends: those of vcr_ops that run on it, with their titles; backend: the one that is measured.
    l2_bytes: its last cache.
    """

    name: str
    backends: dict[str, str]
    backend: str
    l2_bytes: int

    def call(self, function: Callable[[], object]) -> Times:
        """A call on an idle device with nothing in its cache: what a caller waits for, the host's part included."""

    def queued(self, function: Callable[[], object]) -> float:
        """Seconds of a call whose work had been queued before the device was free for it, again without a cache: the
        host's part doesn't show.
        """

    def capture(self, function: Callable[[], object], pool: Any = None) -> Callable[[], object]:
        """The function as a graph; ``pool`` is a ``new_pool()`` of memory that several graphs share."""

    def new_pool(self) -> Any: ...

    def segments(self, functions: list[Callable[[], object]]) -> list[list[Kernel]]:
        """What each function had the device do, kernel by kernel, the cache flushed before each.

        RuntimeError where the profiler sees nothing.
        """

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """The most memory that a call held beyond what was there before."""

    def free(self) -> None:
        """Give back the memory that nothing holds."""

    def describe(self) -> dict[str, Any]:
        """For the results file: name, peak bandwidth, cache, driver, clocks."""
