"""From torch's tensors to what the kernels take: a map with its strides, sizes as powers of two, the sums' type."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..maps import map_format, position_stride, positions

if TYPE_CHECKING:
    import triton.language as tl


class MapView(NamedTuple):
    """A map and its strides, in elements; LAST: channels are adjacent, else positions are."""

    tensor: Tensor
    image: int
    channel: int
    position: int
    last: bool

    @property
    def strided(self) -> tuple[Tensor, int, int, int]:
        """As the kernels take it."""
        return self[:4]

    @property
    def layout(self) -> str:
        return "channels_last" if self.last else "contiguous"


def map_view(z: Tensor) -> MapView:
    """A map to read: in place where the kernels can walk it, else through one dense copy."""
    layout = map_format(z)
    if layout == "strided":
        z, layout = z.contiguous(), "contiguous"
    last = layout == "channels_last"
    position = position_stride(z) if last else 1
    assert position is not None
    channel = 1 if last else (z.stride(1) if z.shape[1] > 1 else positions(z))
    return MapView(z, z.stride(0), channel, position, last)


def map_view_like(z: Tensor, other: MapView) -> MapView:
    """A map in the format of another, which it shares kernels with; converted where it has not that format."""
    view = map_view(z)
    if view.last == other.last:
        return view
    if positions(z) == 1:  # strides that both formats share
        dense = z.contiguous()
        return MapView(dense, dense.stride(0), 1, dense.shape[1], other.last)
    if other.last:
        dense = z.movedim(1, -1).contiguous().movedim(-1, 1)
        return MapView(dense, dense.stride(0), 1, dense.shape[1], True)
    return map_view(z.contiguous())


def power_of_two(n: int) -> int:
    """The next power of two, n itself included."""
    return 1 << (n - 1).bit_length()


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """The type that sums and the small algebra have beside features of ``dtype``."""
    import triton.language as tl  # the sizes of a case are asked for where there is no Triton, too

    return tl.float64 if dtype == torch.float64 else tl.float32


def dense(w: Tensor | None) -> Tensor | None:
    """A parameter whose elements lie in order."""
    return None if w is None else w.contiguous()
