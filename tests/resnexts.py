"""ResNeXts with the structure, names and conventions of torchvision's and of timm's, small enough for tests."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.small import enliven

PLANES, GROUPS, WIDTH = (4, 8), 3, 80  # per concept 5 and 10 channels


class Bottleneck(nn.Module):
    """As torchvision's."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, groups: int) -> None:
        super().__init__()
        width, outplanes = int(planes * WIDTH / 64) * groups, planes * 4
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += shortcut
        return self.relu(x)


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class TimmBottleneck(nn.Module):
    """As timm's, which keeps a place for everything."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, groups: int) -> None:
        super().__init__()
        width, outplanes = int(planes * WIDTH / 64) * groups, planes * 4
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_block: nn.Module = nn.Identity()
        self.act2: nn.Module = nn.ReLU(inplace=True)
        self.aa: nn.Module = nn.Identity()
        self.conv3 = nn.Conv2d(width, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.se: nn.Module | None = None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride
        self.drop_path: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        x = self.bn3(self.conv3(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)

    def zero_init_last(self) -> None:
        nn.init.zeros_(self.bn3.weight)


class ResNet(nn.Module):
    """A stem, two stages of ``blocks`` blocks, and a classifier; ``layout`` is "torchvision" or "timm"."""

    def __init__(self, layout: str, groups: int = GROUPS, blocks: int = 2) -> None:
        super().__init__()
        timm = layout == "timm"
        block: Any = TimmBottleneck if timm else Bottleneck
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.activation = "act1" if timm else "relu"
        self.add_module(self.activation, nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inplanes = 8
        for stage, planes in enumerate(PLANES):
            layer = []
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                down: nn.Module | None = None
                if not index:
                    convs = [nn.Conv2d(inplanes, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)]
                    if timm and stride == 2:  # as its "d" networks
                        convs = [nn.AvgPool2d(2, 2), nn.Conv2d(inplanes, planes * 4, 1, bias=False), convs[1]]
                    down = nn.Sequential(*convs)
                layer.append(block(inplanes, planes, stride, down, groups))
                inplanes = planes * 4
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.fc = nn.Linear(inplanes, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(getattr(self, self.activation)(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


LAYOUTS = ("torchvision", "timm")


def resnet(layout: str, dtype: torch.dtype = torch.float32, **options: int) -> Any:
    """With lively weights and statistics."""
    torch.manual_seed(0)
    return enliven(ResNet(layout, **options)).to(dtype)


class Part(nn.Sequential):
    """Convolution, norm and perhaps activation."""

    def __init__(self, inplanes: int, planes: int, kernel: int, groups: int = 1, act: bool = True) -> None:
        conv = nn.Conv2d(inplanes, planes, kernel, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(planes), *([nn.ReLU()] if act else []))


class OtherBottleneck(nn.Module):
    """Of other names, nested as RegNet's, with a functional ReLU and nothing in place."""

    def __init__(self, planes: int, groups: int) -> None:
        super().__init__()
        self.f = nn.Sequential()
        self.f.add_module("a", Part(planes, 12, 1))
        self.f.add_module("b", Part(12, 12, 3, groups))
        self.f.add_module("c", Part(12, planes, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.f(x))


OTHER_PARTS = {
    "conv1": "f.a.0",
    "bn1": "f.a.1",
    "act1": "f.a.2",
    "conv2": "f.b.0",
    "bn2": "f.b.1",
    "act2": "f.b.2",
    "conv3": "f.c.0",
    "bn3": "f.c.1",
}


def other_adapter(module: nn.Module) -> dict[str, str] | None:
    return OTHER_PARTS if isinstance(module, OtherBottleneck) else None


def other_net() -> Any:
    torch.manual_seed(0)
    return enliven(nn.Sequential(nn.Conv2d(3, 8, 3, 2), OtherBottleneck(8, 3), OtherBottleneck(8, 4)))
