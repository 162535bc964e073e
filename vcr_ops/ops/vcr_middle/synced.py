"""The middle with batch statistics over several processes: the same passes as ops of their own, and small exchanges.

Forward: statistics (1R) | exchange mean, centred squares and count of each channel | sampler's pass (1R) | the same of
each column of the states | modulator's pass (1R 1W). Backward: sums (2R) | exchange the two sums of each column |
small gradients | exchange the two sums of each channel | input gradient (2R 1W). So: one exchange for each norm that is
synchronised, in either direction. Gradients of parameters are this process's own, as nn.SyncBatchNorm's.
"""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ... import checks, flops
from ...backend import case_of, resolve, tracing
from ...collectives import Group, merged, total
from ...library import STEPS, on_load
from ...maps import acc_dtype, empty_map_like, map_format
from ..dispatch import check_devices, like_parameter
from . import composite
from .arguments import Learned, Variant, by_name, grouped
from .kept import kept


def can_sync(backend: str | None, y: Tensor) -> bool:
    """True where the backend that runs on y has synchronised statistics of its own; CUDA C++ has none."""
    return has_steps(resolve(backend, case_of(y)).name)


def has_steps(backend: str) -> bool:
    """True where a backend's middle can be run in steps."""
    return backend != "cuda"


def _steps(backend: str, y: Tensor) -> Any:
    """What has the steps as functions: the ops; for Triton's interpreter, whose tensors are on the CPU, a module."""
    if backend == "triton" and y.device.type == "cpu":
        return importlib.import_module(".triton_steps", __package__)
    return torch.ops.vcr_ops


def vcr_middle_synced(
    backend: str | None, arguments: tuple[Any, ...], norm_group: Group | None, state_group: Group | None
) -> tuple[Any, ...]:
    """As ``op.vcr_middle``, with the groups over which the two norms' batch statistics go; None: this batch's alone.

    Raises:
        TypeError, ValueError: an argument doesn't fit.
        RuntimeError: the backend can't run here; or something is rewriting the ops that can't follow an exchange.
    """
    checks.check_vcr_middle(*arguments, norm_synced=norm_group is not None, state_synced=state_group is not None)
    rewriting = tracing()
    if rewriting:
        raise RuntimeError(f"synchronised batch norm can't train under {rewriting}; make it nn.BatchNorm for that")
    y, acc = arguments[0], acc_dtype(arguments[0].dtype)
    name = resolve(backend, case_of(y)).name
    if name == "composite":
        return composite.vcr_middle(*arguments, norm_group=norm_group, state_group=state_group)
    if map_format(y) == "strided":
        arguments = (y.contiguous(), *arguments[1:])  # one copy for all passes
    out, *statistics = _Synced.apply(name, norm_group, state_group, *arguments)
    return out, *(None if x is None else x.to(acc) for x in statistics)


class _Synced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, norm_group: Group | None, state_group: Group | None, *arguments: Any) -> Any:
        ops = _steps(name, arguments[0])
        y, norm_mean, norm_var, state_mean, state_var, learned, norm_eps, state_eps, variant = by_name(arguments)
        concepts, acc = learned.value.shape[0], acc_dtype(y.dtype)
        positions = y.numel() // y.shape[1]
        norm_count = state_count = norm_found = state_found = None
        if variant.norm == "batch":
            norm_found = merged(ops.vcr_middle_stats(y, concepts), positions, norm_group)
            norm_mean, norm_var, norm_count = norm_found.mean.to(acc), norm_found.var.to(acc), norm_found.number
            variant = Variant("given", *variant[1:])
        options = (variant.norm, norm_eps, *variant[1:])
        saved, moments = ops.vcr_middle_states(y, norm_mean, norm_var, *learned[:7], *learned[11:], *options)
        if state_mean is None:
            state_found = merged(moments, y.shape[0] * concepts, state_group)
            state_mean, state_var, state_count = state_found
        assert state_var is not None
        state_norm = torch.stack((state_mean.double(), torch.rsqrt(state_var.double() + state_eps)))
        out, late = ops.vcr_middle_modulate(y, *learned, saved, state_norm, *variant)
        ctx.save_for_backward(y, *learned, saved, late, state_norm, norm_count, state_count)
        ctx.groups, ctx.variant, ctx.backend = (norm_group, state_group), tuple(variant), name
        statistics = [
            x for found in (norm_found, state_found) for x in ((None, None) if found is None else _reported(found))
        ]
        ctx.mark_non_differentiable(*(x for x in statistics if x is not None))
        return out, *statistics

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        y, *learned, saved, late, state_norm, norm_count, state_count = ctx.saved_tensors
        (norm_group, state_group), variant = ctx.groups, ctx.variant
        ops = _steps(ctx.backend, y)
        summed, state_sums, *of_modulator = ops.vcr_middle_backward_sums(
            grads[0], y, *learned, saved, late, state_norm, *variant
        )
        shares = torch.zeros_like(state_sums)
        if state_count is not None:
            shares = total(state_sums, state_group) / state_count
        attended, norm_sums, *earlier = ops.vcr_middle_backward_states(
            y, *learned, saved, late, state_norm, summed, shares, *variant
        )
        norm_shares = None
        if norm_count is not None:
            norm_shares = (total(norm_sums.double(), norm_group) / norm_count).to(norm_sums.dtype)
        dy = ops.vcr_middle_backward_input(grads[0], y, *learned, saved, late, summed, attended, norm_shares, *variant)
        of_state_norm = (state_sums[1], state_sums[0])
        found = [
            None if w is None else gradient.to(w.dtype)
            for w, gradient in zip(learned, (*earlier, *of_state_norm, *of_modulator), strict=True)
        ]
        return *(None, None, None), dy, None, None, *found[:7], None, None, *found[7:], *(None,) * 6


