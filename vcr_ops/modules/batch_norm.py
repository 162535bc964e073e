"""Batch norm modules whose work a fused op does: which ones it may take over, their statistics, and their update."""

import threading
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from ..backend import tracing
from ..collectives import Group, group_of

BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# The classes that can be fused, and the numbers of dims that they take (any, where there are none).
BATCH_NORM_CLASSES: dict[type, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (),
}


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


def has_global_hook() -> bool:
    """True where a hook on all modules might look at, or change, what a module gives."""
    if not torch_module._has_any_global_hook():
        return False
    # ModuleTracker only keeps the names of the modules that run, for torch's FLOP counter among others.
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for hooks in (
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
            torch_module._global_backward_hooks,
            torch_module._global_backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def are_plain(*modules: nn.Module) -> bool:
    """True where calling the modules does nothing but their classes' forward: no hooks, no forward of their own."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return True


def is_plain_batch_norm(module: nn.Module | None) -> bool:
    """True for exactly nn.BatchNorm1d, 2d, 3d or nn.SyncBatchNorm (a subclass may do more) without hooks."""
    return module is not None and type(module) in BATCH_NORM_CLASSES and are_plain(module)


def check_dims(argument: str, y: Tensor, bn: nn.Module) -> None:
    """ValueError where nn.BatchNorm would refuse the number of dims."""
    dims = BATCH_NORM_CLASSES[type(bn)]
    if dims and y.dim() not in dims:
        raise ValueError(
            f"{argument} has {y.dim()} dims; its batch norm is a {type(bn).__name__}, which takes {dims[-1]}"
        )


def uses_batch_statistics(bn: nn.Module) -> bool:
    """True where the module normalises with the statistics of the batch: training, or no running ones."""
    return bn.training or (bn._buffers["running_mean"] is None and bn._buffers["running_var"] is None)


def sync_group(bn: Any) -> Group | None:
    """The processes over which an nn.SyncBatchNorm takes its statistics now: in training alone, as its own forward."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return None
    return group_of(bn.process_group)


def update_running_stats(updates: list[tuple[Any, Tensor, Tensor]], empty: bool) -> None:
    """What nn.BatchNorm's training forward does to its buffers, for several modules in few calls.

    Args:
        updates: (module, batch's mean, batch's unbiased variance); modules that keep no statistics now are passed over.
        empty: the batch has no images, so it counts but moves nothing.
    """
    if _updates.off:
        return
    moves: list[tuple[Any, Tensor | None, Tensor, Tensor]] = []  # momentum, counter, running, batch
    counters, running, batch = [], [], []
    together = tracing() != "torch.func"  # which has no rules for lists of tensors
    for bn, mean, var in updates:
        if not (bn.training and bn.track_running_stats):
            continue
        buffers, momentum = bn._buffers, bn.momentum
        counter = buffers["num_batches_tracked"]
        if counter is not None:
            counters.append(counter)
        for kept, new in ((buffers["running_mean"], mean), (buffers["running_var"], var)):
            if kept is not None:
                moves.append((momentum, counter, kept, new))
                running.append(kept)
                batch.append(new)
                together = together and momentum is not None and momentum == moves[0][0] and kept.dtype is new.dtype
    if together and moves and not empty:
        if counters:
            torch._foreach_add_(counters, 1)
        torch._foreach_lerp_(running, batch, moves[0][0])
        return
    for counter in counters:
        counter.add_(1)
    for momentum, counter, kept, new in () if empty else moves:
        weight = momentum
        if momentum is None:  # the cumulative average
            weight = new.new_zeros(()) if counter is None else 1 / counter.to(new.dtype)
        if kept.dtype is new.dtype:
            kept.lerp_(new, weight)
        else:
            kept.copy_(torch.lerp(kept.to(new.dtype), new, weight))
