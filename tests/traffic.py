"""Counts what Triton kernels load and store of a map, under the interpreter: elements really touched, masks applied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

from vcr_ops.triton_common.launch import Launch, hooks


@dataclass
class Traffic:
    """Per kernel, in units of the whole map: what it reads and writes of map-sized tensors; and its launches."""

    elements: int
    reads: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    writes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # bytes from the map's start to the first one of each load of it

    def passes(self) -> dict[str, tuple[float, float]]:
        """(reads, writes) of each kernel."""
        names = dict.fromkeys(self.launches)
        return {name: (self.reads[name] / self.elements, self.writes[name] / self.elements) for name in names}


@contextmanager
def counted_traffic(like: Tensor, attention: int = 0) -> Iterator[Traffic]:
    """Count inside the context. Maps are the tensors of ``like``'s number of elements and dims; an array of
    ``attention`` elements counts by its bytes."""
    traffic = Traffic(like.numel())
    ranges: list[tuple[int, int, float]] = []
    builder = interpreter.InterpreterBuilder

    def note(launch: Launch) -> None:
        traffic.launches.append(launch.name)
        ranges.clear()
        for x in launch.args:
            if isinstance(x, Tensor) and ((x.numel() == like.numel() and x.dim() >= 3) or x.numel() == attention > 0):
                storage = x.untyped_storage()
                first = storage.data_ptr()
                ranges.append((first, first + storage.nbytes(), x.element_size() / like.element_size()))

    def touched(pointers: np.ndarray, mask: np.ndarray) -> float:
        # Threads that load the same element share one access.
        at = np.unique(np.broadcast_to(pointers, mask.shape)[mask])
        return sum(size * int(((at >= low) & (at < high)).sum()) for low, high, size in ranges)

    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        traffic.reads[traffic.launches[-1]] += touched(ptrs.data, mask.data)
        start = like.untyped_storage().data_ptr()
        at = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        if at.size and start <= at.min() < start + like.untyped_storage().nbytes():
            traffic.places.append(int(at.min()) - start)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
        traffic.writes[traffic.launches[-1]] += touched(ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    hooks.append(note)
    try:
        with (
            mock.patch.object(builder, "create_masked_load", counting_load),
            mock.patch.object(builder, "create_masked_store", counting_store),
        ):
            yield traffic
    finally:
        hooks.remove(note)
