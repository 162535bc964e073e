"""A feature map (N, C*p, *spatial) as concepts, in place, in both memory formats.

A contiguous map is seen as (N, C, p, S) and a channels_last one as (N, S, C, p): neither is converted to the other.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums, statistics and the small algebra have beside features of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_autocast(device: str) -> bool:
    """True for a type of devices that autocast knows."""
    return torch.amp.is_autocast_available(device)


# What torch.compiler.assume_constant_result does, without importing the compiler: torch 2.10's can't look into it.
has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(z: Tensor) -> AbstractContextManager[None]:
    """A context in which autocast leaves the ops on z's device alone."""
    device = z.device.type
    if has_autocast(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def positions(z: Tensor) -> int:
    """S, the number of positions."""
    return math.prod(z.shape[2:])


def position_stride(z: Tensor) -> int | None:
    """The stride of the spatial dims taken as one, or None where they can't be."""
    stride, extent = 1, 0
    for size, step in zip(reversed(z.shape[2:]), reversed(z.stride()[2:]), strict=True):
        if size == 1:
            continue
        if extent == 0:
            stride, extent = step, size
        elif step == stride * extent:
            extent *= size
        else:
            return None
    return stride


def map_format(z: Tensor) -> str:
    """How the ops read ``z``: "contiguous" and "channels_last" in place, "strided" through one dense copy.

    The strides of images are free in both, so are those of channels (contiguous) or positions (channels_last).
    """
    # The rules of csrc/binding/unpack.h: overlapping memory, as an expanded map's, is copied too.
    stride, channels = position_stride(z), z.shape[1]
    if stride == 1 and (channels == 1 or positions(z) == 1 or z.stride(1) >= positions(z)):
        return "contiguous"
    if stride is not None and channels > 1 and z.stride(1) == 1 and stride >= channels and z.dim() <= 5:
        return "channels_last"
    return "strided"


def empty_map_like(z: Tensor) -> Tensor:
    """Dense memory of z's shape, in the format that the ops give their output."""
    if map_format(z) != "channels_last":
        return z.new_empty(z.shape)
    n, channels, *spatial = z.shape
    return z.new_empty((n, *spatial, channels)).movedim(-1, 1)


def split_concepts(z: Tensor, concepts: int) -> tuple[Tensor, bool]:
    """``z`` as (N, S, C, p) and True where it is channels_last, as (N, C, p, S) and False otherwise."""
    n, channels = z.shape[:2]
    p = channels // concepts
    if map_format(z) == "channels_last":
        return z.movedim(1, -1).reshape(n, positions(z), concepts, p), True
    return z.reshape(n, concepts, p, positions(z)), False


def merge_concepts(x: Tensor, last: bool, shape: torch.Size) -> Tensor:
    """The reverse of :func:`split_concepts`."""
    if not last:
        return x.reshape(shape)
    n, channels, *spatial = shape
    return x.reshape(n, *spatial, channels).movedim(-1, 1)


def beside_positions(x: Tensor, last: bool) -> Tensor:
    """Numbers per concept and channel, (N, C, p) or (C, p), shaped to be broadcast over a split map."""
    return x.unsqueeze(-3) if last else x.unsqueeze(-1)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x_c W_c for every concept: (N, C, a) with (C, a, b) gives (N, C, b)."""
    return torch.matmul(x.transpose(0, 1), weight).transpose(0, 1)


def mean_positions(x: Tensor, last: bool) -> Tensor:
    """The mean of a split map over its positions, (N, C, p)."""
    return x.mean(1 if last else 3)


def dot_positions(x: Tensor, v: Tensor, last: bool) -> Tensor:
    """The product of every position with a vector per concept, (N, C, p) or (C, p): (N, S, C) or (N, C, S)."""
    if last:
        return (x * v.unsqueeze(-3)).sum(-1)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Faster, but its gradient is a product that BLAS is slow at, and a compiler can't fuse it.
        return torch.matmul(v.unsqueeze(-2), x).squeeze(-2)
    return (x * v.unsqueeze(-1)).sum(2)


def weigh_positions(a: Tensor, x: Tensor, last: bool) -> Tensor:
    """The sum of the positions, each with its weight: (N, C, p)."""
    return (a.unsqueeze(-1) * x).sum(1) if last else (a.unsqueeze(2) * x).sum(3)
