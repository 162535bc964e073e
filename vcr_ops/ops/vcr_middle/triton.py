"""The middle on Triton: 4 launches forward in training (2 in evaluation) and 5 backward."""

import torch
from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.channel_stats import channel_stats
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import (
    SMALL_TILE,
    cdiv,
    options,
    rows_at_once,
    sample_config,
    sampler_splits,
    sizes_of,
    splits_of,
)
from ..concept_reason.triton import exchange_blocks
from ..concept_reason.triton_kernels import state_norm_backward
from . import triton_backward, triton_forward, triton_input_grad

STATS_ROWS = 64  # groups of images, so that a prologue can merge their statistics
STATE_ROWS = 128  # groups of images whose states' statistics every program of the last pass merges
STATE_PROGRAMS = 128  # of state_norm_backward, each of which adds up the sums of all images
GRADIENT_GROUPS = 32


def saved_states(n: int, concepts: int, p: int, pt: int) -> int:
    """Where G stands in ``saved`` (triton_saved.states_at)."""
    return (3 + 5 * n) * concepts * p + 2 * n * concepts * pt


def saved_size(n: int, concepts: int, p: int, pt: int, save: bool) -> int:
    """Numbers in ``saved`` (MiddleSaved::size)."""
    channels = concepts * p
    size = 3 * channels + 5 * n * channels + 4 * n * concepts * pt + 3 * n * concepts + 2 * pt
    return size + (n * concepts * concepts + n * channels * pt if save else 0)


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
    N, C, p, pt, S = size[:5]
    view, acc = size.view, acc_dtype(y.dtype)
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

    norm_weight, norm_bias, norm_mean, norm_var = (
        dense(norm_weight),
        dense(norm_bias),
        dense(norm_mean),
        dense(norm_var),
    )
    value, query, key, logit = value.contiguous(), dense(query), dense(key), dense(logit)
    edge, state_mean, state_var = dense(edge), dense(state_mean), dense(state_var)
    common = {**size.map_constants, "PT": pt, "PT2": power_of_two(pt)}

    found = sample_config(size, save)
    splits = sampler_splits(size, found, save)
    one_tile = found["BS"] >= S and splits == 1 and not (batch and sampler == "pool")  # which reads nothing
    # pass 1: means and squares, for batch statistics or where an image is split before its mean is known
    stats_found = size.config("channel_stats")
    stats, image_means, stats_rows, stats_splits, per_group = None, None, 0, 1, 1
    if batch or splits > 1:
        stats_splits = min(splits_of(stats_found, S), max(1, STATS_ROWS // N))
        per_group = cdiv(N, STATS_ROWS) if stats_splits == 1 else 1
        stats_rows = cdiv(N, per_group) * stats_splits
        stats, image_means = (y.new_empty((n * C * p,), dtype=torch.float64) for n in (stats_rows * 2, N))
        launch(
            channel_stats,
            (stats_rows * cdiv(C, stats_found["CB"]),),
            y.device,
            *view.strided,
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
    # pass 2
    parts = numbers(N * splits * C * (2 + p + p * pt)) if splits > 1 else None
    launch(
        triton_forward.concept_sample,
        (N * splits * cdiv(C, found["CB"]),),
        y.device,
        *view.strided,
        stats,
        image_means,
        norm_mean,
        norm_var,
        norm_weight,
        norm_bias,
        value,
        query,
        key,
        logit,
        saved,
        parts,
        batch_mean,
        batch_var,
        N,
        S,
        stats_rows,
        per_group,
        **common,
        NORM=norm,
        NORM_EPS=norm_eps,
        SAMPLER=sampler,
        SAVE=save,
        CB=found["CB"],
        BS=found["BS"],
        ONE_TILE=one_tile,
        SPLITS=splits,
        STATS_SPLITS=stats_splits,
        STATS_BS=stats_found["BS"],
        ROWS=rows_at_once(found["CB"] * power_of_two(p), max(stats_rows, 1)),
        **options(found),
    )
    reasoned = state_batch or save
    state_parts = None
    per_row = cdiv(N, STATE_ROWS)
    state_rows = cdiv(N, per_row)
    if reasoned:
        state_parts = y.new_empty((2 * state_rows * pt,), dtype=torch.float64)
        launch(
            triton_forward.concept_reason,
            (state_rows,),
            y.device,
            value,
            norm_bias,
            edge,
            saved,
            parts,
            state_parts,
            N,
            per_row,
            **{name: x for name, x in common.items() if name != "LAST"},
            C2=power_of_two(C),
            NORM=norm,
            EDGES=edges,
            SAVE=save,
            MERGE=splits > 1 and sampler != "pool",
            SPLITS=splits,
            **exchange_blocks(C, pt),
            num_warps=4,
        )
    # pass 3
    rows = rows_at_once(power_of_two(pt), state_rows)
    found = size.config("concept_modulate")
    chunks = splits_of(found, S)
    launch(
        triton_forward.concept_modulate,
        (N * chunks * cdiv(C, found["CB"]),),
        y.device,
        *view.strided,
        *map_view_like(out, view).strided,
        norm_bias,
        edge,
        state_mean,
        state_var,
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
        state_rows,
        per_row,
        **common,
        NORM=norm,
        EDGES=edges,
        PIXEL=modulation == "pixel",
        STATE_BATCH=state_batch,
        STATE_EPS=state_eps,
        REASONED=reasoned,
        SAVE=save,
        CHUNKS=chunks,
        DB=exchange_blocks(C, pt)["DB"],
        CB=found["CB"],
        BS=found["BS"],
        ROWS=rows,
        ONE_BLOCK=rows >= state_rows,
        **options(found),
    )
    return out, batch_mean, batch_var, batch_state_mean, batch_state_var, saved if save else numbers(0)


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
    N, C, p, pt, S = size[:5]
    view, acc = size.view, acc_dtype(y.dtype)
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
    pixel = modulation == "pixel"
    norm_bias, value, query, key, logit = dense(norm_bias), value.contiguous(), dense(query), dense(key), dense(logit)
    scale_bias, shift_bias = scale_bias.contiguous(), shift_bias.contiguous()
    grad = map_view_like(grad_out, view)
    CP = C * p

    def numbers(count: int) -> Tensor:
        return y.new_empty((count,), dtype=acc)

    found = size.config("modulate_backward_sums")
    splits = splits_of(found, S)
    width = 6 * CP + 3 * C if pixel else 2 * CP
    sums, merged = numbers(N * splits * width), numbers(N * width)
    firsts, first = (y.new_empty((n if pixel else 0,), dtype=torch.int32) for n in (N * splits * C, N * C))
    constants = size.map_constants
    launch(
        triton_backward.modulate_backward_sums,
        (N * splits * cdiv(C, found["CB"]),),
        y.device,
        *view.strided,
        *grad.strided,
        norm_bias,
        scale_bias,
        shift_bias,
        saved,
        sums,
        firsts,
        N,
        S,
        **constants,
        PT=pt,
        NORM=norm,
        PIXEL=pixel,
        SPLITS=splits,
        CB=found["CB"],
        BS=found["BS"],
        **options(found),
    )
    small = {name: x for name, x in constants.items() if name != "LAST"}
    small |= {"PT": pt, "PT2": power_of_two(pt)}
    p2, pt2 = power_of_two(p), power_of_two(pt)
    dstate, dg = numbers(N * C * pt), numbers(N * C * pt)
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
        **small,
        NORM=norm,
        PIXEL=pixel,
        SPLITS=splits,
        CB=max(1, min(power_of_two(C), SMALL_TILE // (p2 * pt2))),
        num_warps=4,
    )
    launch(
        state_norm_backward,
        (min(N, STATE_PROGRAMS),),
        y.device,
        dstate,
        saved.narrow(0, saved_states(N, C, p, pt), N * C * pt),
        dstate_parts,
        dense(state_weight),
        saved.narrow(0, saved_size(N, C, p, pt, False) - 2 * pt, 2 * pt),
        dg,
        to[7],
        to[8],
        N,
        BATCH=state_batch,
        C=C,
        CB=rows_at_once(pt2, C),
        PT=pt,
        PT2=pt2,
        ROWS=rows_at_once(pt2, N),
        ACC=constants["ACC"],
        num_warps=4,
    )
    groups = min(N, GRADIENT_GROUPS)
    per_group = cdiv(N, groups)
    groups = cdiv(N, per_group)
    edge_numbers = {"dynamic": pt * C, "static": C * C, "none": 0}[edges]
    partial = numbers(groups * (5 * CP * pt + 5 * CP + edge_numbers))
    dr, constant, rdr = numbers(N * CP), numbers(N * CP), numbers(N * C)
    c2 = power_of_two(C)
    at_once = SMALL_TILE // max(c2 * pt2, p2 * pt2)
    launch(
        triton_backward.small_gradients,
        (C, groups),
        y.device,
        norm_bias,
        value,
        query,
        key,
        dense(edge),
        scale_bias,
        saved,
        merged,
        dg,
        dr,
        constant,
        rdr,
        partial,
        N,
        S,
        per_group,
        **small,
        C2=c2,
        NORM=norm,
        SAMPLER=sampler,
        EDGES=edges,
        PIXEL=pixel,
        SCALE=scale_weight is not None,
        SHIFT=shift_weight is not None,
        BN=max(1, min(power_of_two(per_group), at_once)),
        num_warps=4,
    )
    found = size.config("middle_input_grad")
    chunks = splits_of(found, S)
    launch(
        triton_input_grad.middle_input_grad,
        (N * chunks * cdiv(C, found["CB"]),),
        y.device,
        *view.strided,
        *grad.strided,
        *map_view_like(dy, view).strided,
        norm_bias,
        scale_bias,
        shift_bias,
        saved,
        merged,
        first,
        dr,
        constant,
        rdr,
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
        **constants,
        PT=pt,
        NORM=norm,
        SAMPLER=sampler,
        EDGES=edges,
        PIXEL=pixel,
        CHUNKS=chunks,
        CB=found["CB"],
        BS=found["BS"],
        RB=256,
        GB=rows_at_once(max(256, found["CB"] * p2), groups),
        **options(found),
    )
    return dy, *gradients
