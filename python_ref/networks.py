"""ResNeXt and VCRNet, 50 and 101 layers, 32x4d (paper, Table 1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import Bottleneck, VCRBlock
from .variants import BATCH_NORMS, CONVOLUTIONS


class ResNet(nn.Module):
    """Stem, four stages of blocks, average pool and classifier, with torchvision's names.

    Args:
        block: Bottleneck or VCRBlock.  layers: blocks per stage.  options: passed to every block.
    """

    def __init__(
        self,
        block: type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        *,
        groups: int = 32,
        base_width: int = 4,
        ndim: int = 2,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        conv, norm = CONVOLUTIONS[ndim], norm_layer or BATCH_NORMS[ndim]
        pool = {2: nn.MaxPool2d, 3: nn.MaxPool3d}[ndim]
        self.conv1 = conv(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = pool(3, 2, 1)
        self.layer1: nn.Module
        self.layer2: nn.Module
        self.layer3: nn.Module
        self.layer4: nn.Module
        inplanes = 64
        for stage, (planes, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            blocks: list[nn.Module] = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(
                    block(
                        inplanes,
                        planes,
                        stride,
                        groups=groups,
                        base_width=base_width,
                        norm_layer=norm_layer,
                        ndim=ndim,
                        **options,
                    )
                )
                inplanes = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[ndim](1)
        self.fc = nn.Linear(inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnext50(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNeXt-50 32x4d, 25.03 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, **options)


def resnext101(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNeXt-101 32x4d, 44.18 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, **options)


def vcrnet50(num_classes: int = 1000, **options: Any) -> ResNet:
    """VCRNet-50, 25.26 M parameters. options: VCRBlock's keywords."""
    return ResNet(VCRBlock, (3, 4, 6, 3), num_classes, **options)


def vcrnet101(num_classes: int = 1000, **options: Any) -> ResNet:
    """VCRNet-101, 44.60 M parameters. options: VCRBlock's keywords."""
    return ResNet(VCRBlock, (3, 4, 23, 3), num_classes, **options)
