"""The middle's 5 launches backward on Triton, and the op that makes them.

Each launch is a function of its own, since ``triton_steps`` makes other ops of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import SMALL_TILE, Sizes, cdiv, options, rows_at_once, sizes_of, splits_of
from ..concept_reason.triton import rows_of_sums
from ..concept_reason.triton_kernels import state_norm_backward
from . import triton_backward, triton_input_grad
from .arguments import Learned, Variant
from .kept import merged_size, saved_size, saved_states

STATE_PROGRAMS = 128  # of state_norm_backward, each of which adds up the sums of all images
GRADIENT_GROUPS = 32
GRADIENT_TILE = 1024  # elements that small_gradients has of several images, beside many sums


def gradient_numbers(size: Sizes, edges: str) -> int:
    """How many gradients of parameters there are, norm's scale and bias included (triton_input_grad.gradients_size)."""
    weights, channels = size.C * size.p * size.pt, size.C * size.p
    return 5 * weights + 5 * channels + {"dynamic": size.pt * size.C, "static": size.C**2, "none": 0}[edges]


class Sums(NamedTuple):
    """Of every image: ``merged``, see store_sums; ``first``, where a maximum stands (pixel modulation); dL/d(state
    before its ReLU) and what its norm needs of it, see store_state_sums.
    """

    merged: Tensor
    first: Tensor
    dstate: Tensor
    dstate_parts: Tensor


