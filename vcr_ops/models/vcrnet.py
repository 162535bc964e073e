"""VCRNet: ResNeXt with visual concept reasoning in every block (paper, Table 1)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..modules.batch_norm import CONVOLUTIONS
from ..modules.block import VCRBlock
from ..modules.middle import default_norm

_MAX_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN_POOLS: dict[int, type[nn.Module]] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class VCRNet(nn.Module):
    """Stem, four stages of VCRBlocks, average pool and classifier, with torchvision's names and conventions.

    Args:
        layers: blocks of each stage. num_classes: width of ``fc``.
        zero_init_residual: start every bn3 with weight 0, so that blocks start as their shortcut.
        groups: C. width_per_group: p of the first stage.
        replace_stride_with_dilation: for stages 2 to 4, dilate instead of stride.
        norm_layer: makes every norm from a number of channels; default nn.BatchNorm for ``ndim``.
        ndim: 2 for images (N, 3, H, W), 3 for video (N, 3, T, H, W).
        options: VCRBlock's sampler, edges, modulation, affine, zero_init, backend.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 32,
        width_per_group: int = 4,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        ndim: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.check_count("num_classes", num_classes)
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation is {dilate!r}; it takes None or three booleans")
        norm = norm_layer or default_norm(ndim)
        default_norm(ndim)
        self.conv1 = CONVOLUTIONS[ndim](3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = _MAX_POOLS[ndim](3, 2, 1)
        inplanes, dilation = 64, 1
        for stage, (planes, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            stride = 1 if stage == 0 else 2
            first_dilation = dilation
            if stage > 0 and dilate[stage - 1]:
                dilation, stride = dilation * stride, 1
            blocks = []
            for index in range(count):
                blocks.append(
                    VCRBlock(
                        inplanes,
                        planes,
                        stride if index == 0 else 1,
                        groups=groups,
                        base_width=width_per_group,
                        dilation=first_dilation if index == 0 else dilation,
                        norm_layer=norm_layer,
                        ndim=ndim,
                        **options,
                    )
                )
                inplanes = planes * VCRBlock.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = _MEAN_POOLS[ndim](1)
        self.fc = nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, VCRBlock):
                weight = module.bn3.weight
                if isinstance(weight, Tensor):
                    nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, *spatial) to logits (N, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def vcrnet50(num_classes: int = 1000, **options: Any) -> VCRNet:
    """VCRNet-50, 25.26 M parameters. options: VCRNet's arguments and VCRBlock's keywords."""
    return VCRNet((3, 4, 6, 3), num_classes, **options)


def vcrnet101(num_classes: int = 1000, **options: Any) -> VCRNet:
    """VCRNet-101, 44.60 M parameters. options: VCRNet's arguments and VCRBlock's keywords."""
    return VCRNet((3, 4, 23, 3), num_classes, **options)
