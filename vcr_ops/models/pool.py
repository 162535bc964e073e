"""Pooling a map to one vector, in the ways that timm names."""

import torch
from torch import Tensor, nn

from .. import checks

POOLS = ("avg", "max", "avgmax", "catavgmax", "")
_MEANS: dict[int, type[nn.Module]] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_MAXIMA: dict[int, type[nn.Module]] = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}


class MeanAndMax(nn.Module):
    """Both pools of a map: their average, or one behind the other along the channels."""

    def __init__(self, ndim: int, joined: bool) -> None:
        super().__init__()
        one = (1,) * ndim
        self.mean, self.max, self.joined = _MEANS[ndim](one), _MAXIMA[ndim](one), joined

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, *spatial) to (N, C, 1, ...), or (N, 2 C, 1, ...) where joined."""
        mean, top = self.mean(x), self.max(x)
        return torch.cat((mean, top), 1) if self.joined else 0.5 * (mean + top)


def global_pool(kind: str, ndim: int) -> nn.Module:
    """The module of one of POOLS; "" is no pool.

    Raises:
        ValueError: an unknown name.
    """
    checks.check_name("global_pool", kind, POOLS)
    if kind == "avg":
        return _MEANS[ndim]((1,) * ndim)
    if kind == "max":
        return _MAXIMA[ndim]((1,) * ndim)
    return MeanAndMax(ndim, kind == "catavgmax") if kind else nn.Identity()