def sums_of(
    grad_out: Tensor,
    y: Tensor,
    size: Sizes,
    learned: Learned,
    saved: Tensor,
    variant: Variant,
    merged: Tensor,
    first: Tensor,
    dstate: Tensor,
) -> Sums:
    """2R; the last three are memory to write to."""
    N, C, p, pt, S = size[:5]
    pixel, norm_bias = variant.modulation == "pixel", dense(learned.norm_bias)
    grad = map_view_like(grad_out, size.view)
    found = size.config("modulate_backward_sums")
    splits = splits_of(found, S)
    sums = merged.new_empty((merged_size(N, C, p, variant.modulation) * splits,))
    firsts = y.new_empty((N * splits * C if pixel else 0,), dtype=torch.int32)
    launch(
        triton_backward.modulate_backward_sums,
        (N * splits * cdiv(C, found["CB"]),),
        y.device,
        *size.view.strided,
        *grad.strided,
        norm_bias,
        learned.scale_bias.contiguous(),
        learned.shift_bias.contiguous(),
        saved,
        sums,
        firsts,
        N,
        S,
        **size.map_constants,
        PT=pt,
        NORM=variant.norm,
        PIXEL=pixel,
        SPLITS=splits,
        CB=found["CB"],
        BS=found["BS"],
        **options(found),
    )
    dstate_parts = y.new_empty((3 * N * pt,), dtype=torch.float64)
    launch(
        triton_backward.state_gradients,
        (N,),
        y.device,
        sums,
        firsts,
        norm_bias,
        dense(learned.scale_weight),
        dense(learned.shift_weight),
        saved,
        merged,
        first,
        dstate,
        dstate_parts,
        N,
        **size.small_constants,
        NORM=variant.norm,
        PIXEL=pixel,
        SPLITS=splits,
        CB=max(1, min(power_of_two(C), SMALL_TILE // (power_of_two(p) * power_of_two(pt)))),
        num_warps=4,
    )
    return Sums(merged, first, dstate, dstate_parts)


def state_norm_gradient(
    size: Sizes,
    dstate: Tensor,
    dstate_parts: Tensor,
    state_weight: Tensor | None,
    saved: Tensor,
    norm_from: Tensor,
    dweight: Tensor | None,
    dbias: Tensor | None,
    state_batch: bool,
) -> Tensor:
    """dL/dG. norm_from (2, pt): see store_state_norm."""
    N, C, p, pt, _ = size[:5]
    dg = torch.empty_like(dstate)
    pt2 = power_of_two(pt)
    launch(
        state_norm_backward,
        (min(N, STATE_PROGRAMS),),
        dstate.device,
        dstate,
        saved.narrow(0, saved_states(N, C, p, pt), N * C * pt),
        dstate_parts,
        dense(state_weight),
        norm_from,
        dg,
        dweight,
        dbias,
        N,
        BATCH=state_batch,
        C=C,
        CB=rows_at_once(pt2, C),
        PT=pt,
        PT2=pt2,
        ROWS=rows_of_sums(pt, N),
        ACC=size.map_constants["ACC"],
        num_warps=4,
    )
    return dg


class Attended(NamedTuple):
    """What the last pass needs of every image: s drbar (N, C*p), what each position of a channel gets (N, C*p), r . dr
    (N, C)."""

    dr: Tensor
    constant: Tensor
    rdr: Tensor


def small_gradients(
    size: Sizes,
    learned: Learned,
    saved: Tensor,
    merged: Tensor,
    dg: Tensor,
    to: Attended,
    variant: Variant,
) -> tuple[Tensor, int]:
    """(partial, groups): the parameters' gradients, summed over groups of images; partial (groups,
    ``gradient_numbers``).
    """
    N, C, p, pt, S = size[:5]
    c2, p2, pt2 = power_of_two(C), power_of_two(p), power_of_two(pt)
    groups = min(N, GRADIENT_GROUPS)
    per_group = cdiv(N, groups)
    groups = cdiv(N, per_group)
    partial = dg.new_empty((groups * gradient_numbers(size, variant.edges),))
    at_once = GRADIENT_TILE // max(c2 * pt2, p2 * pt2)
    launch(
        triton_backward.small_gradients,
        (C, groups),
        dg.device,
        dense(learned.norm_bias),
        learned.value.contiguous(),
        dense(learned.query),
        dense(learned.key),
        dense(learned.edge),
        learned.scale_bias.contiguous(),
        saved,
        merged,
        dg,
        *to,
        partial,
        N,
        S,
        per_group,
        **size.small_constants,
        C2=c2,
        NORM=variant.norm,
        SAMPLER=variant.sampler,
        EDGES=variant.edges,
        PIXEL=variant.modulation == "pixel",
        SCALE=learned.scale_weight is not None,
        SHIFT=learned.shift_weight is not None,
        BN=max(1, min(power_of_two(per_group), at_once)),
        num_warps=4,
    )
    return partial, groups


def input_gradient(
    grad_out: Tensor,
    y: Tensor,
    dy: Tensor,
    size: Sizes,
    learned: Learned,
    saved: Tensor,
    merged: Tensor,
    first: Tensor,
    attended: Attended,
    partial: Tensor,
    groups: int,
    to: Learned,
    variant: Variant,
) -> None:
    """2R + 1W. to: where each parameter's sum over the groups goes; None: nowhere."""
    N, C, p, pt, S = size[:5]
    found = size.config("middle_input_grad")
    chunks = splits_of(found, S)
    launch(
        triton_input_grad.middle_input_grad,
        (N * chunks * cdiv(C, found["CB"]),),
        y.device,
        *size.view.strided,
        *map_view_like(grad_out, size.view).strided,
        *map_view_like(dy, size.view).strided,
        dense(learned.norm_bias),
        learned.scale_bias.contiguous(),
        learned.shift_bias.contiguous(),
        saved,
        merged,
        first,
        *attended,
        partial,
        to.value,
        to.query,
        to.key,
        to.scale_weight,
        to.shift_weight,
        to.logit,
        to.scale_bias,
        to.shift_bias,
        to.norm_weight,
        to.norm_bias,
        to.edge,
        N,
        S,
        groups,
        **size.map_constants,
        PT=pt,
        NORM=variant.norm,
        SAMPLER=variant.sampler,
        EDGES=variant.edges,
        PIXEL=variant.modulation == "pixel",
        CHUNKS=chunks,
        CB=found["CB"],
        BS=found["BS"],
        RB=256,
        GB=rows_at_once(max(256, found["CB"] * power_of_two(p)), groups),
        **options(found),
    )


def backward(grad_out: Tensor, y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The op ``vcr_middle_backward``."""
    *parameters, saved, norm, state_batch, sampler, edges, modulation = arguments
    learned, variant = Learned(*parameters), Variant(norm, sampler, edges, modulation)
    size = sizes_of(y, learned.value.shape)
    N, C, p, pt, _ = size[:5]
    acc = acc_dtype(y.dtype)
    dy = empty_map_like(y)
    gradients = [y.new_empty((0,), dtype=acc) if w is None else w.new_empty(w.shape) for w in learned]
    if N == 0:
        for x in gradients:
            x.zero_()
        return dy, *gradients
    there: list[Any] = [None if w is None else x for w, x in zip(learned, gradients, strict=True)]
    to = Learned(*there)
    CP = C * p

    def numbers(count: int) -> Tensor:
        return y.new_empty((count,), dtype=acc)

    first = y.new_empty((N * C if modulation == "pixel" else 0,), dtype=torch.int32)
    memory = numbers(merged_size(N, C, p, modulation)), first, numbers(N * C * pt)
    sums = sums_of(grad_out, y, size, learned, saved, variant, *memory)
    state_norm = saved.narrow(0, saved_size(N, C, p, pt, False) - 2 * pt, 2 * pt)
    norms = (learned.state_weight, saved, state_norm, to.state_weight, to.state_bias)
    dg = state_norm_gradient(size, sums.dstate, sums.dstate_parts, *norms, state_batch)
    attended = Attended(numbers(N * CP), numbers(N * CP), numbers(N * C))
    partial, groups = small_gradients(size, learned, saved, sums.merged, dg, attended, variant)
    summed = (sums.merged, sums.first, attended, partial, groups)
    input_gradient(grad_out, y, dy, size, learned, saved, *summed, to, variant)
    return dy, *gradients
