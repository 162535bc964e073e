"""The middle on Triton: 4 launches forward in training (2 in evaluation) and 5 backward.

Each launch is a function of its own, since ``triton_steps`` makes other ops of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.channel_stats import channel_stats
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import (
    SMALL_TILE,
    Sizes,
    cdiv,
    options,
    rows_at_once,
    sample_config,
    sampler_splits,
    sizes_of,
    splits_of,
)
from ..concept_reason.triton import exchange_blocks, rows_of_sums
from ..concept_reason.triton_kernels import state_norm_backward
from . import triton_backward, triton_forward, triton_input_grad

STATS_ROWS = 64  # groups of images, so that a prologue can merge their statistics
STATE_ROWS = 128  # groups of images whose states' statistics every program of the last pass merges
STATE_PROGRAMS = 128  # of state_norm_backward, each of which adds up the sums of all images
GRADIENT_GROUPS = 32
GRADIENT_TILE = 1024  # elements that small_gradients has of several images, beside many sums


def saved_states(n: int, concepts: int, p: int, pt: int) -> int:
    """Where G stands in ``saved`` (triton_saved.states_at)."""
    return (3 + 5 * n) * concepts * p + 2 * n * concepts * pt


def saved_size(n: int, concepts: int, p: int, pt: int, save: bool) -> int:
    """Numbers in ``saved`` (MiddleSaved::size)."""
    channels = concepts * p
    size = 3 * channels + 5 * n * channels + 4 * n * concepts * pt + 3 * n * concepts + 2 * pt
    return size + (n * concepts * concepts + n * channels * pt if save else 0)


def gradient_numbers(size: Sizes, edges: str) -> int:
    """How many gradients of parameters there are, norm's scale and bias included (triton_input_grad.gradients_size)."""
    weights, channels = size.C * size.p * size.pt, size.C * size.p
    return 5 * weights + 5 * channels + {"dynamic": size.pt * size.C, "static": size.C**2, "none": 0}[edges]


class Stats(NamedTuple):
    """What the pass over the channels found: partial (rows, 2, C*p) and the images' means (N, C*p), float64."""

    partial: Tensor | None
    image_means: Tensor | None
    rows: int
    splits: int
    per_group: int  # images of a row, where they aren't split


