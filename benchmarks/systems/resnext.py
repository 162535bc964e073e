"""ResNeXt with each of the systems: the same stem, blocks and classifier, and one thing added."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import python_ref
import vcr_ops

from .cbam import CBAM
from .gc import GC
from .glore import PLACES, GloRe
from .se import SE

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
# Systems of every block, on what its last batch norm puts out, before the shortcut is added.
ON_MERGE: dict[str, Callable[..., nn.Module]] = {"se": SE, "cbam": CBAM, "gc": GC}
SYSTEMS = ("resnext", "se", "cbam", "gc", "glore", "vcr")


class Block(python_ref.Bottleneck):
    """The ResNeXt block with room for a system: ``on_merge`` before the shortcut is added, ``after`` behind it all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.on_merge: nn.Module | None = None
        self.after: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn3(self.conv3(self.middle(self.bn2(self.conv2(x)))))
        if self.on_merge is not None:
            x = self.on_merge(x)
        x += shortcut
        x = F.relu(x, inplace=True)
        return x if self.after is None else self.after(x)


def compose(
    system: str,
    layers: tuple[int, int, int, int],
    places: Mapping[int, Sequence[int]],
    num_classes: int,
    *,
    ndim: int = 2,
    **options: Any,
) -> nn.Module:
    """ResNeXt with ``layers`` blocks in its stages, and one of SYSTEMS but "vcr".

    places: the blocks of a stage, from 1, that GloRe follows. options: groups and base_width.
    """
    if system == "resnext":
        return python_ref.ResNet(python_ref.Bottleneck, layers, num_classes, ndim=ndim, **options)
    made = python_ref.ResNet(Block, layers, num_classes, ndim=ndim, **options)
    for stage in (1, 2, 3, 4):
        blocks = getattr(made, f"layer{stage}")
        channels = blocks[0].bn3.num_features
        if system == "glore":
            for place in places.get(stage, ()):
                blocks[place - 1].after = GloRe(channels, ndim=ndim)
        else:
            for block in blocks:
                block.on_merge = ON_MERGE[system](channels, ndim=ndim)
    return made


def network(system: str, depth: int = 50, num_classes: int = 1000, *, ndim: int = 2, **options: Any) -> nn.Module:
    """ResNeXt 32x4d of 50 or 101 layers with one of SYSTEMS. options: VCRBlock's keywords, for "vcr" alone.

    Raises:
        ValueError: no such system or depth, or options for another than "vcr".
    """
    if system not in SYSTEMS:
        raise ValueError(f"system is {system!r}, expected one of {', '.join(SYSTEMS)}")
    if depth not in LAYERS:
        raise ValueError(f"depth is {depth}, expected one of {', '.join(map(str, LAYERS))}")
    if system == "vcr":
        build = {50: vcr_ops.vcrnet50, 101: vcr_ops.vcrnet101}[depth]
        return build(num_classes, ndim=ndim, **options)
    if options:
        raise ValueError(f"{system} takes no options, got {', '.join(options)}")
    return compose(system, LAYERS[depth], PLACES[depth], num_classes, ndim=ndim)
