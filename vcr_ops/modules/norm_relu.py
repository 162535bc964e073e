"""Batch norm, shortcut and ReLU around a block's middle: on CPUs one op, where nobody could tell."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import case_of, resolve
from ..ops.dispatch import needs_grad
from ..ops.norm_relu.op import NO_NORM, NormConstants, batch_norm_relu, norm_relu, norm_relu_
from .batch_norm import (
    BATCH_NORM_CLASSES,
    CONVOLUTIONS,
    SYNCHRONISED,
    are_plain,
    has_global_hook,
    is_plain_batch_norm,
    learned,
    uses_batch_statistics,
)
from .drop_path import DropPath
from .running_stats import update_running_stats

_CONVOLUTIONS = tuple(CONVOLUTIONS.values())
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def run_norm_relu(
    y: Tensor,
    bn: Any,
    relu: Any,
    backend: str | None,
    shortcut: Tensor | None = None,
    shortcut_bn: Any = None,
    *,
    source: nn.Module | None = None,
    in_place: bool = True,
) -> Tensor:
    """relu(bn(y) + shortcut_bn(shortcut)); y (N, channels, *spatial), and what is None is left out.

    relu: a module or torch.relu. source: the module whose output y is, and nothing else's; where that is a convolution
    of PyTorch's, and no gradient is wanted, y is overwritten. in_place: bn(y) may be overwritten.

    One op where calling the modules would do the same to rounding: with the batch's statistics (then shortcut_bn is
    called), and with given ones where no gradient is wanted. Elsewhere, and under a compiler, which fuses them itself,
    the modules are called.
    """
    if _may_fuse(y, relu, shortcut):
        out = _fused(y, bn, backend, shortcut, shortcut_bn, source)
        if out is not None:
            return out
    out = y if bn is None else bn(y)
    if shortcut is not None:
        other = shortcut if shortcut_bn is None else shortcut_bn(shortcut)
        if in_place:
            out += other
        else:
            out = out + other
    return out if relu is None else relu(out)


def run_shortcut(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """A block's shortcut, and the norm that is still to be done to it: the last of a projection, where it can wait."""
    if module is None:
        return x, None
    if type(module) is nn.Sequential and len(module) == 2 and are_plain(module) and not has_global_hook():
        convolution, bn = module
        if is_plain_batch_norm(bn) and not uses_batch_statistics(bn):
            return convolution(x), bn
    return module(x), None


def run_drops(y: Tensor, bn: Any, drops: Iterable[Any]) -> tuple[Tensor, Any]:
    """Dropout and stochastic depth (or None) after bn(y), and the norm that is still to be done: bn, without drops."""
    drops = [drop for drop in drops if drop is not None and not _is_identity(drop)]
    if not drops:
        return y, bn
    if bn is not None:
        y = bn(y)
    for drop in drops:
        y = drop(y)
    return y, None


def _is_identity(drop: Any) -> bool:
    return not drop.training and type(drop) in (nn.Dropout, DropPath) and are_plain(drop) and not has_global_hook()


def _may_fuse(y: Tensor, relu: Any, shortcut: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y.is_cpu:
        return False
    if y.dtype not in _DTYPES or y.dim() < 3 or has_global_hook():
        return False
    if relu is not torch.relu and (type(relu) is not nn.ReLU or not are_plain(relu)):
        return False
    if shortcut is None:
        return True
    return type(shortcut) is Tensor and shortcut.is_cpu and shortcut.dtype == y.dtype and shortcut.shape == y.shape


def _fused(
    y: Tensor, bn: Any, backend: str | None, shortcut: Tensor | None, shortcut_bn: Any, source: nn.Module | None
) -> Tensor | None:
    """The one op's result; None where the modules must be called."""
    norm, other = _constants(bn, y), _constants(shortcut_bn, y)
    if norm is None or other is None:
        return None
    if norm.mean is None and norm is not NO_NORM:  # the batch's statistics
        if shortcut_bn is not None or y.numel() <= y.shape[1] or resolve(backend, case_of(y)).name != "cpp":
            return None
        out, mean, var = batch_norm_relu(y, norm.weight, norm.bias, norm.eps, shortcut)
        update_running_stats([(bn, mean, var)], False)
        return out
    if needs_grad(y, shortcut, norm.weight, norm.bias, other.weight, other.bias):
        return None
    if resolve(backend, case_of(y)).name != "cpp":
        return None
    run = norm_relu_ if source is not None and _is_fresh(y, source) else norm_relu
    return run(y, norm, shortcut, other)


def _is_fresh(y: Tensor, source: nn.Module) -> bool:
    """True where nobody but the caller can have seen y, its convolution's output."""
    if type(source) not in _CONVOLUTIONS or not are_plain(source) or torch._C._len_torch_dispatch_stack():
        return False
    return y.is_contiguous() or (y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last))


def _constants(bn: Any, y: Tensor) -> NormConstants | None:
    """What a norm normalises with; without mean and var where these are the batch's; None where it has to be called."""
    if bn is None or type(bn) is nn.Identity:
        return NO_NORM if bn is None or are_plain(bn) else None
    if not is_plain_batch_norm(bn):
        return None
    batch = uses_batch_statistics(bn)
    shape, dtype, buffers = y.shape, y.dtype, bn._buffers
    mean, var = (None, None) if batch else (buffers["running_mean"], buffers["running_var"])
    dims = BATCH_NORM_CLASSES.get(type(bn), ())
    if dims and len(shape) not in dims:
        return None
    if (type(bn) in SYNCHRONISED or bn.num_features != shape[1]) if batch else (mean is None or var is None):
        return None
    found = NormConstants(mean, var, *learned(bn), bn.eps)
    size = shape[1:2]
    for tensor in found[:4]:
        if tensor is not None and not (
            tensor.is_cpu and ((kind := tensor.dtype) is dtype or kind is torch.float32) and tensor.shape == size
        ):
            return None
    return found
