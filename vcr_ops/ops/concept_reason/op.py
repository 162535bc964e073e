"""The concept reasoner: the public function, and what the C++ op needs beside its kernel."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, flops
from ...backend import case_of, resolve
from ...library import on_load
from ...maps import acc_dtype
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


class ConceptReasonOutput(NamedTuple):
    """H̃ (N, C, pt), and the mean and variance (pt) that batch norm used."""

    state: Tensor
    mean: Tensor
    var: Tensor


def concept_reason(
    h: Tensor,
    edge: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    edges: str = "dynamic",
    backend: str | None = None,
) -> ConceptReasonOutput:
    """Let the concepts' states exchange what they know over a graph.

    ``state = relu(BN(h + A h))`` with ``A = tanh(h @ edge)`` ("dynamic"), ``A = edge`` ("static") or no A ("none")
    (paper, Eq. 3); batch norm runs over the pt columns with statistics over images and concepts.

    Args:
        h: (N, C, pt) float32 or float64 (bfloat16 is taken as float32).
        edge: (pt, C) for "dynamic", (C, C) for "static", None for "none"; h's dtype or float32.
        mean, var: (pt) statistics to normalise with; None: those of the batch.
        weight, bias: (pt), batch norm's own; None: 1 and 0.
        backend: "auto", "cpp", "triton", "cuda" or "composite"; None is "auto".
    Returns:
        (state, mean, var): float32 (float64 for float64); the statistics that were given, or the batch's with Bessel's
        correction, as ``running_var`` takes it. No gradient flows into or out of the statistics.
    Raises:
        TypeError, ValueError: an argument doesn't fit; says which, what it got and what it takes.
        RuntimeError: the backend can't run here; says why and what to do.
    """
    checks.check_concept_reason(h, edge, mean, var, weight, bias, eps, edges)
    name = resolve(backend, case_of(h, is_map=False)).name
    if name == "composite":
        return ConceptReasonOutput(*composite.concept_reason(h, edge, mean, var, weight, bias, eps, edges))
    dtype = acc_dtype(h.dtype)

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype == dtype else x.to(dtype)

    tensors = (cast(h), cast(edge), cast(mean), cast(var), cast(weight), cast(bias))
    if exporting() or not needs_grad(h, edge, weight, bias):
        state, used_mean, used_var, _ = call(name, _forward, *tensors, eps, edges, False)
    else:
        state, used_mean, used_var = _ConceptReason.apply(name, *tensors, eps, edges)
    if mean is not None and var is not None:
        used_mean, used_var = mean, var
    return ConceptReasonOutput(state, used_mean, used_var)


def _gradients(ctx: Any, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    if dstate is None:
        return (None,) * 6
    h, edge, weight, bias, saved = ctx.saved_tensors
    dh, dedge, dweight, dbias = call_backward(
        ctx.backend, _backward, dstate, h, edge, weight, bias, saved, ctx.edges, ctx.batch
    )
    return dh, present(dedge, edge), None, None, present(dweight, weight), present(dbias, bias)


class _ConceptReason(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        h: Any,
        edge: Any,
        mean: Any,
        var: Any,
        weight: Any,
        bias: Any,
        eps: float,
        edges: str,
    ) -> Any:
        state, used_mean, used_var, saved = call(backend, _forward, h, edge, mean, var, weight, bias, eps, edges, True)
        ctx.save_for_backward(h, edge, weight, bias, saved)
        ctx.backend, ctx.edges, ctx.batch = backend, edges, mean is None
        ctx.mark_non_differentiable(used_mean, used_var)
        ctx.set_materialize_grads(False)
        return state, used_mean, used_var

    @staticmethod
    def backward(ctx: Any, dstate: Any, *_: Any) -> Any:
        return None, *_gradients(ctx, dstate), None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    h, edge, mean, _, weight, bias, _, ctx.edges, ctx.save = inputs
    ctx.backend, ctx.batch = "cpp", mean is None
    ctx.save_for_backward(h, edge, weight, bias, output[3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _op_backward(ctx: Any, dstate: Any, *_: Any) -> Any:
    if not ctx.save:
        raise unsaved("concept_reason")
    return *_gradients(ctx, dstate), None, None, None


def _fake(
    h: Tensor,
    edge: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    edges: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_devices("concept_reason", h, edge, mean, var, weight, bias)
    n, concepts, pt = h.shape
    dtype = acc_dtype(h.dtype)
    statistics = pt if mean is None else 0
    saved = n * concepts * pt + n * concepts * concepts + 4 * pt if save else 0
    return (
        h.new_empty((n, concepts, pt), dtype=dtype),
        h.new_empty((statistics,), dtype=dtype),
        h.new_empty((statistics,), dtype=dtype),
        h.new_empty((saved,), dtype=dtype),
    )


def _fake_backward(
    dstate: Tensor,
    h: Tensor,
    edge: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    edges: str,
    batch: bool,
) -> tuple[Tensor, ...]:
    check_devices("concept_reason_backward", dstate, h, edge, weight, bias, saved)
    return h.new_empty(h.shape), *(like_parameter(w, h) for w in (edge, weight, bias))


@on_load
def _register() -> None:
    global _forward, _backward
    _forward, _backward = register(
        "concept_reason",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_op_backward,
        flops=flops.concept_reason,
        flops_backward=flops.concept_reason_backward,
    )
