"""The middle's 5 launches backward on Triton, and the op that makes them.

Each launch is a function of its own, since ``triton_steps`` makes other ops of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import SMALL_TILE, Sizes, cdiv, options, rows_at_once, sizes_of, splits_of
from ..concept_reason.triton import rows_of_sums
from ..concept_reason.triton_kernels import state_norm_backward
from . import triton_backward, triton_input_grad
from .kept import saved_size, saved_states

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


def merged_numbers(size: Sizes, modulation: str) -> int:
    """Numbers of ``Sums.merged``."""
    channels = size.C * size.p
    return size.N * (6 * channels + 3 * size.C if modulation == "pixel" else 2 * channels)


def sums_of(
    grad_out: Tensor,
    y: Tensor,
    size: Sizes,
    norm_bias: Tensor | None,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    saved: Tensor,
    norm: str,
    modulation: str,
    merged: Tensor,
    first: Tensor,
    dstate: Tensor,
) -> Sums:
    """2R; the last three are memory to write to."""
    N, C, p, pt, S = size[:5]
    pixel = modulation == "pixel"
    norm_bias, scale_bias, shift_bias = dense(norm_bias), scale_bias.contiguous(), shift_bias.contiguous()
    grad = map_view_like(grad_out, size.view)
    found = size.config("modulate_backward_sums")
    splits = splits_of(found, S)
    sums = merged.new_empty((merged_numbers(size, modulation) * splits,))
    firsts = y.new_empty((N * splits * C if pixel else 0,), dtype=torch.int32)
    launch(
        triton_backward.modulate_backward_sums,
        (N * splits * cdiv(C, found["CB"]),),
        y.device,
        *size.view.strided,
        *grad.strided,
        norm_bias,
        scale_bias,
        shift_bias,
        saved,
        sums,
        firsts,
        N,
        S,
        **size.map_constants,
        PT=pt,
        NORM=norm,
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
        dense(scale_weight),
        dense(shift_weight),
        saved,
        merged,
        first,
        dstate,
        dstate_parts,
        N,
        **size.small_constants,
        NORM=norm,
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
    norm_bias: Tensor | None,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    edge: Tensor | None,
    scale_bias: Tensor,
    saved: Tensor,
    merged: Tensor,
    dg: Tensor,
    to: Attended,
    norm: str,
    sampler: str,
    edges: str,
    modulation: str,
    scale: bool,
    shift: bool,
) -> tuple[Tensor, int]:
    """(partial, groups): the parameters' gradients, summed over groups of images; partial (groups,
    ``gradient_numbers``). scale, shift: whether these weights are there.
    """
    N, C, p, pt, S = size[:5]
    c2, p2, pt2 = power_of_two(C), power_of_two(p), power_of_two(pt)
    groups = min(N, GRADIENT_GROUPS)
    per_group = cdiv(N, groups)
    groups = cdiv(N, per_group)
    partial = dg.new_empty((groups * gradient_numbers(size, edges),))
    at_once = GRADIENT_TILE // max(c2 * pt2, p2 * pt2)
    launch(
        triton_backward.small_gradients,
        (C, groups),
        dg.device,
        dense(norm_bias),
        value.contiguous(),
        dense(query),
        dense(key),
        dense(edge),
        scale_bias.contiguous(),
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
        NORM=norm,
        SAMPLER=sampler,
        EDGES=edges,
        PIXEL=modulation == "pixel",
        SCALE=scale,
        SHIFT=shift,
        BN=max(1, min(power_of_two(per_group), at_once)),
        num_warps=4,
    )
    return partial, groups


def input_gradient(
    grad_out: Tensor,
    y: Tensor,
    dy: Tensor,
    size: Sizes,
    norm_bias: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    saved: Tensor,
    merged: Tensor,
    first: Tensor,
    attended: Attended,
    partial: Tensor,
    groups: int,
    to: list[Tensor | None],
    norm: str,
    sampler: str,
    edges: str,
    modulation: str,
) -> None:
    """2R + 1W. to: where the sums over the groups go, in the op's order of parameters; None: nowhere."""
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
        dense(norm_bias),
        scale_bias.contiguous(),
        shift_bias.contiguous(),
        saved,
        merged,
        first,
        *attended,
        partial,
        to[2],
        to[3],
        to[4],
        to[9],
        to[10],
        to[5],
        to[11],
        to[12],
        to[0],
        to[1],
        to[6],
        N,
        S,
        groups,
        **size.map_constants,
        PT=pt,
        NORM=norm,
        SAMPLER=sampler,
        EDGES=edges,
        PIXEL=modulation == "pixel",
        CHUNKS=chunks,
        CB=found["CB"],
        BS=found["BS"],
        RB=256,
        GB=rows_at_once(max(256, found["CB"] * power_of_two(p)), groups),
        **options(found),
    )


def backward(
    grad_out: Tensor,
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    edge: Tensor | None,
    state_weight: Tensor | None,
    state_bias: Tensor | None,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    saved: Tensor,
    norm: str,
    state_batch: bool,
    sampler: str,
    edges: str,
    modulation: str,
) -> tuple[Tensor, ...]:
    """The op ``vcr_middle_backward``."""
    size = sizes_of(y, value.shape)
    N, C, p, pt, _ = size[:5]
    acc = acc_dtype(y.dtype)
    dy = empty_map_like(y)
    parameters = (
        norm_weight,
        norm_bias,
        value,
        query,
        key,
        logit,
        edge,
        state_weight,
        state_bias,
        scale_weight,
        shift_weight,
        scale_bias,
        shift_bias,
    )
    gradients = [y.new_empty((0,), dtype=acc) if w is None else w.new_empty(w.shape) for w in parameters]
    if N == 0:
        for x in gradients:
            x.zero_()
        return dy, *gradients
    to = [None if w is None else x for w, x in zip(parameters, gradients, strict=True)]
    CP = C * p

    def numbers(count: int) -> Tensor:
        return y.new_empty((count,), dtype=acc)

    first = y.new_empty((N * C if modulation == "pixel" else 0,), dtype=torch.int32)
    memory = numbers(merged_numbers(size, modulation)), first, numbers(N * C * pt)
    projected = (scale_weight, shift_weight, scale_bias, shift_bias)
    sums = sums_of(grad_out, y, size, norm_bias, *projected, saved, norm, modulation, *memory)
    state_norm = saved.narrow(0, saved_size(N, C, p, pt, False) - 2 * pt, 2 * pt)
    dg = state_norm_gradient(
        size, sums.dstate, sums.dstate_parts, state_weight, saved, state_norm, to[7], to[8], state_batch
    )
    attended = Attended(numbers(N * CP), numbers(N * CP), numbers(N * C))
    given = scale_weight is not None, shift_weight is not None
    variant = (norm, sampler, edges, modulation)
    partial, groups = small_gradients(
        size, norm_bias, value, query, key, edge, scale_bias, saved, sums.merged, dg, attended, *variant, *given
    )
    arguments = (size, norm_bias, scale_bias, shift_bias, saved, sums.merged, sums.first, attended, partial, groups, to)
    input_gradient(grad_out, y, dy, *arguments, *variant)
    return dy, *gradients
