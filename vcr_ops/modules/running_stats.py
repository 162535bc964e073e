"""Running statistics of batch norms whose work isn't done by nn.BatchNorm's own forward: their update."""

import threading
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..backend import INTERPRETED, case_of, choose, tracing
from ..ops.running_stats.op import move_running_stats


class _Updates(threading.local):
    off = 0


_updates = _Updates()


class no_running_stats_update(ContextDecorator):
    """Context manager, may be entered again: this package's modules leave running statistics alone in this thread.

    Activation checkpointing runs a block's forward twice and so moves its statistics twice. To move them once::

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), no_running_stats_update()))

    Norm modules that are called (downsample.1, GroupNorm, bn1 and bn3 on GPUs, ...) are PyTorch's own and not affected.
    """

    def __enter__(self) -> None:
        _updates.off += 1

    def __exit__(self, *_: object) -> None:
        _updates.off -= 1


def is_launched(x: Tensor) -> bool:
    """True where Triton, if an op on ``x`` runs on it, does so now: it then moves the statistics in one launch."""
    return (x.is_cuda or INTERPRETED) and not torch.compiler.is_compiling()


def by_triton(backend: str | None, x: Tensor) -> bool:
    """True where an op on ``x`` runs on Triton, now."""
    return is_launched(x) and choose(backend, case_of(x))[0].name == "triton"


def update_running_stats(updates: list[tuple[Any, Tensor, Tensor]], empty: bool, triton: bool = False) -> None:
    """What nn.BatchNorm's training forward does to its buffers, for several modules in few calls.

    Args:
        updates: (module, batch's mean, batch's unbiased variance); modules that keep no statistics now are passed over.
        empty: the batch has no images, so it counts but moves nothing.
        triton: the batch's statistics come from Triton's kernels; see :func:`is_launched`.
    """
    if _updates.off:
        return
    if not empty and (_moved_by_triton(updates) if triton else _moved_by_cpp(updates)):
        return
    moves: list[tuple[Any, Tensor | None, Tensor, Tensor]] = []  # momentum, counter, running, batch
    counters, running, batch = [], [], []
    together = tracing() != "torch.func"  # which has no rules for lists of tensors
    for bn, mean, var in updates:
        own = bn.__dict__  # past nn.Module.__getattr__, which is slow
        if not (own["training"] and own["track_running_stats"]):
            continue
        buffers, momentum = own["_buffers"], own["momentum"]
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


def _moved_by_cpp(updates: list[tuple[Any, Tensor, Tensor]]) -> bool:
    """Move them by one op; False where it can't, or something looks on, and nothing has moved."""
    if torch.compiler.is_compiling() or tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._get_tracing_state() is not None or torch.is_inference_mode_enabled() or not library.has_library():
        return False
    norms: list[Tensor] = []
    momentum = None
    for bn, mean, var in updates:
        own = bn.__dict__  # past nn.Module.__getattr__, which is slow
        if not (own["training"] and own["track_running_stats"]):
            continue
        if norms and own["momentum"] != momentum:
            return False
        momentum, buffers = own["momentum"], own["_buffers"]
        kept = buffers["num_batches_tracked"], buffers["running_mean"], buffers["running_var"]
        for x in kept:
            if type(x) is not Tensor or not x.is_cpu or x.requires_grad or x.is_inference():
                return False
        norms += (*kept, mean, var)
    if not norms:
        return True
    if momentum is None or len(norms) > 10 or type(norms[3]) is not Tensor or not norms[3].is_cpu:
        return False
    return move_running_stats(norms, momentum)


def _moved_by_triton(updates: list[tuple[Any, Tensor, Tensor]]) -> bool:
    """Move them by one kernel; False where it can't write to some buffer, and nothing has moved."""
    from ..triton_common.running_stats import can_move, move, move_of

    moves = [move_of(*update) for update in updates if update[0].training and update[0].track_running_stats]
    if moves and not can_move(moves):
        return False
    if moves:
        move(moves)
    return True
