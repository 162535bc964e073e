"""The middle's 3 launches backward on Triton, and the op that makes them.

Each launch is a function of its own, since ``triton_steps`` makes other ops of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.configs import multiprocessors
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import Sizes, cdiv, options, rows_at_once, sizes_of, splits_of
from . import triton_backward, triton_input_grad
from .arguments import Learned, Variant
from .kept import sums_size

# Programs of modulate_backward_sums per multiprocessor: as many rows of sums of the states does every program of
# small_gradients add up. Registers let 2 or 3 of those that have several parts run at a time, so that all end at about
# the same time; those that have one each may be more.
PROGRAMS_PER_MULTIPROCESSOR, MOST_ALONE = 6, 8
STATE_SUMS_TILE = 2048  # numbers of them at a time
GRADIENT_GROUPS = 8
GRADIENT_TILE = 1024  # elements that small_gradients has of several images, beside many sums


def gradient_numbers(size: Sizes, edges: str) -> int:
    """How many gradients of parameters there are, norm's scale and bias included (triton_input_grad.gradients_size)."""
    weights, channels = size.C * size.p * size.pt, size.C * size.p
    return 5 * weights + 5 * channels + {"dynamic": size.pt * size.C, "static": size.C**2, "none": 0}[edges]


class Sums(NamedTuple):
    """Of every part of an image: ``sums``, see store_sums; ``first``, where a maximum stands (pixel modulation);
    dL/d(state before its ReLU), and what its norm needs of it: ``state_sums``, see store_state_sums.
    """

    splits: int
    sums: Tensor
    first: Tensor
    dstate: Tensor
    state_sums: Tensor

    def rows(self, pt: int) -> int:
        """Of state_sums."""
        return self.state_sums.numel() // (2 * pt)


def backward_sums(
    grad_out: Tensor,
    y: Tensor,
    size: Sizes,
    learned: Learned,
    saved: Tensor,
    variant: Variant,
) -> Sums:
    """2R"""
    N, C, p, pt, S = size[:5]
    pixel = variant.modulation == "pixel"
    found = size.config("modulate_backward_sums")
    splits = splits_of(found, S)
    parts = N * splits * cdiv(C, found["CB"])
    processors = multiprocessors(y.device)
    alone = parts <= MOST_ALONE * processors
    programs = parts if alone else PROGRAMS_PER_MULTIPROCESSOR * processors
    sums = saved.new_empty((sums_size(N * splits, C, p, variant.modulation),))
    first = y.new_empty((N * splits * C if pixel else 0,), dtype=torch.int32)
    dstate = saved.new_empty((N * splits * C * pt,))
    state_sums = y.new_empty((programs * 2 * pt,), dtype=torch.float64)
    launch(
        triton_backward.modulate_backward_sums,
        (programs,),
        y.device,
        *size.view.strided,
        *map_view_like(grad_out, size.view).strided,
        dense(learned.norm_bias),
        dense(learned.scale_weight),
        dense(learned.shift_weight),
        learned.scale_bias.contiguous(),
        learned.shift_bias.contiguous(),
        saved,
        sums,
        first,
        dstate,
        state_sums,
        N,
        S,
        **size.map_constants,
        PT=pt,
        PT2=power_of_two(pt),
        NORM=variant.norm,
        PIXEL=pixel,
        SPLITS=splits,
        ALONE=alone,
        CB=found["CB"],
        BS=found["BS"],
        **options(found),
    )
    return Sums(splits, sums, first, dstate, state_sums)


