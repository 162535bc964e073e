"""Slow-only networks for video, as the paper uses for Kinetics-400 (Feichtenhofer, Fan, Malik, He: SlowFast; ICCV
2019, Table 1, the slow pathway).
"""

from typing import Any

from torch import nn


def slow_only(network: Any) -> Any:
    """Turn a network for video (``ndim=3``) into the slow-only one, in place; returns it.

    Kernels see one frame, but for each block's first convolution in the last two stages: three (3 x 1 x 1). No stride
    in time. The new convolutions have new weights.
    """
    network.conv1 = _conv(network.conv1, (1, 7, 7), 2)
    network.maxpool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage in (1, 2, 3, 4):
        for block in getattr(network, f"layer{stage}"):
            stride = block.conv2.stride[-1]
            if stage > 2:
                block.conv1 = _conv(block.conv1, (3, 1, 1), 1)
            block.conv2 = _conv(block.conv2, (1, 3, 3), stride)
            if block.downsample is not None:
                block.downsample[0] = _conv(block.downsample[0], (1, 1, 1), stride)
    return network


def _conv(old: nn.Conv3d, kernel: tuple[int, int, int], stride: int) -> nn.Conv3d:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    new = nn.Conv3d(
        old.in_channels,
        old.out_channels,
        kernel,
        (1, stride, stride),
        padding,
        groups=old.groups,
        bias=False,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return new
