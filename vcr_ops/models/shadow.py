"""Trying a module's forward out without touching the module: on a stand-in in evaluation, without its hooks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


class _Numbers:
    """Random numbers that leave PyTorch's own generators alone."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, shape: Any, low: float, high: float, device: Any, dtype: torch.dtype) -> Tensor:
        x = torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64, device="cpu")
        return (low + (high - low) * x).to(device=device, dtype=dtype)


def shadow(module: nn.Module) -> Any:
    """A stand-in of a module tree, whose forward says what the module's would, in evaluation.

    It has no hooks, and its tensors are in float64, so that differences beyond rounding show. Batch norms have lively
    numbers of their own (a trained-from-zero ``bn3`` would hide what comes before it), and so has what is on the meta
    device, in memory. The module, its tensors and PyTorch's generators stay as they are.
    """
    numbers, memo = _Numbers(), dict[int, Any]()

    def tensor(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.detach()
        device, dtype = place(x)
        if x.is_meta:
            return numbers(x.shape, -0.5, 0.5, device, dtype if x.is_floating_point() else x.dtype)
        return x.to(dtype) if x.is_floating_point() else x

    def copied(m: nn.Module) -> Any:
        if id(m) in memo:
            return memo[id(m)]
        other: Any = object.__new__(type(m))
        memo[id(m)] = other
        state = dict(m.__dict__)
        state |= {name: type(state[name])() for name in _HOOKS if name in state}
        state["training"] = False
        state["_parameters"] = {name: tensor(x) for name, x in m._parameters.items()}
        state["_buffers"] = {name: tensor(x) for name, x in m._buffers.items()}
        state["_modules"] = {name: None if child is None else copied(child) for name, child in m._modules.items()}
        other.__dict__.update(state)
        if isinstance(m, _BatchNorm):
            ranges = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5), "running_mean": (-0.5, 0.5), "running_var": (0.5, 1.5)}
            for kept in (other._parameters, other._buffers):
                for name, (low, high) in ranges.items():
                    x = kept.get(name)
                    if x is not None:
                        kept[name] = numbers(x.shape, low, high, x.device, x.dtype)
        return other

    return copied(module)


def place(x: Tensor) -> tuple[torch.device, torch.dtype]:
    """Where and in which type the shadow of a tensor is."""
    device = torch.device("cpu") if x.is_meta else x.device
    return device, torch.float32 if device.type == "mps" else torch.float64


def input_for(conv: Any, size: int) -> Tensor:
    """Two random images or videos for a convolution's shadow, (2, in_channels, *size)."""
    device, dtype = place(conv.weight)
    return _Numbers()((2, conv.in_channels, *[size] * len(conv.kernel_size)), -1.0, 1.0, device, dtype)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor))


def same(got: Any, expected: Any) -> bool:
    """True where two results of shadows, tensors or trees of them, are the same but for rounding."""
    got, expected = list(_tensors(got)), list(_tensors(expected))
    if len(got) != len(expected) or not expected:
        return False
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        finite = b[b.isfinite()].abs()
        tolerance = _TOLERANCE.get(b.dtype, 0.0) * (float(finite.max()) if finite.numel() else 1.0)
        if not torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True):
            return False
    return True
