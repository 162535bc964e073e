"""The cases that the tests run: every pair of choices, with the nasty value of each, and ids that read as cases.

A case says what is computed and on what; ``arrange`` gives a tensor the strides that a case asks for.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAMPLERS = ("dynamic", "static", "pool")
EDGES = ("dynamic", "static", "none")
MODULATIONS = ("channel", "pixel")
AFFINES = ("both", "scale", "shift")
NORMS = ("batch", "given", "none")

# Those that every backend takes, and those of GPUs (and of Triton's interpreter) alone.
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
GPU_DTYPES = DTYPES | {"f16": torch.float16}
LOW_PRECISION = ("bf16", "f16")

# name: N, C, p, spatial. 65, 257 and 1025 positions are one past a vector, a block and a tile.
SIZES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "N3C4p4S1": (3, 4, 4, (1, 1)),
    "N2C1p5S9": (2, 1, 5, (3, 3)),
    "N4C1p1S6": (4, 1, 1, (2, 3)),
    "N2C3p1S15": (2, 3, 1, (5, 3)),
    "N2C4p3S7": (2, 4, 3, (7,)),
    "N2C32p4S63": (2, 32, 4, (9, 7)),
    "N1C3p5S65": (1, 3, 5, (13, 5)),
    "N2C5p8S30": (2, 5, 8, (2, 3, 5)),
    "N3C4p16S49": (3, 4, 16, (7, 7)),
    "N2C3p32S49": (2, 3, 32, (7, 7)),
    "N2C2p33S33": (2, 2, 33, (3, 11)),
    "N2C2p8S257": (2, 2, 8, (257, 1)),
    "N1C2p4S1025": (1, 2, 4, (41, 25)),
    "N2C3p4S3136": (2, 3, 4, (56, 56)),
}
EMPTY: dict[str, tuple[int, int, int, tuple[int, ...]]] = {"N0C3p5S6": (0, 3, 5, (2, 3)), "N0C2p4S1": (0, 2, 4, (1,))}
# More concepts than a GPU has multiprocessors, which other kernels evaluate than few. Of the GPU tests alone.
MANY: dict[str, tuple[int, int, int, tuple[int, ...]]] = {"N9C32p2S7": (9, 32, 2, (7, 1))}

# Strides of a map. "gap" leaves room between the elements of a row: neither format holds, and neither can be viewed.
LAYOUTS = (
    "contiguous",
    "channels_last",
    "sliced_batch",
    "sliced_channels",
    "sliced_channels_last",
    "gap",
    "permuted",
    "expanded",
)
GRAD_LAYOUTS = ("contiguous", "channels_last", "expanded", "sliced_channels", "permuted")


class Choices(NamedTuple):
    """What the factors that all ops share may be."""

    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    grad_layouts: tuple[str, ...]
    sizes: tuple[str, ...]


EVERYTHING = Choices(tuple(DTYPES), LAYOUTS, GRAD_LAYOUTS, tuple(SIZES))
# Triton's interpreter takes milliseconds for what one block of a GPU does, whatever the block's size. Its tiles are
# small where maps are small, so that loops and tails are run there, and larger where they are large (configs.json).
# Other strides are run by test_layouts.py.
INTERPRETED = Choices(
    tuple(GPU_DTYPES),
    ("contiguous", "channels_last", "sliced_channels"),
    ("contiguous", "channels_last", "permuted"),
    tuple(SIZES),
)
SMALL = "N2C4p3S7"


@dataclass(frozen=True)
class Case:
    """One case; what an op doesn't have is None."""

    op: str
    sampler: str | None = None
    edges: str | None = None
    modulation: str | None = None
    affine: str | None = None
    norm: str | None = None  # the first batch norm's statistics: batch, given, none
    state: str | None = None  # the states' batch norm's statistics: batch, given
    attention: str | None = None  # concept_sample returns it: "with", "without"
    dtype: str = "f32"
    parameters: str | None = None  # "f32" where they are float32 beside bfloat16 or float16 features
    layout: str | None = "contiguous"
    grad_layout: str | None = None
    offset: str | None = None  # "offset": the map's mean is far from zero
    size: str = "N2C4p3S7"

    @property
    def id(self) -> str:
        short = {"state": "state_", "grad_layout": "grad_", "parameters": "parameters_"}
        parts = []
        for name in (f.name for f in fields(self)):
            choice = getattr(self, name)
            if choice is not None:
                parts.append(short.get(name, "") + choice.removeprefix("concept_").removeprefix("vcr_"))
        return "-".join(parts)

    @property
    def shape(self) -> tuple[int, int, int, tuple[int, ...]]:
        """N, C, p, spatial."""
        return (SIZES | EMPTY | MANY)[self.size]

    @property
    def feature_dtype(self) -> torch.dtype:
        return GPU_DTYPES[self.dtype]

    @property
    def parameter_dtype(self) -> torch.dtype:
        return GPU_DTYPES[self.parameters or self.dtype]

    @property
    def small_dtype(self) -> torch.dtype:
        """The accumulation type, that of states and statistics."""
        return torch.float64 if self.dtype == "f64" else torch.float32

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)


