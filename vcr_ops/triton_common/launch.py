"""The one place that launches Triton kernels: the right device, the same rounding everywhere, and hooks for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

# Under the interpreter, kernels run as Python on tensors of any device, one program after another.
INTERPRETED: bool = knobs.runtime.interpret


class Launch(NamedTuple):
    """A kernel about to run. ``options``: its constexprs by name, and num_warps and the like."""

    kernel: Any
    grid: tuple[int, ...]
    device: torch.device
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__


# Called with each launch before it happens, in order; one that returns True keeps the kernel from running.
hooks: list[Callable[[Launch], bool | None]] = []


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Run a kernel on the current stream of ``device``; nothing where the grid is empty.

    Args:
        kernel: a ``triton.jit`` function. grid: up to 3 extents. device: where its tensors are.
        args: its arguments, in order. options: its constexprs, and num_warps, num_stages.
    """
    if 0 in grid:
        return
    if hooks:
        seen = Launch(kernel, grid, device, args, options)
        results = [hook(seen) for hook in hooks]  # each of them sees it
        if any(results):
            return
    if INTERPRETED:
        kernel.run(*args, grid=grid, warmup=False, **options)
    # Fused multiply-adds would give the backward other bits than the forward where both compute the same expression,
    # and the default differs between versions of Triton.
    elif device.index is None or device.index == torch.cuda.current_device():
        kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=False, **options)
    else:
        with torch.cuda.device(device):
            kernel.run(*args, grid=grid, warmup=False, enable_fp_fusion=False, **options)


def version() -> str:
    """Triton's version."""
    return triton.__version__
