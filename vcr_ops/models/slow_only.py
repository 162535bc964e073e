"""Slow-only networks for video, as the paper uses for Kinetics-400 (Feichtenhofer, Fan, Malik, He: SlowFast; ICCV 2019,
Table 1, the slow pathway)."""

from typing import Any

from torch import nn

from .features import OutIndices
from .vcrnet import VCRNet, vcrnet50, vcrnet101


def make_slow_only(network: Any) -> Any:
    """Turn a network for video (``ndim=3``) of torchvision's names into the slow-only one, in place; returns it.

    Kernels see one frame, but for each block's first convolution in the last two stages: three (3 x 1 x 1). No stride
    in time. The new convolutions have new weights.
    """
    network.conv1 = _conv(network.conv1, (1, 7, 7))
    network.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage in (1, 2, 3, 4):
        for block in getattr(network, f"layer{stage}"):
            if stage > 2:
                block.conv1 = _conv(block.conv1, (3, 1, 1))
            block.conv2 = _conv(block.conv2, (1, 3, 3))
            if block.downsample is not None:
                block.downsample[0] = _conv(block.downsample[0], (1, 1, 1))
    return network


def _conv(old: nn.Conv3d, kernel: tuple[int, int, int]) -> nn.Conv3d:
    stride, dilation = old.stride[-1], old.dilation[-1]
    new = nn.Conv3d(
        old.in_channels,
        old.out_channels,
        kernel,
        (1, stride, stride),
        (kernel[0] // 2, dilation * (kernel[1] // 2), dilation * (kernel[2] // 2)),
        (1, dilation, dilation),
        groups=old.groups,
        bias=False,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new


def _check_ndim(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("ndim", 3) != 3:
        raise ValueError(f"ndim is {options['ndim']!r}; a slow-only network is for video, and takes 3")
    return {**options, "ndim": 3}


def vcrnet50_slow_only(
    num_classes: int = 400, *, features_only: bool = False, out_indices: OutIndices | None = None, **options: Any
) -> VCRNet:
    """The slow-only VCRNet-50 for video (N, 3, T, H, W), with the paper's Kinetics-400 classes; no stride in time.

    :func:`vcr_ops.load_inflated` gives it an image network's weights. The paper's authors follow SlowFast, which has
    ``drop_rate=0.5`` besides.

    Args:
        as :func:`vcr_ops.vcrnet50`'s.
    """
    given = _check_ndim(options)
    return make_slow_only(vcrnet50(num_classes, features_only=features_only, out_indices=out_indices, **given))


def vcrnet101_slow_only(
    num_classes: int = 400, *, features_only: bool = False, out_indices: OutIndices | None = None, **options: Any
) -> VCRNet:
    """The same of VCRNet-101. Arguments as :func:`vcrnet50_slow_only`'s."""
    given = _check_ndim(options)
    return make_slow_only(vcrnet101(num_classes, features_only=features_only, out_indices=out_indices, **given))
