"""A limited time, of which each thing that may take long is given a share, and what isn't left is left out."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class OutOfTime(Exception):
    """What was begun took longer than there was time."""


class Budget:
    """``seconds`` from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.start = clock()
        self.reserved = 0.0
        # A compilation that is expected to take longer than what is spare is left out. With so much left it is begun
        # all the same, and stopped when the time is over.
        self.begin_with: float | None = None
        # What a compilation takes, by torch.compile's mode: a guess, until one has been seen.
        self.expected: dict[str | None, float] = {None: 15.0, "max-autotune-no-cudagraphs": 40.0}

    @property
    def left(self) -> float:
        """Seconds left, negative when they are over."""
        return self.start + self.seconds - self.clock()

    def reserve(self, seconds: float) -> None:
        """Keep so many of the seconds from ``spare``: for what comes later."""
        self.reserved = seconds

    def needed(self, mode: str | None) -> float:
        """What must be spare for a compilation to be begun."""
        expected = self.expected[mode]
        return expected if self.begin_with is None else min(expected, self.begin_with)

    @property
    def spare(self) -> float:
        """Seconds left beside the reserved ones."""
        return self.left - self.reserved


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the code within when ``seconds`` are over. For the main thread."""

    def ring(*_: object) -> None:
        raise OutOfTime(f"it took more than the {seconds:.0f} s that were left")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
