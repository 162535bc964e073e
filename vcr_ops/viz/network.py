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
    network = VCRNet(
        _depths(state),
        len(state["fc.weight"]),
        groups=state[f"{_FIRST}sampler.value"].shape[0],
        width_per_group=state[f"{_FIRST}sampler.value"].shape[1],
        ndim=state["conv1.weight"].dim() - 2,
        modulation=modulation,
        backend=backend,
        **_variant(state),
    )
    return load_resnext(network, state).eval()


def _depths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    found = (re.match(r"layer([1-4])\.(\d+)\.", key) for key in state)
    places = {(int(m[1]), int(m[2])) for m in found if m}
    return tuple(1 + max((index for s, index in places if s == stage), default=0) for stage in (1, 2, 3, 4))


def _variant(state: Mapping[str, Tensor]) -> dict[str, Any]:
    def has(name: str) -> bool:
        return f"{_FIRST}{name}" in state

    sampler = "dynamic" if has("sampler.query") else "static" if has("sampler.logit") else "pool"
    # (pt, C) or (C, C); one stage's pt may be C, but not every stage's
    shapes = [x.shape for key, x in state.items() if key.endswith(".reasoner.edge")]
    edges = "none" if not shapes else "static" if all(rows == columns for rows, columns in shapes) else "dynamic"
    scale, shift = has("modulator.scale_weight"), has("modulator.shift_weight")
    return dict(sampler=sampler, edges=edges, affine="both" if scale and shift else "scale" if scale else "shift")
