"""Residual blocks: the plain ResNeXt bottleneck, and the one with visual concept reasoning (paper, Figure 1)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .concept_modulate import ConceptModulator
from .concept_reason import ConceptReasoner
from .concept_sample import ConceptSampler
from .middle import attend_interact_modulate
from .variants import BATCH_NORMS, CONVOLUTIONS, check_variants


class Bottleneck(nn.Module):
    """Split, transform, merge: Y = X + merge(transform(split(X))). Names and leading arguments as torchvision's.

    Args:
        inplanes: input channels.  planes: output channels / 4.  stride: of the grouped 3x3 convolution.
        downsample: the shortcut; None makes a projection where the shape changes.
        groups: C.  base_width: p = int(planes * base_width / 64).  norm_layer: default nn.BatchNorm for ``ndim``.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 32,
        base_width: int = 4,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[ndim], norm_layer or BATCH_NORMS[ndim]
        width = int(planes * base_width / 64) * groups
        outplanes = planes * self.expansion
        self.conv1 = conv(inplanes, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, outplanes, 1, bias=False)
        self.bn3 = norm(outplanes)
        if downsample is None and (stride != 1 or inplanes != outplanes):
            downsample = nn.Sequential(conv(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))
        self.downsample = downsample

    def middle(self, z: Tensor) -> Tensor:
        """What stands between the transform's norm and the merge."""
        return F.relu(z, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # split
        z = self.bn2(self.conv2(x))  # transform
        x = self.bn3(self.conv3(self.middle(z)))  # merge
        x += shortcut
        return F.relu(x, inplace=True)


class VCRBlock(Bottleneck):
    """Split, transform, attend, interact, modulate, merge. The keywords are the paper's variants."""

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 32,
        base_width: int = 4,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        sampler: str = "dynamic",
        edges: str = "dynamic",
        modulation: str = "channel",
        affine: str = "both",
        ndim: int = 2,
        zero_init: bool = False,
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width, dilation, norm_layer, ndim=ndim)
        check_variants(sampler, edges, modulation, affine)
        width = int(planes * base_width / 64) * groups
        self.modulation = modulation
        self.sampler = ConceptSampler(width, groups, sampler=sampler)
        self.reasoner = ConceptReasoner(width, groups, edges=edges)
        self.modulator = ConceptModulator(width, groups, affine=affine, zero_init=zero_init)

    def middle(self, z: Tensor) -> Tensor:
        return attend_interact_modulate(z, self.sampler, self.reasoner, self.modulator, self.modulation)
