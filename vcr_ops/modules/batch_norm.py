"""Batch norm modules whose work a fused op does: which ones it may take over, their statistics, and their update."""

import threading
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_batch

BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DIMS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


class _Updates(threading.local):
    off = 0


_updates = _Updates()


class no_running_stats_update(ContextDecorator):
    """Context manager, may be entered again: this package's modules leave running statistics alone in this thread.

    Activation checkpointing runs a block's forward twice and so moves its statistics twice. To move them once::

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), no_running_stats_update()))

    Norm modules that run by themselves (bn1, bn3, downsample.1, GroupNorm, ...) are PyTorch's own, and not affected.
    """

    def __enter__(self) -> None:
        _updates.off += 1

    def __exit__(self, *_: object) -> None:
        _updates.off -= 1


def updates_running_stats() -> bool:
    """False within :class:`no_running_stats_update`."""
    return _updates.off == 0


def is_plain(module: nn.Module) -> bool:
    """True where calling ``module`` does nothing but its class's forward: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_batch_norm(module: nn.Module) -> bool:
    """True for exactly nn.BatchNorm1d, 2d or 3d (a subclass, as SyncBatchNorm, may do more) without hooks."""
    return type(module) in _DIMS and is_plain(module)


def check_dims(argument: str, y: Tensor, bn: nn.Module) -> None:
    """ValueError where nn.BatchNorm would refuse the number of dims."""
    dims = _DIMS[type(bn)]
    if y.dim() not in dims:
        raise ValueError(
            f"{argument} has {y.dim()} dims; its batch norm is a {type(bn).__name__}, which takes {dims[-1]}"
        )


def uses_batch_statistics(bn: nn.Module) -> bool:
    """True where the module normalises with the statistics of the batch: training, or no running ones."""
    buffers = bn._buffers
    return bn.training or (buffers["running_mean"] is None and buffers["running_var"] is None)


def check_rows(argument: str, count: int, what: str, bn: nn.Module) -> None:
    """ValueError where the module would take a batch's variance over one value."""
    if count == 1 and uses_batch_statistics(bn):
        check_batch(argument, count, what)


def update_running_stats(bn: nn.Module, mean: Tensor, var: Tensor, empty: bool) -> None:
    """What nn.BatchNorm's training forward does to its buffers. mean and var (unbiased) are the batch's.

    empty: the batch has no images, so it counts but moves nothing.
    """
    if not (bn.training and bn.track_running_stats and _updates.off == 0):
        return
    buffers = bn._buffers
    tracked = buffers["num_batches_tracked"]
    momentum: Any = bn.momentum
    if tracked is not None:
        tracked.add_(1)
        if momentum is None:
            momentum = 1 / tracked
    elif momentum is None:
        momentum = 0.0
    if empty:
        return
    for running, batch in ((buffers["running_mean"], mean), (buffers["running_var"], var)):
        if running is None:
            continue
        weight = momentum.to(batch.dtype) if isinstance(momentum, Tensor) else momentum
        if running.dtype is batch.dtype:
            running.lerp_(batch, weight)
        else:
            running.copy_(torch.lerp(running.to(batch.dtype), batch, weight))
