"""The names of the variants, and the few checks that the reference makes."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SAMPLERS = ("dynamic", "static", "pool")
EDGES = ("dynamic", "static", "none")
MODULATIONS = ("channel", "pixel")
AFFINES = ("both", "scale", "shift")

BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def check_name(argument: str, name: str, names: tuple[str, ...]) -> None:
    """Raise ValueError unless ``name`` is one of ``names``."""
    if name not in names:
        raise ValueError(f"{argument} is {name!r}; it takes one of {', '.join(map(repr, names))}")


def check_variants(sampler: str, edges: str, modulation: str, affine: str) -> None:
    """Raise ValueError for an unknown name, or for pixel modulation without an attention map."""
    check_name("sampler", sampler, SAMPLERS)
    check_name("edges", edges, EDGES)
    check_name("modulation", modulation, MODULATIONS)
    check_name("affine", affine, AFFINES)
    if modulation == "pixel" and sampler == "pool":
        raise ValueError("modulation='pixel' needs an attention map, which sampler='pool' does not have")


def state_width(p: int) -> int:
    """p̃ for p channels per concept: ``max``, where the paper prints ``min``, which misses its own parameter counts."""
    return max(p // 4, 4)


def uniform_projection(*shape: int, fan_in: int) -> nn.Parameter:
    """A projection drawn from U(-1/√fan_in, 1/√fan_in): what nn.Linear and nn.Conv2d do."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


def as_type(parameter: Tensor, like: Tensor) -> Tensor:
    """``parameter`` in the features' type: parameters may be float32 beside bfloat16 features."""
    return parameter.to(like.dtype)
