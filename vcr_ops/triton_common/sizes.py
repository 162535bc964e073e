"""The sizes of a case, and what the launchers take from them: tiles, splits, grids."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..maps import positions
from .configs import arch, config
from .maps import MapView, acc_type, map_view, power_of_two

ONE_TILE = 16384  # elements that a program keeps in registers, to read a map once for its mean and its attention
MERGED_TILE = 16384  # of one image's states, to merge what its splits have found
LARGEST_TILE = 32768  # elements; more than a program's registers, so only for wide concepts
SMALL_TILE = 8192  # elements of a tile that holds no part of the map
WIDE = 8  # how many times smaller these two are for float64: its numbers, and what is computed of them, spill otherwise


class Sizes(NamedTuple):
    """What the kernels are specialised by."""

    N: int
    C: int
    p: int
    pt: int
    S: int
    itemsize: int
    view: MapView
    arch: str

    def config(self, kernel: str) -> dict[str, int]:
        """The shipped configuration, no larger than the problem."""
        found = config(
            kernel, layout=self.view.layout, p=self.p, S=self.S, N=self.N, itemsize=self.itemsize, arch=self.arch
        )
        # the sampler holds p * pt numbers for every position of a tile
        width = power_of_two(self.p) * (power_of_two(self.pt) if kernel == "concept_sample" else 1)
        concepts = min(found["CB"], power_of_two(self.C), max(1, LARGEST_TILE // width))
        tile = max(1, LARGEST_TILE // (width * concepts))
        return {**found, "CB": concepts, "BS": min(found["BS"], power_of_two(self.S), tile)}

    @property
    def map_constants(self) -> dict[str, object]:
        return {
            "C": self.C,
            "P": self.p,
            "P2": power_of_two(self.p),
            "LAST": self.view.last,
            "ACC": acc_type(self.view.tensor.dtype),
        }

    @property
    def small_constants(self) -> dict[str, object]:
        """Of a kernel that sees no map."""
        constants = {name: x for name, x in self.map_constants.items() if name != "LAST"}
        return constants | {"PT": self.pt, "PT2": power_of_two(self.pt)}


MOST_POSITIONS = 2**31 - 2**16  # and a tile more


def sizes_of(y: Tensor, weight: Sequence[int]) -> Sizes:
    """The sizes of a case; ``weight`` is (C, p, pt).

    Raises:
        ValueError: more positions than the kernels count in 32 bits.
    """
    concepts, p, pt = weight
    if positions(y) > MOST_POSITIONS:
        raise ValueError(f"the map has {positions(y)} positions; the Triton kernels take up to {MOST_POSITIONS}")
    return Sizes(y.shape[0], concepts, p, pt, positions(y), y.element_size(), map_view(y), arch(y.device))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def options(found: dict[str, int]) -> dict[str, int]:
    """What Triton itself takes of a configuration."""
    return {name: found[name] for name in ("num_warps", "num_stages", "maxnreg") if name in found}


def splits_of(found: dict[str, int], S: int) -> int:
    """How many programs share an image's positions: what the configuration says, as far as there are tiles."""
    return max(1, min(found["splits"], cdiv(S, found["BS"])))


def sample_config(size: Sizes, save: bool) -> dict[str, int]:
    """The sampler's configuration. In evaluation a tile is all positions of its concepts, where that isn't too much."""
    found = size.config("concept_sample" if save else "concept_sample_inference")
    wide = size.itemsize == 8
    whole = power_of_two(size.S) * power_of_two(size.p) * found["CB"] * (WIDE if wide else 1)
    if save or whole > ONE_TILE:
        return found
    return {**found, "BS": power_of_two(size.S), "num_warps": max(4, whole // (2048 if wide else 1024))}


def sampler_splits(size: Sizes, found: dict[str, int], save: bool) -> int:
    """How many programs of the middle's sampler share an image. None in evaluation, which must not depend on the
    batch: how far an image is split hangs on N."""
    states = power_of_two(size.C) * power_of_two(size.pt)
    mergeable = states * max(power_of_two(size.C), power_of_two(size.p)) <= MERGED_TILE
    return splits_of(found, size.S) if save and mergeable else 1


def rows_at_once(width: int, rows: int, itemsize: int = 4) -> int:
    """How many rows of small numbers a prologue loads at a time. itemsize: bytes of a feature, where much is made of
    them."""
    tile = SMALL_TILE // (WIDE if itemsize == 8 else 1)
    return max(1, min(power_of_two(max(rows, 1)), tile // width))
