"""Running statistics of up to two batch norms moved in one launch, as nn.BatchNorm moves its buffers in training."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .maps import acc_type, power_of_two

LARGEST_BLOCK = 1024  # channels at a time


class Move(NamedTuple):
    """One norm's: momentum (None: the cumulative average), its buffers (None: not kept), and the batch's statistics."""

    momentum: float | None
    counter: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    batch_mean: Tensor
    batch_var: Tensor


def move_of(bn: Any, batch_mean: Tensor, batch_var: Tensor) -> Move:
    """A batch norm's."""
    buffers = bn._buffers
    counter, mean, var = (buffers[name] for name in ("num_batches_tracked", "running_mean", "running_var"))
    return Move(bn.momentum, counter, mean, var, batch_mean, batch_var)


def can_move(moves: list[Move]) -> bool:
    """True where the kernel can write to the buffers: plain dense tensors on one device, statistics of one type."""
    if not 0 < len(moves) <= 2 or torch._C._len_torch_dispatch_stack():
        return False
    device, dtype = moves[0].batch_mean.device, moves[0].batch_mean.dtype
    for each in moves:
        for x in each[1:]:
            if x is None:
                continue
            if type(x) is not Tensor or x.device != device or not x.is_contiguous() or x.is_inference():
                return False
        if each.batch_mean.dtype is not dtype or each.batch_var.dtype is not dtype:
            return False
    return True


def move(moves: list[Move]) -> None:
    """Count the batch, and move every buffer to its batch's statistic by its momentum, in place. One launch."""
    arguments: list[object] = []
    for each in moves:
        arguments += [0.0 if each.momentum is None else float(each.momentum), *each[1:], each.batch_mean.numel()]
    if len(moves) == 1:
        arguments += [0.0, None, None, None, None, None, None]
    first = moves[0].batch_mean
    launch(
        move_running_stats,
        (1,),
        first.device,
        *arguments,
        AVERAGE0=moves[0].momentum is None,
        AVERAGE1=moves[-1].momentum is None,
        B=min(LARGEST_BLOCK, power_of_two(max(each.batch_mean.numel() for each in moves))),
        ACC=acc_type(first.dtype),
        num_warps=4,
    )
    written = [x for each in moves for x in each[1:4] if isinstance(x, Tensor)]
    torch.autograd.graph.increment_version(written)


@triton.jit
def count_batch(momentum, counter, AVERAGE: tl.constexpr, ACC: tl.constexpr):
    """Add 1 to the counter. Returns the weight of this batch."""
    weight = tl.full((), 0.0, ACC)
    if counter is not None:
        count = tl.load(counter) + 1
        tl.store(counter, count)
        if AVERAGE:
            weight = reciprocal(count.to(ACC), ACC)
    if not AVERAGE:
        weight += momentum.to(ACC)
    return weight


@triton.jit
def reciprocal(x, ACC: tl.constexpr):
    """1 / x, rounded well."""
    one = tl.full(x.shape, 1.0, ACC)
    if ACC == tl.float64:
        return one / x
    else:
        return tl.div_rn(one, x)


@triton.jit
def move_buffer(kept, batch, size, weight, B: tl.constexpr, ACC: tl.constexpr):
    """kept + weight (batch - kept), as torch.lerp has it."""
    if kept is not None:
        for start in range(0, size, B):
            at = start + tl.arange(0, B)
            old = tl.load(kept + at, mask=at < size, other=0.0).to(ACC)
            new = tl.load(batch + at, mask=at < size, other=0.0).to(ACC)
            apart = new - old
            x = tl.where(weight < 0.5, old + weight * apart, new - apart * (1.0 - weight))
            tl.store(kept + at, x.to(kept.dtype.element_ty), mask=at < size)


@triton.jit
def move_running_stats(
    momentum0: tl.float64,
    counter0,
    mean0,
    var0,
    batch_mean0,
    batch_var0,
    size0,
    momentum1: tl.float64,
    counter1,
    mean1,
    var1,
    batch_mean1,
    batch_var1,
    size1,
    AVERAGE0: tl.constexpr,
    AVERAGE1: tl.constexpr,
    B: tl.constexpr,
    ACC: tl.constexpr,
):
    """Both norms' buffers; without a second one its arguments are None. Grid (1,). AVERAGE: there is no momentum, the
    buffers are averages over all batches."""
    weight = count_batch(tl.full((), 0.0, tl.float64) + momentum0, counter0, AVERAGE0, ACC)
    move_buffer(mean0, batch_mean0, size0, weight, B, ACC)
    move_buffer(var0, batch_var0, size0, weight, B, ACC)
    if size1 is not None:
        weight = count_batch(tl.full((), 0.0, tl.float64) + momentum1, counter1, AVERAGE1, ACC)
        move_buffer(mean1, batch_mean1, size1, weight, B, ACC)
        move_buffer(var1, batch_var1, size1, weight, B, ACC)
