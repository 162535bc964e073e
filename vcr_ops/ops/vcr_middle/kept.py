"""What the middle's ops keep for each other, in numbers: known without any backend, since fake kernels ask, too."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


def saved_states(n: int, concepts: int, p: int, pt: int) -> int:
    """Where G stands in ``saved`` (triton_saved.states_at)."""
    return (3 + 5 * n) * concepts * p + 2 * n * concepts * pt


def saved_size(n: int, concepts: int, p: int, pt: int, save: bool) -> int:
    """Numbers in ``saved`` (MiddleSaved::size)."""
    channels = concepts * p
    size = 3 * channels + 5 * n * channels + 4 * n * concepts * pt + 3 * n * concepts + 4 * pt
    return size + (n * concepts * concepts + n * channels * pt if save else 0)


def sums_size(rows: int, concepts: int, p: int, modulation: str) -> int:
    """Numbers of what ``store_sums`` leaves, on Triton; a row for each image, or each part of one."""
    channels = concepts * p
    return rows * (6 * channels + 3 * concepts if modulation == "pixel" else 2 * channels)


class Kept(NamedTuple):
    """Numbers in what the steps of a synchronised middle hand on (synced.py)."""

    saved: int
    late: int
    summed: int


def kept_by_cpp(n: int, concepts: int, p: int, pt: int, modulation: str) -> Kept:
    """``late`` is what of the op's ``saved`` only the modulator's pass knows (MiddleSaved, MiddleBackwardWork)."""
    channels = concepts * p
    late = 2 * n * channels + n * concepts * pt
    summed = 5 * n * channels + n * concepts + n * concepts * pt + 2 * channels
    return Kept(saved_size(n, concepts, p, pt, True) - late, late, summed)


def kept_by_triton(n: int, concepts: int, p: int, pt: int, modulation: str) -> Kept:
    """``late`` is all that the op keeps, completed; see triton_steps.py."""
    saved = saved_size(n, concepts, p, pt, True)
    return Kept(saved, saved, sums_size(n, concepts, p, modulation) + n * concepts * (pt + 1))


def kept(y: Tensor, weight: Sequence[int], modulation: str) -> Kept:
    """By the backend that has the steps on y's device; ``weight`` is (C, p, pt)."""
    concepts, p, pt = weight
    sizes = kept_by_triton if y.device.type == "cuda" else kept_by_cpp
    return sizes(y.shape[0], concepts, p, pt, modulation)
