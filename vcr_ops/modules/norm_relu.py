"""Batch norm, shortcut and ReLU around a block's middle: in evaluation on CPUs one op, where nobody could tell."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import case_of, resolve
from ..ops.dispatch import needs_grad
from ..ops.norm_relu.op import NO_NORM, NormConstants, norm_relu
from .batch_norm import BATCH_NORM_CLASSES, are_plain, has_global_hook, is_plain_batch_norm, uses_batch_statistics
from .drop_path import DropPath

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def run_norm_relu(
    y: Tensor,
    bn: Any,
    relu: Any,
    backend: str | None,
    shortcut: Tensor | None = None,
    shortcut_bn: Any = None,
    *,
    in_place: bool = True,
) -> Tensor:
    """relu(bn(y) + shortcut_bn(shortcut)); y (N, channels, *spatial), and what is None is left out.

    relu: a module or torch.relu. in_place: bn(y) may be overwritten. One op where the norms' statistics are known, no
    gradient is wanted and calling the modules would do the same to rounding; elsewhere (and under a compiler, which
    fuses them itself) the modules are called.
    """
    if _may_fuse(y, relu, shortcut):
        norm = NO_NORM if bn is None else _constants(bn, y)
        shortcut_norm = NO_NORM if shortcut_bn is None else _constants(shortcut_bn, y)
        if (
            norm is not None
            and shortcut_norm is not None
            and not needs_grad(y, shortcut, norm.weight, norm.bias, shortcut_norm.weight, shortcut_norm.bias)
            and resolve(backend, case_of(y)).name == "cpp"
        ):
            return norm_relu(y, norm, shortcut, shortcut_norm)
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


def _constants(bn: Any, y: Tensor) -> NormConstants | None:
    """What a norm normalises with, or None where it has to be called."""
    if type(bn) is nn.Identity:
        return NO_NORM if are_plain(bn) else None
    if not is_plain_batch_norm(bn) or uses_batch_statistics(bn):
        return None
    dims = BATCH_NORM_CLASSES.get(type(bn), ())
    found = NormConstants(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    if (dims and y.dim() not in dims) or found.mean is None or found.var is None:
        return None
    for tensor in found[:4]:
        if tensor is not None and not (
            tensor.is_cpu and tensor.dtype in (y.dtype, torch.float32) and tensor.shape == (y.shape[1],)
        ):
            return None
    return found