def _reported(found: Any) -> tuple[Tensor, Tensor]:
    return found.mean, found.unbiased()


# What compilers need to know of the ops.


def _fake_stats(y: Tensor, concepts: int) -> Tensor:
    return y.new_empty((2, y.shape[1]), dtype=torch.float64)


def _fake_states(*arguments: Any) -> tuple[Tensor, ...]:
    check_devices("vcr_middle_states", *arguments[:12])
    y, value, modulation = arguments[0], arguments[5], arguments[-1]
    size = kept(y, value.shape, modulation).saved
    return y.new_empty((size,), dtype=acc_dtype(y.dtype)), y.new_empty((2, value.shape[2]), dtype=torch.float64)


@grouped
def _fake_modulate(
    y: Tensor, learned: Learned, saved: Tensor, state_norm: Tensor, variant: Variant
) -> tuple[Tensor, ...]:
    check_devices("vcr_middle_modulate", y, *learned, saved, state_norm)
    size = kept(y, learned.value.shape, variant.modulation).late
    return empty_map_like(y), y.new_empty((size,), dtype=acc_dtype(y.dtype))


@grouped
def _fake_sums(
    grad_out: Tensor, y: Tensor, learned: Learned, saved: Tensor, late: Tensor, state_norm: Tensor, variant: Variant
) -> tuple[Tensor, ...]:
    check_devices("vcr_middle_backward_sums", grad_out, y, *learned, saved, late, state_norm)
    size = kept(y, learned.value.shape, variant.modulation).summed
    moments = y.new_empty((2, learned.value.shape[2]), dtype=torch.float64)
    return y.new_empty((size,), dtype=acc_dtype(y.dtype)), moments, *(like_parameter(w, y) for w in learned[9:])


def _fake_backward_states(*arguments: Any) -> tuple[Tensor, ...]:
    check_devices("vcr_middle_backward_states", *arguments[:19])
    y, learned = arguments[0], arguments[1:14]
    n, (concepts, p, _), acc = y.shape[0], learned[2].shape, acc_dtype(y.dtype)
    channels = concepts * p
    attended = y.new_empty((2 * n * channels + n * concepts,), dtype=acc)
    return attended, y.new_empty((2, channels), dtype=acc), *(like_parameter(w, y) for w in learned[:7])


def _fake_input(*arguments: Any) -> Tensor:
    check_devices("vcr_middle_backward_input", *arguments[:20])
    return empty_map_like(arguments[1])


def _unfit(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "vcr_middle: the steps of the fused kernels have no gradient of their own, and no double backward; use "
        "backend='composite', which is differentiable twice"
    )


_TRITON = torch.library.Library("vcr_ops", "IMPL")


def _on_triton(step: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module(".triton_steps", __package__), step)(*arguments)


@on_load
def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    fakes: tuple[Any, ...] = (_fake_stats, _fake_states, _fake_modulate, _fake_sums, _fake_backward_states, _fake_input)
    for step, fake in zip(STEPS, fakes, strict=True):
        torch.library.register_fake(f"vcr_ops::{step}", fake)
        torch.library.register_autograd(f"vcr_ops::{step}", _unfit)
        register_flop_formula(getattr(torch.ops.vcr_ops, step))(getattr(flops, step))
        _TRITON.impl(step, functools.partial(_on_triton, step), "CUDA")
