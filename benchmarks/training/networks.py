"""The network of a run, as it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import python_ref
import vcr_ops

from ..systems import compose
from .settings import Settings


def build(settings: Settings, classes: int) -> nn.Module:
    """The same initial weights for a seed, also between vcr and vcr-reference."""
    torch.manual_seed(settings.seed)
    layers, sizes = settings.layers, dict[str, Any](groups=settings.groups, base_width=settings.base_width)
    if settings.system in ("vcr", "vcr-reference"):
        network: nn.Module = vcr_ops.VCRNet(
            layers, classes, groups=settings.groups, width_per_group=settings.base_width
        )
        if settings.system == "vcr":
            return network
        reference = python_ref.ResNet(python_ref.VCRBlock, layers, classes, **sizes)
        reference.load_state_dict(network.state_dict())
        return reference
    system = "resnext" if settings.system == "vcr-converted" else settings.system
    last = {stage: (layers[stage - 1],) for stage in (2, 3)}  # as GloRe's paper: the second and the third stage
    return compose(system, layers, last, classes, **sizes)