def channel_statistics(y: Tensor, size: Sizes) -> Stats:
    """1R"""
    N, C, p, _, S = size[:5]
    stats_found = size.config("channel_stats")
    stats_splits = min(splits_of(stats_found, S), max(1, STATS_ROWS // N))
    per_group = cdiv(N, STATS_ROWS) if stats_splits == 1 else 1
    stats_rows = cdiv(N, per_group) * stats_splits
    stats, image_means = (y.new_empty((n * C * p,), dtype=torch.float64) for n in (stats_rows * 2, N))
    launch(
        channel_stats,
        (stats_rows * cdiv(C, stats_found["CB"]),),
        y.device,
        *size.view.strided,
        image_means,
        stats,
        N,
        S,
        per_group,
        **size.map_constants,
        CB=stats_found["CB"],
        BS=stats_found["BS"],
        SPLITS=stats_splits,
        **options(stats_found),
    )
    return Stats(stats, image_means, stats_rows, stats_splits, per_group)


class Sampling(NamedTuple):
    """How the sampler's pass is divided."""

    found: dict[str, int]
    splits: int
    one_tile: bool
    parts: Tensor | None  # what each split of an image found

    @property
    def needs_means(self) -> bool:
        """True where an image is split before its mean is known."""
        return self.splits > 1


def sampling_of(y: Tensor, size: Sizes, norm: str, sampler: str, save: bool) -> Sampling:
    """The division, with memory for its parts."""
    N, C, p, pt, S = size[:5]
    found = sample_config(size, save)
    splits = sampler_splits(size, found, save)
    one_tile = found["BS"] >= S and splits == 1 and not (norm == "batch" and sampler == "pool")  # which reads nothing
    parts = y.new_empty((N * splits * C * (2 + p + p * pt),), dtype=acc_dtype(y.dtype)) if splits > 1 else None
    return Sampling(found, splits, one_tile, parts)


def sample(
    y: Tensor,
    size: Sizes,
    sampling: Sampling,
    stats: Stats,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    saved: Tensor,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    norm: str,
    norm_eps: float,
    sampler: str,
    save: bool,
) -> None:
    """1R"""
    N, C, p, pt, S = size[:5]
    found = sampling.found
    launch(
        triton_forward.concept_sample,
        (N * sampling.splits * cdiv(C, found["CB"]),),
        y.device,
        *size.view.strided,
        stats.partial,
        stats.image_means,
        dense(norm_mean),
        dense(norm_var),
        dense(norm_weight),
        dense(norm_bias),
        value.contiguous(),
        dense(query),
        dense(key),
        dense(logit),
        saved,
        sampling.parts,
        batch_mean,
        batch_var,
        N,
        S,
        stats.rows,
        stats.per_group,
        **size.map_constants,
        PT=pt,
        PT2=power_of_two(pt),
        NORM=norm,
        NORM_EPS=norm_eps,
        SAMPLER=sampler,
        SAVE=save,
        CB=found["CB"],
        BS=found["BS"],
        ONE_TILE=sampling.one_tile,
        SPLITS=sampling.splits,
        STATS_SPLITS=stats.splits,
        STATS_BS=size.config("channel_stats")["BS"],
        ROWS=rows_at_once(found["CB"] * power_of_two(p), max(stats.rows, 1)),
        **options(found),
    )


def state_rows(size: Sizes) -> tuple[int, int]:
    """Rows of the states' statistics, and images of a row."""
    per_row = cdiv(size.N, STATE_ROWS)
    return cdiv(size.N, per_row), per_row


def reason(
    y: Tensor,
    size: Sizes,
    sampling: Sampling,
    value: Tensor,
    norm_bias: Tensor | None,
    edge: Tensor | None,
    saved: Tensor,
    norm: str,
    sampler: str,
    edges: str,
    save: bool,
) -> Tensor:
    """The states' statistics, (rows, 2, pt) float64."""
    N, C, _, pt, _ = size[:5]
    rows, per_row = state_rows(size)
    state_parts = y.new_empty((2 * rows * pt,), dtype=torch.float64)
    launch(
        triton_forward.concept_reason,
        (rows,),
        y.device,
        value.contiguous(),
        dense(norm_bias),
        dense(edge),
        saved,
        sampling.parts,
        state_parts,
        N,
        per_row,
        **_small(size),
        C2=power_of_two(C),
        NORM=norm,
        EDGES=edges,
        SAVE=save,
        MERGE=sampling.splits > 1 and sampler != "pool",
        SPLITS=sampling.splits,
        **exchange_blocks(C, pt),
        num_warps=4,
    )
    return state_parts


def _small(size: Sizes) -> dict[str, Any]:
    """The constants of a kernel that sees no map."""
    constants = {name: x for name, x in size.map_constants.items() if name != "LAST"}
    return constants | {"PT": size.pt, "PT2": power_of_two(size.pt)}


def modulate(
    y: Tensor,
    out: Tensor,
    size: Sizes,
    norm_bias: Tensor | None,
    edge: Tensor | None,
    state_mean: Tensor | None,
    state_var: Tensor | None,
    state_weight: Tensor | None,
    state_bias: Tensor | None,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    saved: Tensor,
    state_parts: Tensor | None,
    batch_state_mean: Tensor | None,
    batch_state_var: Tensor | None,
    norm: str,
    state_eps: float,
    edges: str,
    modulation: str,
    save: bool,
) -> None:
    """1R + 1W"""
    N, C, _, pt, S = size[:5]
    state_batch, parts_rows, per_row = state_mean is None, *state_rows(size)
    rows = rows_of_sums(pt, parts_rows)
    found = size.config("concept_modulate")
    chunks = splits_of(found, S)
    launch(
        triton_forward.concept_modulate,
        (N * chunks * cdiv(C, found["CB"]),),
        y.device,
        *size.view.strided,
        *map_view_like(out, size.view).strided,
        dense(norm_bias),
        dense(edge),
        dense(state_mean),
        dense(state_var),
        dense(state_weight),
        dense(state_bias),
        dense(scale_weight),
        dense(shift_weight),
        scale_bias.contiguous(),
        shift_bias.contiguous(),
        saved,
        state_parts,
        batch_state_mean,
        batch_state_var,
        N,
        S,
        parts_rows,
        per_row,
        **size.map_constants,
        PT=pt,
        PT2=power_of_two(pt),
        NORM=norm,
        EDGES=edges,
        PIXEL=modulation == "pixel",
        STATE_BATCH=state_batch,
        STATE_EPS=state_eps,
        REASONED=state_parts is not None,
        SAVE=save,
        CHUNKS=chunks,
        DB=exchange_blocks(C, pt)["DB"],
        CB=found["CB"],
        BS=found["BS"],
        ROWS=rows,
        ONE_BLOCK=rows >= parts_rows,
        **options(found),
    )


def forward(
    y: Tensor,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    edge: Tensor | None,
    state_mean: Tensor | None,
    state_var: Tensor | None,
    state_weight: Tensor | None,
    state_bias: Tensor | None,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    norm: str,
    norm_eps: float,
    state_eps: float,
    sampler: str,
    edges: str,
    modulation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``vcr_middle``."""
    size = sizes_of(y, value.shape)
    N, C, p, pt, _ = size[:5]
    acc = acc_dtype(y.dtype)
    out = empty_map_like(y)
    batch, state_batch = norm == "batch", state_mean is None

    def numbers(count: int) -> Tensor:
        return y.new_empty((count,), dtype=acc)

    batch_mean, batch_var = numbers(C * p if batch else 0), numbers(C * p if batch else 0)
    batch_state_mean, batch_state_var = numbers(pt if state_batch else 0), numbers(pt if state_batch else 0)
    saved = numbers(saved_size(N, C, p, pt, save))
    if N == 0:
        for x, fill in (
            (batch_mean, 0.0),
            (batch_var, 1.0),
            (batch_state_mean, 0.0),
            (batch_state_var, 1.0),
            (saved, 0.0),
        ):
            x.fill_(fill)
        return out, batch_mean, batch_var, batch_state_mean, batch_state_var, saved if save else numbers(0)

    sampling = sampling_of(y, size, norm, sampler, save)
    stats = channel_statistics(y, size) if batch or sampling.needs_means else Stats(None, None, 0, 1, 1)
    norm_given = (norm_mean, norm_var, norm_weight, norm_bias)
    weights = (value, query, key, logit)
    sample(
        y,
        size,
        sampling,
        stats,
        *norm_given,
        *weights,
        saved,
        batch_mean,
        batch_var,
        norm,
        norm_eps,
        sampler,
        save,
    )
    state_parts = None
    if state_batch or save:
        state_parts = reason(y, size, sampling, value, norm_bias, edge, saved, norm, sampler, edges, save)
    modulate(
        y,
        out,
        size,
        norm_bias,
        edge,
        state_mean,
        state_var,
        state_weight,
        state_bias,
        scale_weight,
        shift_weight,
        scale_bias,
        shift_bias,
        saved,
        state_parts,
        batch_state_mean,
        batch_state_var,
        norm,
        state_eps,
        edges,
        modulation,
        save,
    )
    return out, batch_mean, batch_var, batch_state_mean, batch_state_var, saved if save else numbers(0)


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
        **_small(size),
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
        **_small(size),
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
