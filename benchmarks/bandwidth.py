"""Bytes that the passes move, and a copy of as many bytes to hold beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case


class Pass(NamedTuple):
    """One pass over the map: how many map-sized tensors it reads and writes. 0 and 0: small numbers only."""

    name: str
    reads: int
    writes: int


# The order is that of torch.ops.vcr_ops.pass_times.
PASSES = (
    Pass("channel_stats", 1, 0),
    Pass("concept_sample", 1, 0),
    Pass("reason", 0, 0),
    Pass("concept_modulate", 1, 1),
    Pass("modulate_backward_sums", 2, 0),
    Pass("small_gradients", 0, 0),
    Pass("middle_input_grad", 2, 1),
)


# Evaluation image by image, every stage while the image is in cache: one pass to the library's clock.
BY_IMAGE = Pass("image by image", 1, 1)


def floor_maps(mode: str) -> int:
    """Map-sized reads and writes of a step: 3R + 1W and 4R + 1W in training, 2R + 1W in evaluation (mean and sampling
    share one).
    """
    if mode == "train":
        return sum(p.reads + p.writes for p in PASSES)
    return 3


def floor_bytes(case: Case) -> int:
    """Bytes that a step of the middle can't avoid; 0 for blocks and networks, which convolutions bind."""
    return floor_maps(case.mode) * case.map_bytes if case.level == "middle" else 0


def copy_of(maps: list[Tensor], total_bytes: int) -> Callable[[], None]:
    """A function that reads ``total_bytes / 2`` and writes as many, with torch's own copy.

    The given maps are read in turn and written to buffers of their size, whole images (rows) at a time, so that copy
    and passes find the same data in cache or out of it.
    """
    sources = [m.detach() for m in maps]
    one = sources[0].numel() * sources[0].element_size()
    buffers = [torch.empty_like(m) for m in sources]
    jobs: list[tuple[Tensor, Tensor]] = []
    left = total_bytes // 2
    while left > 0:
        turn = len(jobs) % len(sources)
        source, target = sources[turn], buffers[turn]
        if left < one:  # the last part, by elements in memory order
            count = left // source.element_size()
            source, target = (_flat(t)[:count] for t in (source, target))
        jobs.append((target, source))
        left -= one

    def copy() -> None:
        for target, source in jobs:
            target.copy_(source)

    return copy


def _flat(dense: Tensor) -> Tensor:
    """A dense tensor's elements in the order they lie in memory."""
    return dense.as_strided((dense.numel(),), (1,))