def legal(case: Case) -> bool:
    """False for the combinations that don't exist."""
    n, concepts, _, spatial = case.shape
    if case.modulation == "pixel" and case.sampler == "pool":
        return False
    if case.attention == "with" and case.sampler == "pool":
        return False
    if case.parameters is not None and case.dtype not in LOW_PRECISION:
        return False
    if case.layout == "expanded" and n == 1:
        return False
    # With one value per channel, batch statistics are an error.
    if case.norm == "batch" and n * math.prod(spatial) == 1:
        return False
    return not (case.state == "batch" and n * concepts == 1)


def pairwise(
    op: str, factors: dict[str, Iterable[Any]], extra: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Few legal cases in which every legal pair of two factors' choices occurs; always the same ones."""
    names = list(factors)
    choices = {name: list(factors[name]) for name in names}
    rng = random.Random(op)

    def allowed(case: Case) -> bool:
        return legal(case) and extra(case)

    def complete(fixed: dict[str, Any]) -> Case | None:
        """Fill in the free factors, most new pairs first; None where ``fixed`` turned out impossible."""
        best, most = None, -1
        for attempt in range(2000):
            greedy = attempt < 12
            picks = dict(fixed)
            for name in rng.sample(names, len(names)):
                if name not in picks:
                    order = rng.sample(choices[name], len(choices[name]))
                    picks[name] = max(order, key=lambda c: new_pairs(name, c, picks)) if greedy else order[0]
            case = Case(op, **picks)
            if allowed(case):
                score = len(pairs(picks) & wanted)
                if score > most:
                    best, most = case, score
            if best is not None and attempt >= 11:
                break
        return best

    def new_pairs(name: str, choice: Any, picks: dict[str, Any]) -> int:
        return sum(pair(name, choice, other, picks[other]) in wanted for other in picks)

    def pair(a: str, x: Any, b: str, y: Any) -> tuple:
        return (a, x, b, y) if names.index(a) < names.index(b) else (b, y, a, x)

    def pairs(picks: dict[str, Any]) -> set[tuple]:
        return {(a, picks[a], b, picks[b]) for a, b in itertools.combinations(names, 2)}

    wanted = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in choices[a] for y in choices[b]}
    cases = []
    while wanted:
        a, x, b, y = min(wanted, key=str)
        case = complete({a: x, b: y})
        if case is None:
            wanted.discard((a, x, b, y))
            continue
        cases.append(case)
        wanted -= pairs({name: getattr(case, name) for name in names})
    return cases


def arrange(x: Tensor, layout: str) -> Tensor:
    """A tensor with the values of ``x`` (N, C*p, *spatial) and the strides that ``layout`` names.

    "expanded" has one image's values for all images: they must be equal already (see ``same_images``).
    """
    x = x.contiguous()
    n, channels, *spatial = x.shape
    if layout == "contiguous":
        return x.clone()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced_batch":
        wide = x.new_full((2 * n + 1, channels, *spatial), float("nan"))
        view = wide[1::2]
    elif layout == "sliced_channels":
        wide = x.new_full((n, channels + 5, *spatial), float("nan"))
        view = wide[:, 3 : 3 + channels]
    elif layout == "sliced_channels_last":
        wide = x.new_full((n, *spatial, channels + 5), float("nan"))
        view = wide[..., 3 : 3 + channels].movedim(-1, 1)
    elif layout == "gap":
        wide = x.new_full((n, channels, *spatial[:-1], 2 * spatial[-1] + 1), float("nan"))
        view = wide[..., 1::2]
    elif layout == "permuted":
        order = [*range(x.dim() - 1, 0, -1), 0]  # innermost: images, then channels, then positions in reverse
        wide = x.new_empty([x.shape[d] for d in order])
        view = wide.permute([order.index(d) for d in range(x.dim())])
    elif layout == "expanded":
        return x[:1].clone().expand_as(x)
    else:
        raise ValueError(layout)
    view.copy_(x)
    return view


def same_images(x: Tensor) -> Tensor:
    """``x`` with the first image's values in every image."""
    return x[:1].expand_as(x).clone()
