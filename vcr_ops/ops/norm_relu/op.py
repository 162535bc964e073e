"""relu(batch norm + shortcut) on CPUs: what the C++ ops need beside their kernels.

``norm_relu`` and, in place, ``norm_relu_`` have given statistics and no gradients, ``batch_norm_relu`` the batch's, and
gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...library import on_load
from ...maps import acc_dtype, empty_map_like
from ..dispatch import OpOverload, call, call_backward, check_devices, like_parameter, needs_grad, present

_given: OpOverload = None
_given_in_place: OpOverload = None
_batch: OpOverload = None
_batch_backward: OpOverload = None


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
    return call("cpp", _given, y, *norm, shortcut, *shortcut_norm)


def norm_relu_(
    y: Tensor, norm: NormConstants, shortcut: Tensor | None = None, shortcut_norm: NormConstants = NO_NORM
) -> Tensor:
    """``norm_relu`` into y, which is returned: a dense contiguous or channels_last map that nothing else needs."""
    call("cpp", _given_in_place, y, *norm, shortcut, *shortcut_norm)
    return y


def batch_norm_relu(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shortcut: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``relu(batch norm(y) + shortcut)`` with the batch's statistics.

    Args:
        y: (N, channels, *spatial), more than one value a channel; float32, float64 or bfloat16 on the CPU. shortcut: a
            map like it, in its dtype. weight, bias: (channels), in y's dtype or float32; None: 1 and 0.
    Returns:
        (out, mean, var): a new map in y's dtype and memory format; the batch's statistics in float32 (float64 for
        float64), var with Bessel's correction. No gradient flows into the statistics.
    """
    if needs_grad(y, weight, bias, shortcut):
        return _BatchNormRelu.apply(y, weight, bias, eps, shortcut)
    return call("cpp", _batch, y, weight, bias, eps, shortcut)[:3]


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    y, out, weight, bias, mean, var = ctx.saved_tensors
    dy, dshortcut, dweight, dbias = call_backward(
        "cpp", _batch_backward, grad, y, out, weight, bias, mean, var, ctx.eps
    )
    return dy, present(dweight, weight), present(dbias, bias), None, present(dshortcut, out)


class _BatchNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Any, weight: Any, bias: Any, eps: float, shortcut: Any) -> Any:
        out, mean, unbiased_var, var = call("cpp", _batch, y, weight, bias, eps, shortcut)
        # Without a shortcut, what the ReLU let through can be told from y.
        ctx.save_for_backward(y, None if shortcut is None else out, weight, bias, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, unbiased_var)
        ctx.set_materialize_grads(False)
        return out, mean, unbiased_var

    @staticmethod
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        return _gradients(ctx, grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    y, weight, bias, ctx.eps, shortcut = inputs
    out, mean, unbiased_var, var = output
    ctx.save_for_backward(y, None if shortcut is None else out, weight, bias, mean, var)
    ctx.mark_non_differentiable(mean, unbiased_var, var)
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, grad: Any, *_: Any) -> Any:
    return _gradients(ctx, grad)


def _fake(y: Tensor, *others: Any) -> Tensor:
    check_devices("norm_relu", y, *(x for x in others if isinstance(x, Tensor)))
    return empty_map_like(y)


def _fake_in_place(y: Tensor, *others: Any) -> None:
    check_devices("norm_relu_", y, *(x for x in others if isinstance(x, Tensor)))


def _fake_batch(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shortcut: Tensor | None
) -> tuple[Tensor, ...]:
    check_devices("batch_norm_relu", y, weight, bias, shortcut)
    statistics = (y.new_empty((y.shape[1],), dtype=acc_dtype(y.dtype)) for _ in range(3))
    return empty_map_like(y), *statistics


def _fake_batch_backward(
    grad_out: Tensor,
    y: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    check_devices("batch_norm_relu_backward", grad_out, y, out, weight, bias, mean, var)
    dshortcut = y.new_empty((0,), dtype=acc_dtype(y.dtype)) if out is None else empty_map_like(y)
    return empty_map_like(y), dshortcut, like_parameter(weight, y), like_parameter(bias, y)


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("vcr_ops::norm_relu is for inference and has no backward; call the norm and the ReLU")


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "batch_norm_relu: the fused kernels have no double backward; use backend='composite', which is "
        "differentiable twice"
    )


@on_load
def _register() -> None:
    global _given, _given_in_place, _batch, _batch_backward
    from torch.utils.flop_counter import register_flop_formula

    library, ops = torch.library, torch.ops.vcr_ops
    library.register_fake("vcr_ops::norm_relu", _fake)
    library.register_fake("vcr_ops::norm_relu_", _fake_in_place)
    library.register_fake("vcr_ops::batch_norm_relu", _fake_batch)
    library.register_fake("vcr_ops::batch_norm_relu_backward", _fake_batch_backward)
    library.register_autograd("vcr_ops::norm_relu", _no_backward)
    library.register_autograd("vcr_ops::batch_norm_relu", _op_backward, setup_context=_setup_context)
    library.register_autograd("vcr_ops::batch_norm_relu_backward", _no_double_backward)
    for op in (ops.norm_relu, ops.norm_relu_, ops.batch_norm_relu, ops.batch_norm_relu_backward):
        register_flop_formula(op)(lambda *args, **kwargs: 0)  # as PyTorch counts the ops that they stand for
    _given, _given_in_place, _batch = ops.norm_relu.default, ops.norm_relu_.default, ops.batch_norm_relu.default
    _batch_backward = ops.batch_norm_relu_backward.default
