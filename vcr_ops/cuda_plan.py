"""How often the CUDA kernels read the map, from the sizes that their launchers go by; needs no library and no GPU.

The arithmetic is that of csrc/cuda/launch.h and csrc/vcr_middle/cuda_launch.h, and tests/test_cuda_plan.py holds it to
theirs.
"""

from typing import NamedTuple

import torch

from . import library
from .backend import runs_on

WARP, TILE, POSITIONS = 32, 16 << 10, 512  # lanes; bytes of a map that are staged at a time; positions, at most
MOST_RESIDENT = 1 << 24  # positions


class Device(NamedTuple):
    """What the arithmetic asks of a GPU. By default the least of those that the kernels run on.

    shared: bytes of shared memory that a block may have. clusters: it has distributed shared memory. l2: bytes; 0 where
    the blocks of a grid can't wait for each other.
    """

    shared: int = 99 << 10
    multiprocessors: int = 1
    clusters: bool = False
    l2: int = 0


class Sizes(NamedTuple):
    """A map of N images with C concepts of p channels, pt columns of the states, S positions. last: channels_last."""

    N: int
    C: int
    p: int
    pt: int
    S: int
    itemsize: int
    last: bool

    @property
    def acc(self) -> int:
        """Bytes of a number that is worked with."""
        return max(self.itemsize, 4)


def device_of(number: int) -> Device:
    """The sizes of a CUDA device."""
    properties = torch.cuda.get_device_properties(number)
    major, minor = properties.major, properties.minor
    # Code that was compiled for older GPUs has no clusters, whatever it runs on.
    newer = [arch for arch in library.cuda_archs() if int(arch.split(".")[0]) >= 9 and runs_on([arch], major, minor)]
    return Device(
        getattr(properties, "shared_memory_per_block_optin", Device().shared),
        properties.multi_processor_count,
        major >= 9 and bool(newer),
        getattr(properties, "L2_cache_size", 0),
    )


def evaluates_at_once(device: Device, size: Sizes, edges: str) -> bool:
    """True where evaluation is the one launch of 1R + 1W: a block, or a cluster or grid of blocks, has room for an
    image's tiles.
    """
    N, C, S = size.N, size.C, size.S
    if S > MOST_RESIDENT:
        return False
    if edges == "none":
        tried = [_block_shape(size)[0], 1]
    else:
        tried = [_up(C, blocks) for blocks in ((8, 4, 2, 1) if device.clusters else (1,)) if blocks <= C]
    for concepts in tried:
        block = min(S, POSITIONS)
        while True:
            if _evaluate_bytes(size, edges, concepts, block) <= device.shared:
                return True
            if block <= WARP:
                break
            block = _up(block, 2)
    # A few images: a block for each concept.
    if device.l2 == 0 or device.multiprocessors // C < N:
        return False
    return _evaluate_bytes(size, edges, 1, _sampler_block(device, size)) <= device.shared


def samples_at_once(device: Device, size: Sizes, covariance: bool) -> bool:
    """True where the sampler of a map without batch statistics reads it once: a block has room for its concepts' tile.
    covariance: in training, with a query.
    """
    if size.S >= MOST_RESIDENT:
        return False
    return _sample_bytes(size, *_block_shape(size), resident=True, covariance=covariance) <= device.shared // 2


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _block_shape(size: Sizes) -> tuple[int, int]:
    """Concepts of a block of threads, and positions that it stages at a time."""
    concepts = min(size.C, _up(64, size.p * size.itemsize) if size.last else _up(8, size.p))
    fit = TILE // (concepts * size.p * size.itemsize) // WARP * WARP
    return concepts, min(size.S, max(WARP, fit), POSITIONS)


def _sampler_block(device: Device, size: Sizes) -> int:
    """Positions that the sampler works on at a time, in evaluation of more than fits on chip."""
    concepts, block = _block_shape(size)
    resident = samples_at_once(device, size, False)
    while _sample_bytes(size, concepts, block, resident=resident, covariance=False) > device.shared:
        if block > 1:
            block = _up(block, 2)
        elif concepts > 1:
            concepts = _up(concepts, 2)
        else:
            break  # which is refused when it runs
    return block


def _tile_bytes(size: Sizes, channels: int, positions: int) -> int:
    if size.last:
        column = channels | 1
        if size.itemsize < 4:
            even = _up(channels, 2) * 2
            column = even if even % 4 == 2 else even + 2
        return column * positions * size.itemsize
    span = 16 // size.itemsize
    return (positions + 2 * span - 2) // span * span * channels * size.itemsize


def _sum(size: Sizes, *arrays: int) -> int:
    """Bytes of arrays of so many numbers, each of which begins at 16 bytes."""
    return sum(_up(count * size.acc, 16) * 16 for count in arrays)


def _sample_bytes(size: Sizes, concepts: int, block: int, *, resident: bool, covariance: bool) -> int:
    rows, states = concepts * size.p, concepts * size.pt
    tile = _up(_tile_bytes(size, rows, size.S if resident else block), 16) * 16
    found = tile + _sum(size, *[rows] * 7, *[states] * 2, *[concepts] * 4, concepts * block)
    if covariance:
        found += _sum(size, states * block, rows * size.pt, *[rows] * 2, *[states] * 2, *[concepts] * 2)
    return found


def _evaluate_bytes(size: Sizes, edges: str, concepts: int, block: int) -> int:
    found = _sample_bytes(size, concepts, block, resident=True, covariance=False)
    exchanged = 0 if edges == "none" else size.C * size.pt
    return found + _sum(size, *[concepts * size.p] * 5, exchanged, concepts * size.pt)
