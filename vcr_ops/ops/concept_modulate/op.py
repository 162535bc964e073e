"""The concept modulator: the public function, and what the C++ op needs beside its kernel."""

from typing import Any

import torch
from torch import Tensor

from ... import checks, flops
from ...backend import case_of, resolve
from ...library import on_load
from ...maps import acc_dtype, empty_map_like
from ..dispatch import (
    OpOverload,
    call,
    call_backward,
    check_devices,
    exporting,
    like_parameter,
    needs_grad,
    present,
    register,
)
from . import composite

_forward: OpOverload = None
_backward: OpOverload = None


def concept_modulate(
    z: Tensor,
    state: Tensor,
    scale_bias: Tensor,
    shift_bias: Tensor,
    *,
    scale_weight: Tensor | None = None,
    shift_weight: Tensor | None = None,
    attention: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scale and shift each concept's map by what its updated state says.

    ``relu(alpha * z + beta)`` with ``alpha = state @ scale_weight + scale_bias`` and ``beta`` likewise; with attention,
    position i has ``m_i * state`` in place of ``state``, ``m = attention / max(attention)`` (paper, after Eq. 3).

    Args:
        z: (N, C*p, *spatial), concept-major channels; float32, float64, bfloat16 (float16 not on the CPU). Contiguous
            and channels_last maps, and slices of them, are read in place; other strides are copied once.
        state: (N, C, pt), z's dtype or float32.
        scale_bias, shift_bias: (C, p). scale_weight, shift_weight: (C, pt, p), or None, which leaves the bias alone.
            z's dtype or float32.
        attention: (N, C, *spatial) for pixel modulation, z's dtype or float32; None for channel modulation.
        backend: "auto", "cpp", "triton", "cuda" or "composite"; None is "auto".
    Returns:
        z's shape, dtype and memory format.
    Raises:
        TypeError, ValueError: an argument doesn't fit; says which, what it got and what it takes.
        RuntimeError: the backend can't run here; says why and what to do.
    Cost: 1 read and 1 write of z forward; 4 reads (z and grad_out, twice) and 1 write backward.
    """
    checks.check_concept_modulate(z, state, scale_weight, shift_weight, scale_bias, shift_bias, attention)
    name = resolve(backend, case_of(z)).name
    if name == "composite":
        return composite.concept_modulate(z, state, scale_weight, shift_weight, scale_bias, shift_bias, attention)
    dtype = acc_dtype(z.dtype)
    state = state.to(dtype)
    if attention is not None:
        attention = attention.to(dtype).contiguous()
    tensors = (z, state, scale_weight, shift_weight, scale_bias, shift_bias, attention)
    if exporting() or not needs_grad(*tensors):
        return call(name, _forward, *tensors)
    return _ConceptModulate.apply(name, *tensors)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 7
    tensors = ctx.saved_tensors
    _, _, scale_weight, shift_weight, _, _, attention = tensors
    dz, dstate, dscale_weight, dshift_weight, dscale_bias, dshift_bias, dattention = call_backward(
        ctx.backend, _backward, grad_out, *tensors
    )
    return (
        dz,
        dstate,
        present(dscale_weight, scale_weight),
        present(dshift_weight, shift_weight),
        dscale_bias,
        dshift_bias,
        present(dattention, attention),
    )


class _ConceptModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Any) -> Any:
        ctx.backend = backend
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return call(backend, _forward, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> Any:
        return None, *_gradients(ctx, grad_out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = "cpp"
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _fake(
    z: Tensor,
    state: Tensor,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    attention: Tensor | None,
) -> Tensor:
    check_devices("concept_modulate", z, state, scale_weight, shift_weight, scale_bias, shift_bias, attention)
    return empty_map_like(z)


def _fake_backward(
    grad_out: Tensor,
    z: Tensor,
    state: Tensor,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    attention: Tensor | None,
) -> tuple[Tensor, ...]:
    rest = (state, scale_weight, shift_weight, scale_bias, shift_bias, attention)
    check_devices("concept_modulate_backward", grad_out, z, *rest)
    return empty_map_like(z), *(like_parameter(w, z) for w in rest)


@on_load
def _register() -> None:
    global _forward, _backward
    _forward, _backward = register(
        "concept_modulate",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_gradients,
        flops=flops.concept_modulate,
        flops_backward=flops.concept_modulate_backward,
    )
