"""The network that a checkpoint is of."""

import re
from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from ..models import VCRNet, load_resnext
from ..models.checkpoints import read_state_dict

_FIRST = "layer1.0."


def load_network(path: str | PathLike[str], modulation: str, backend: str) -> VCRNet:
    """A VCRNet with the weights of a file, in evaluation. Depth, widths and all variants but the modulation, which has
    no parameters of its own, are read off the shapes.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file is no VCRNet's checkpoint; says what is missing, unknown or of another shape.
    """
    state = read_state_dict(path)
    missing = [key for key in ("fc.weight", "conv1.weight", f"{_FIRST}sampler.value") if key not in state]
    if missing:
        raise ValueError(
            f"{path} is no VCRNet's checkpoint: it has no {missing[0]} (a ResNeXt's has no concepts to look at; "
            "convert and train it first)"
        )
    _check_dims(path, state)
    network = VCRNet(
        _depths(state),
        state["fc.weight"].shape[0],
        groups=state[f"{_FIRST}sampler.value"].shape[0],
        width_per_group=state[f"{_FIRST}sampler.value"].shape[1],
        ndim=state["conv1.weight"].dim() - 2,
        modulation=modulation,
        backend=backend,
        **_variant(state),
    )
    return load_resnext(network, state).eval()


def _check_dims(path: str | PathLike[str], state: Mapping[str, Any]) -> None:
    """ValueError where what is read off a shape can't be."""
    wanted = {"fc.weight": (2,), "conv1.weight": (3, 4, 5), f"{_FIRST}sampler.value": (3,)}
    wanted |= {key: (2,) for key in state if key.endswith(".reasoner.edge")}
    problems = []
    for key, dims in wanted.items():
        x = state[key]
        if not isinstance(x, Tensor):
            problems.append(f"{key} is a {type(x).__name__}, no tensor")
        elif x.dim() not in dims or 0 in x.shape:
            takes = " or ".join(map(str, dims))
            problems.append(f"{key} has shape {tuple(x.shape)}; a VCRNet's has {takes} dims, none of size 0")
    if problems:
        raise ValueError(f"{path} is no VCRNet's checkpoint: {'; '.join(problems)}")


def _depths(state: Mapping[str, Any]) -> tuple[int, ...]:
    found = (re.match(r"layer([1-4])\.(\d+)\.", key) for key in state)
    places = {(int(m[1]), int(m[2])) for m in found if m}
    return tuple(1 + max((index for s, index in places if s == stage), default=0) for stage in (1, 2, 3, 4))


def _variant(state: Mapping[str, Any]) -> dict[str, Any]:
    def has(name: str) -> bool:
        return f"{_FIRST}{name}" in state

    sampler = "dynamic" if has("sampler.query") else "static" if has("sampler.logit") else "pool"
    # (pt, C) or (C, C); one stage's pt may be C, but not every stage's
    shapes = [x.shape for key, x in state.items() if key.endswith(".reasoner.edge")]
    edges = "none" if not shapes else "static" if all(rows == columns for rows, columns in shapes) else "dynamic"
    scale, shift = has("modulator.scale_weight"), has("modulator.shift_weight")
    return dict(sampler=sampler, edges=edges, affine="both" if scale and shift else "scale" if scale else "shift")
