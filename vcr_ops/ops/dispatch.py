"""What the ops share on their way from Python to the C++ kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..maps import acc_dtype

OpOverload = Any  # torch types its overloads as functions of anything


def needs_grad(*tensors: Tensor | None) -> bool:
    """True where autograd is on and has something to follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def call(op: OpOverload, *args: Any) -> Any:
    """Call a registered op past its autograd formula, which the surrounding autograd.Function replaces."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call_backward(op: OpOverload, *args: Any) -> Any:
    """Call a backward op. With ``create_graph=True`` it keeps its formula, which says that it can't go on."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def present(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """A gradient, or None where there is nothing that it is of (the ops then return an empty tensor)."""
    return None if of is None else grad


def check_devices(op: str, *tensors: Tensor | None) -> None:
    """ValueError where fake tensors, which have no kernel that would notice, are on several devices."""
    devices = dict.fromkeys(str(tensor.device) for tensor in tensors if tensor is not None)
    if len(devices) > 1:
        raise ValueError(f"{op} takes tensors on one device; these are on {' and '.join(devices)}")


def like_parameter(w: Tensor | None, z: Tensor) -> Tensor:
    """Fake memory for a parameter's gradient; empty where there is no parameter."""
    if w is None:
        return z.new_empty((0,), dtype=acc_dtype(z.dtype))
    return w.new_empty(w.shape)


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    flops: Callable[..., int],
    flops_backward: Callable[..., int],
) -> tuple[OpOverload, OpOverload]:
    """Give the C++ ops ``name`` and ``name_backward`` their fake kernels, autograd formulas and FLOP counts."""
    from torch.utils.flop_counter import register_flop_formula

    qualified = f"vcr_ops::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_fake(f"{qualified}_backward", fake_backward)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    def no_double_backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{name}: the cpp backend has no double backward; use backend='composite', which is differentiable twice"
        )

    torch.library.register_autograd(f"{qualified}_backward", no_double_backward)
    forward_op, backward_op = getattr(torch.ops.vcr_ops, name), getattr(torch.ops.vcr_ops, f"{name}_backward")
    register_flop_formula(forward_op)(flops)
    register_flop_formula(backward_op)(flops_backward)
    return forward_op.default, backward_op.default


def unsaved(name: str) -> RuntimeError:
    """The error of a gradient asked of an op that was called for inference."""
    return RuntimeError(f"vcr_ops::{name} was called with save=False, which keeps nothing for a backward pass")
