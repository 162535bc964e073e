"""What processes tell each other of their batches: a few numbers per channel, through functional collectives.

These are ops without side effects, which compilers can trace. They go by the group's name, so nothing here is an object
that a graph couldn't hold.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Group(NamedTuple):
    """A process group: its name, and how many processes are in it."""

    name: str
    size: int


def group_of(process_group: Any) -> Group | None:
    """The group, or the default one for None; None where there is nobody to talk to."""
    if not dist.is_available() or not dist.is_initialized():
        return None

    found: Any = dist.group.WORLD if process_group is None else process_group
    size = dist.get_world_size(found)
    return Group(found.group_name, size) if size > 1 else None


def gather(x: Tensor, group: Group) -> Tensor:
    """x (k) of every process, by rank: (size, k)."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), group.size, group.name)).view(group.size, -1)


def total(x: Tensor, group: Group | None) -> Tensor:
    """The sum over all processes, the same on each; x where there is no group."""
    if group is None:
        return x
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.name))


class _Total(torch.autograd.Function):
    """:func:`total`, to be differentiated as often as wanted: a process's part takes part in every process's loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, size: int) -> Tensor:
        ctx.group = name, size
        return total(x, Group(name, size))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Total.apply(grads[0], *ctx.group), None, None


def differentiable_total(x: Tensor, group: Group) -> Tensor:
    """:func:`total` with a gradient."""
    return _Total.apply(x, *group)


class Moments(NamedTuple):
    """Of everybody's values: mean and variance (as it normalises) of each column in float64, and how many there are."""

    mean: Tensor
    var: Tensor
    number: Tensor

    def unbiased(self) -> Tensor:
        """The variance with Bessel's correction."""
        return self.var * (self.number / (self.number - 1))


def merged(moments: Tensor, count: Any, group: Group | None) -> Moments:
    """The statistics over all processes, whose counts may differ, by Chan's formula in the order of ranks.

    moments: (2, k) in float64, this process's mean and centred sum of squares; 0 where it has no values.
    """
    own = torch.cat((moments.reshape(-1), moments.new_full((1,), count)))
    rows = own[None] if group is None else gather(own, group)
    k = moments.shape[1]
    means, squares, counts = rows[:, :k], rows[:, k:-1], rows[:, -1:]
    everybody = counts.sum(0).clamp_min(1)
    mean = (counts * means).sum(0) / everybody
    var = (squares + counts * (means - mean).square()).sum(0) / everybody
    return Moments(mean, var, everybody)


def synced_moments(x: Tensor, dims: tuple[int, ...], own: int, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For PyTorch's own autograd: (x less the mean, its variance), both of all processes, and (mean, unbiased variance)
    detached. Statistics are over ``dims``, ``own`` values of each here, and that may be none.
    """
    count = x.new_full((1,), own, dtype=torch.float64)
    everybody = total(count, group).clamp_min(1)

    def mean_of(values: Tensor) -> Tensor:
        kept = values.sum(dims, keepdim=True)
        return (differentiable_total(kept.double(), group) / everybody).to(x.dtype)

    mean = mean_of(x)
    centred = x - mean
    var = mean_of(centred.square())
    unbiased = var.detach() * (everybody / (everybody - 1)).to(x.dtype)
    shape = [size for d, size in enumerate(x.shape) if d not in dims]
    return centred, var.reshape(shape), mean.detach().reshape(shape), unbiased.reshape(shape)