def merge_splits(
    size: Sizes, parts: Sums, saved: Tensor, merged: Tensor, first: Tensor, dstate: Tensor, modulation: str
) -> Sums:
    """The same with a row for each image, in the memory given."""
    N, C, p, pt, _ = size[:5]
    state_sums = saved.new_empty((C * 2 * pt,), dtype=torch.float64)
    launch(
        triton_backward.merge_splits,
        (C,),
        saved.device,
        parts.sums,
        parts.first,
        parts.dstate,
        saved,
        merged,
        first,
        dstate,
        state_sums,
        N,
        **size.small_constants,
        PIXEL=modulation == "pixel",
        SPLITS=parts.splits,
        BN=max(1, min(power_of_two(N), GRADIENT_TILE // max(power_of_two(p), power_of_two(pt)))),
        num_warps=4,
    )
    return Sums(1, merged, first, dstate, state_sums)


class Attended(NamedTuple):
    """What the last pass needs of every image: s drbar (N, C*p), what each position of a channel gets (N, C*p), r . dr
    (N, C)."""

    dr: Tensor
    constant: Tensor
    rdr: Tensor


class Tops(NamedTuple):
    """Of every image, for pixel modulation, see store_tops: (3, N, C), and where the maxima stand (N, C)."""

    tops: Tensor
    first: Tensor


def small_gradients(
    size: Sizes,
    learned: Learned,
    saved: Tensor,
    sums: Sums,
    attended: Attended,
    tops: Tops,
    variant: Variant,
    state_batch: bool,
    dstate_weight: Tensor | None,
    dstate_bias: Tensor | None,
) -> tuple[Tensor, int]:
    """(partial, groups): the parameters' gradients, summed over groups of images; partial (groups,
    ``gradient_numbers``). attended, tops, dstate_weight and dstate_bias are written.
    """
    N, C, p, pt, S = size[:5]
    c2, p2, pt2 = power_of_two(C), power_of_two(p), power_of_two(pt)
    groups = min(N, GRADIENT_GROUPS)
    per_group = cdiv(N, groups)
    groups = cdiv(N, per_group)
    partial = saved.new_empty((groups * gradient_numbers(size, variant.edges),))
    at_once = GRADIENT_TILE // max(c2 * pt2, p2 * pt2)
    rows = sums.rows(pt)
    launch(
        triton_backward.small_gradients,
        (C, groups),
        saved.device,
        dense(learned.norm_bias),
        learned.value.contiguous(),
        dense(learned.query),
        dense(learned.key),
        dense(learned.edge),
        dense(learned.state_weight),
        learned.scale_bias.contiguous(),
        saved,
        sums.sums,
        sums.first,
        sums.dstate,
        sums.state_sums,
        *attended,
        *tops,
        partial,
        dstate_weight,
        dstate_bias,
        N,
        S,
        per_group,
        rows,
        **size.small_constants,
        C2=c2,
        NORM=variant.norm,
        STATE_BATCH=state_batch,
        SAMPLER=variant.sampler,
        EDGES=variant.edges,
        PIXEL=variant.modulation == "pixel",
        SPLITS=sums.splits,
        SCALE=learned.scale_weight is not None,
        SHIFT=learned.shift_weight is not None,
        BN=max(1, min(power_of_two(per_group), at_once)),
        ROWS=max(1, min(power_of_two(rows), STATE_SUMS_TILE // pt2)),
        num_warps=8,
    )
    return partial, groups


def input_gradient(
    grad_out: Tensor,
    y: Tensor,
    dy: Tensor,
    size: Sizes,
    learned: Learned,
    saved: Tensor,
    attended: Attended,
    tops: Tops,
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
        *tops,
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

    pixel = modulation == "pixel"
    sums = backward_sums(grad_out, y, size, learned, saved, variant)
    attended = Attended(numbers(N * CP), numbers(N * CP), numbers(N * C))
    tops = Tops(numbers(3 * N * C if pixel else 0), y.new_empty((N * C if pixel else 0,), dtype=torch.int32))
    norms = (state_batch, to.state_weight, to.state_bias)
    partial, groups = small_gradients(size, learned, saved, sums, attended, tops, variant, *norms)
    input_gradient(grad_out, y, dy, size, learned, saved, attended, tops, partial, groups, to, variant)
    return dy, *gradients
