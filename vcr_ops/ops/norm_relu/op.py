"""relu(batch norm + shortcut) in one pass, for inference on CPUs: what the C++ op needs beside its kernel."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...library import on_load
from ...maps import empty_map_like
from ..dispatch import OpOverload, call, check_devices

_op: OpOverload = None


class NormConstants(NamedTuple):
    """A batch norm with given statistics, (channels) each; all None: no norm."""

    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


NO_NORM = NormConstants()


def norm_relu(
    y: Tensor, norm: NormConstants, shortcut: Tensor | None = None, shortcut_norm: NormConstants = NO_NORM
) -> Tensor:
    """``relu(norm(y) + shortcut_norm(shortcut))``, without gradients; one read of each map and one write.

    Args:
        y: (N, channels, *spatial) float32, float64 or bfloat16 on the CPU. shortcut: a map like it, in its dtype.
        norm, shortcut_norm: each tensor in y's dtype or float32.
    Returns:
        A new map in y's dtype and memory format.
    """
    return call("cpp", _op, y, *norm, shortcut, *shortcut_norm)


def _fake(y: Tensor, *others: Any) -> Tensor:
    check_devices("norm_relu", y, *(x for x in others if isinstance(x, Tensor)))
    return empty_map_like(y)


def _no_backward(ctx: Any, grad: Any) -> None:
    raise NotImplementedError("vcr_ops::norm_relu is for inference and has no backward; call the norm and the ReLU")


@on_load
def _register() -> None:
    global _op
    from torch.utils.flop_counter import register_flop_formula

    torch.library.register_fake("vcr_ops::norm_relu", _fake)
    torch.library.register_autograd("vcr_ops::norm_relu", _no_backward)
    # As PyTorch counts the ops that it stands for.
    register_flop_formula(torch.ops.vcr_ops.norm_relu)(lambda *args, **kwargs: 0)
    _op = torch.ops.vcr_ops.norm_relu.default
