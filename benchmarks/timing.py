"""Timing of several sides in one run, interleaved: A B C, B C A, … so that drift of the machine meets all of them
alike.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

MIB = 1 << 20
T = TypeVar("T")


@dataclass
class Samples:
    """Wall-clock seconds of each call of one side, and the minor page faults that they took in total."""

    seconds: list[float] = field(default_factory=list)
    faults: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, inclusive: within the samples."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def faults_per_call(self) -> float:
        return self.faults / len(self.seconds)


def page_faults() -> int:
    """Minor page faults of this process so far, all threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def in_turn(
    sides: Mapping[str, Callable[[], T]], *, seconds: float, min_rounds: int = 7, max_rounds: int = 2000
) -> dict[str, list[T]]:
    """What every side returned, called once a round, each round beginning with the next side, for about ``seconds`` in
    all.

    At least ``min_rounds`` however long they take, at most ``max_rounds``. The garbage collector waits meanwhile.
    """
    returned: dict[str, list[T]] = {name: [] for name in sides}
    order = list(sides)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while order and (rounds < min_rounds or (rounds < max_rounds and time.perf_counter() - start < seconds)):
            for name in order:
                returned[name].append(sides[name]())
            order.append(order.pop(0))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return returned


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 2000,
    warm_up: int = 2,
    before: Callable[[], object] | None = None,
) -> dict[str, Samples]:
    """Wall-clock times of every side, called in turn (see ``in_turn``) after ``warm_up`` calls of each.

    ``before`` runs ahead of every call, untimed (a cache flush).
    """
    samples = {name: Samples() for name in sides}
    for side in sides.values():
        for _ in range(warm_up):
            side()

    def timed(side: Callable[[], object], into: Samples) -> None:
        if before is not None:
            before()
        faults = page_faults()
        begin = time.perf_counter()
        side()
        into.seconds.append(time.perf_counter() - begin)
        into.faults += page_faults() - faults

    in_turn(
        {name: functools.partial(timed, side, samples[name]) for name, side in sides.items()},
        seconds=seconds,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
    )
    return samples


def touch_memory(total_bytes: int) -> None:
    """Allocate, write and free ``total_bytes`` through torch's allocator.

    glibc gives large blocks straight back to the system until it has seen one of their size freed; after this, blocks
    of up to 31 MiB are kept, as in any process that has run for a while. What still faults is counted in the results.
    """
    count = max(total_bytes // (31 * MIB), 2)
    blocks = [torch.ones(31 * MIB // 4) for _ in range(count)]
    del blocks


def keep_memory() -> None:
    """Have glibc never give memory back, so that no step takes page faults (not what users have by default)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    if mallopt is None or not (mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0)):
        raise RuntimeError("memory can't be kept on this system: it has no glibc mallopt")


def last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports for the first core; 64 MiB where it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes) or 64 * MIB


class CacheFlush:
    """Called, it writes a buffer of twice the last-level cache (at most 512 MiB), so that nothing else stays in it."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(min(2 * last_level_cache_bytes(), 512 * MIB) // 4)

    def __call__(self) -> None:
        self.buffer.add_(1)
