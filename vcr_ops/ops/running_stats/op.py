"""Running statistics of batch norms on the CPU, moved in place by one op: what the C++ op needs beside its kernel."""

from typing import Any

import torch
from torch import Tensor

from ...library import on_load
from ..dispatch import OpOverload

_move: OpOverload = None


def move_running_stats(norms: list[Tensor], momentum: float) -> bool:
    """Count a batch, and ``running += momentum * (batch - running)``, for one or two batch norms.

    Args:
        norms: of each its counter, running mean and variance, which are changed, and the batch's mean and variance.
    Returns:
        False where a tensor isn't as the op takes it (dense; all but the counters of one type), and nothing has moved.
    """
    torch.autograd.graph.increment_version([*norms[:3], *norms[5:8]])
    with torch._C._AutoDispatchBelowAutograd():
        return _move(*norms, *(None,) * (10 - len(norms)), momentum)


def _fake(*_: Any) -> bool:
    return True


@on_load
def _register() -> None:
    global _move
    from torch.utils.flop_counter import register_flop_formula

    torch.library.register_fake("vcr_ops::move_running_stats", _fake)
    register_flop_formula(torch.ops.vcr_ops.move_running_stats)(lambda *_, **__: 0)
    _move = torch.ops.vcr_ops.move_running_stats.default
