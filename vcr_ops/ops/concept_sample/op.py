"""The concept sampler: the public function, and what the C++ op needs beside its kernel."""

from typing import Any, Literal, overload

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
    unsaved,
)
from . import composite

_forward: OpOverload = None
_backward: OpOverload = None


@overload
def concept_sample(
    z: Tensor,
    value: Tensor,
    *,
    query: Tensor | None = ...,
    key: Tensor | None = ...,
    logit: Tensor | None = ...,
    sampler: str = ...,
    return_attention: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def concept_sample(
    z: Tensor,
    value: Tensor,
    *,
    query: Tensor | None = ...,
    key: Tensor | None = ...,
    logit: Tensor | None = ...,
    sampler: str = ...,
    return_attention: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def concept_sample(
    z: Tensor,
    value: Tensor,
    *,
    query: Tensor | None = ...,
    key: Tensor | None = ...,
    logit: Tensor | None = ...,
    sampler: str = ...,
    return_attention: bool = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def concept_sample(
    z: Tensor,
    value: Tensor,
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    logit: Tensor | None = None,
    sampler: str = "dynamic",
    return_attention: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Summarise each concept's feature map in one state by attention pooling.

    ``h = (sum_i a_i z_i) @ value`` with ``a = softmax_i(z_i @ key @ q / sqrt(pt))`` and ``q = mean(z) @ query``
    (paper, Eq. 2); "static" has ``logit`` in place of ``key @ q / sqrt(pt)``, "pool" has ``a_i = 1 / S`` (Eq. 1).

    Args:
        z: (N, C*p, *spatial), concept-major channels; float32, float64, bfloat16 (float16 not on the CPU). Contiguous
            and channels_last maps, and slices of them, are read in place; other strides are copied once.
        value: (C, p, pt). query, key: (C, p, pt), for "dynamic". logit: (C, p), for "static". z's dtype or float32.
        sampler: "dynamic", "static" or "pool".
        return_attention: also return a. Not with "pool".
        backend: "auto", "cpp", "triton", "cuda" or "composite"; None is "auto".
    Returns:
        h (N, C, pt), or (h, a) with a (N, C, *spatial), contiguous; both float32 (float64 for float64).
    Raises:
        TypeError, ValueError: an argument doesn't fit; says which, what it got and what it takes.
        RuntimeError: the backend can't run here; says why and what to do.
    Cost: 1 read of z forward (2 for "dynamic"; 1 where a concept's map of an image stays in cache), 1 read and 1 write
        backward.
    """
    checks.check_concept_sample(z, value, query, key, logit, sampler, return_attention)
    name = resolve(backend, case_of(z)).name
    if name == "composite":
        h, attention = composite.concept_sample(z, value, query, key, logit, sampler, return_attention)
    elif exporting() or not needs_grad(z, value, query, key, logit):
        h, attention, _ = call(name, _forward, z, value, query, key, logit, sampler, return_attention, False)
    else:
        h, attention = _ConceptSample.apply(name, z, value, query, key, logit, sampler, return_attention)
    if not return_attention:
        return h
    assert attention is not None
    return h, attention


def _gradients(ctx: Any, dh: Tensor | None, dattention: Tensor | None) -> tuple[Tensor | None, ...]:
    z, value, query, key, logit, saved = ctx.saved_tensors
    if dh is None:
        if dattention is None:
            return (None,) * 5
        dh = z.new_zeros((z.shape[0], value.shape[0], value.shape[2]), dtype=acc_dtype(z.dtype))
    if not ctx.need_attention:
        dattention = None
    dz, dvalue, dquery, dkey, dlogit = call_backward(
        ctx.backend, _backward, dh, dattention, z, value, query, key, logit, saved, ctx.sampler
    )
    return dz, dvalue, present(dquery, query), present(dkey, key), present(dlogit, logit)


class _ConceptSample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        z: Any,
        value: Any,
        query: Any,
        key: Any,
        logit: Any,
        sampler: str,
        need_attention: bool,
    ) -> Any:
        h, attention, saved = call(backend, _forward, z, value, query, key, logit, sampler, need_attention, True)
        ctx.save_for_backward(z, value, query, key, logit, saved)
        ctx.backend, ctx.sampler, ctx.need_attention = backend, sampler, need_attention
        ctx.set_materialize_grads(False)
        return h, attention

    @staticmethod
    def backward(ctx: Any, dh: Any, dattention: Any) -> Any:
        return None, *_gradients(ctx, dh, dattention), None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.backend, (ctx.sampler, ctx.need_attention, ctx.save) = "cpp", inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, dh: Any, dattention: Any, dsaved: Any) -> Any:
    if not ctx.save:
        raise unsaved("concept_sample")
    return *_gradients(ctx, dh, dattention), None, None, None


def _fake(
    z: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    sampler: str,
    need_attention: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_devices("concept_sample", z, value, query, key, logit)
    dtype, (n, channels, *spatial), (concepts, _, pt) = acc_dtype(z.dtype), z.shape, value.shape
    attention = (n, concepts, *spatial) if need_attention else (0,)
    saved = 3 * n * channels + n * concepts * pt + 3 * n * concepts + n * channels * pt if save else 0
    return (
        z.new_empty((n, concepts, pt), dtype=dtype),
        z.new_empty(attention, dtype=dtype),
        z.new_empty((saved,), dtype=dtype),
    )


def _fake_backward(
    dh: Tensor,
    dattention: Tensor | None,
    z: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    saved: Tensor,
    sampler: str,
) -> tuple[Tensor, ...]:
    check_devices("concept_sample_backward", dh, dattention, z, value, query, key, logit, saved)
    return empty_map_like(z), *(like_parameter(w, z) for w in (value, query, key, logit))


@on_load
def _register() -> None:
    global _forward, _backward
    _forward, _backward = register(
        "concept_sample",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_op_backward,
        flops=flops.concept_sample,
        flops_backward=flops.concept_sample_backward,
    )
