"""The input of blocks and networks: refused before anything is computed and before any running statistic moves."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from .batch_norm import sync_group, uses_batch_statistics
from .sync_batch_norm import SyncBatchNorm

Sizes = Sequence[int]
_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
# Positions of which a stride of two may leave one.
_FEW = 8
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def check_block(block: Any, x: Tensor, part: Callable[[str], Any]) -> None:
    """TypeError or ValueError unless a block takes x; ``part`` gives its modules by a VCRBlock's names, or None."""
    conv = part("conv1")
    if conv is None:
        conv = part("conv2")
    if not _is_one(checks.check_input("x", x, conv)):
        return
    stride = getattr(part("conv2"), "stride", None)
    few = max(_FEW, math.prod(stride)) if isinstance(stride, tuple) else _FEW
    if x.numel() <= few * conv.in_channels or _concepts(block) == 1:
        _follow_block(block, part, "", x.shape[2:], x)


def check_network(network: Any, x: Tensor, stages: Sequence[str]) -> None:
    """TypeError or ValueError unless a VCRNet takes x, of whose stages these are going to run."""
    conv1 = network._modules["conv1"]
    if not _is_one(checks.check_input("x", x, conv1)):
        return
    few = network.feature_info[-1]["reduction"] ** network.ndim
    modules = network._modules
    first = next(iter(modules["layer1"]._modules.values()), None)
    if x.numel() > few * conv1.in_channels and _concepts(first) != 1:
        return
    sizes = _after(conv1, x.shape[2:])
    _check_norm(network.bn1, "bn1", sizes, x)
    sizes = _after(network.maxpool, sizes)
    for stage in stages:
        blocks = modules[stage]
        if not isinstance(blocks, nn.Sequential):
            return
        for path, block in blocks.named_children():
            if sizes is None or "reasoner" not in block._modules:
                return
            part = getattr(block, "part", block._modules.get)
            sizes = _follow_block(block, part, f"{stage}.{path}.", sizes, x)


def _is_one(n: int | None) -> bool:
    # What compilers trace has no effects yet when batch norm refuses it, and sizes may be symbols.
    return n is not None and not torch.compiler.is_compiling() and n == 1


def _concepts(block: Any) -> int:
    return 0 if block is None else getattr(block._modules.get("sampler"), "concepts", 0)


def _follow_block(block: Any, part: Callable[[str], Any], prefix: str, sizes: Sizes, x: Tensor) -> Sizes | None:
    """The sizes that a block makes of an image's, None where nobody can tell; ValueError for one value per channel."""
    after: Sizes | None = sizes
    for index in (1, 2, 3):
        after = _after(part(f"conv{index}"), after)
        _check_norm(part(f"bn{index}"), f"{prefix}bn{index}", after, x)
    downsample = part("downsample")
    if type(downsample) is nn.Sequential and len(downsample):
        _check_norm(downsample[-1], f"{prefix}downsample.{len(downsample) - 1}", after, x)
    if _concepts(block) == 1 and _takes_a_batch(block._modules["reasoner"]._modules.get("bn")):
        checks.check_batch("x", 1, f"one image of C = 1 concept at {prefix}reasoner.bn, {tuple(x.shape)}")
    return after


def _after(module: Any, sizes: Sizes | None) -> Sizes | None:
    """Spatial sizes after a convolution or max pool; None where nobody can tell."""
    if sizes is None or module is None or type(module) is nn.Identity:
        return sizes
    convolves = getattr(type(module), "forward", None) in checks.CONVOLVE and not isinstance(module.padding, str)
    pools = type(module) in _POOLS and not module.ceil_mode
    if not (convolves or pools) or module._forward_hooks or "forward" in module.__dict__:
        return None
    count = len(sizes)
    steps = zip(
        sizes,
        *(_each(module, name, count) for name in ("kernel_size", "stride", "padding", "dilation")),
        strict=True,
    )
    return [(n + 2 * pad - dilation * (kernel - 1) - 1) // step + 1 for n, kernel, step, pad, dilation in steps]


def _each(module: Any, name: str, count: int) -> Sizes:
    found = getattr(module, name)
    return (found,) * count if isinstance(found, int) else found


def _check_norm(bn: Any, path: str, sizes: Sizes | None, x: Tensor) -> None:
    if sizes is not None and math.prod(sizes) == 1 and _takes_a_batch(bn):
        checks.check_batch("x", 1, f"N*S = 1 value per channel at {path}, {tuple(x.shape)}")


def _takes_a_batch(bn: Any) -> bool:
    """True for a batch norm that would take its statistics over what this process has."""
    if not isinstance(bn, _BatchNorm) or type(bn).forward not in _NORM_FORWARDS:
        return False
    return uses_batch_statistics(bn) and sync_group(bn) is None
