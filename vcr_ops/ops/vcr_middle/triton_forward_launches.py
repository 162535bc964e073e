"""The middle's launches forward on Triton: 4 in training, 2 in evaluation; and the op that makes them.

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
from . import triton_forward
from .arguments import Learned, Variant, by_name
from .kept import saved_size

STATS_ROWS = 64  # groups of images, so that a prologue can merge their statistics
STATE_ROWS = 128  # groups of images whose states' statistics every program of the last pass merges


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


def sampling_of(y: Tensor, size: Sizes, variant: Variant, save: bool) -> Sampling:
    """The division, with memory for its parts."""
    N, C, p, pt, S = size[:5]
    found = sample_config(size, save)
    splits = sampler_splits(size, found, save)
    unread = variant.norm == "batch" and variant.sampler == "pool"
    one_tile = found["BS"] >= S and splits == 1 and not unread
    parts = y.new_empty((N * splits * C * (2 + p + p * pt),), dtype=acc_dtype(y.dtype)) if splits > 1 else None
    return Sampling(found, splits, one_tile, parts)


def sample(
    y: Tensor,
    size: Sizes,
    sampling: Sampling,
    stats: Stats,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    learned: Learned,
    saved: Tensor,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    variant: Variant,
    norm_eps: float,
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
        dense(learned.norm_weight),
        dense(learned.norm_bias),
        learned.value.contiguous(),
        dense(learned.query),
        dense(learned.key),
        dense(learned.logit),
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
        NORM=variant.norm,
        NORM_EPS=norm_eps,
        SAMPLER=variant.sampler,
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
    learned: Learned,
    saved: Tensor,
    variant: Variant,
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
        learned.value.contiguous(),
        dense(learned.norm_bias),
        dense(learned.edge),
        saved,
        sampling.parts,
        state_parts,
        N,
        per_row,
        **size.small_constants,
        C2=power_of_two(C),
        NORM=variant.norm,
        EDGES=variant.edges,
        SAVE=save,
        MERGE=sampling.splits > 1 and variant.sampler != "pool",
        SPLITS=sampling.splits,
        **exchange_blocks(C, pt),
        num_warps=4,
    )
    return state_parts


def modulate(
    y: Tensor,
    out: Tensor,
    size: Sizes,
    state_mean: Tensor | None,
    state_var: Tensor | None,
    learned: Learned,
    saved: Tensor,
    state_parts: Tensor | None,
    batch_state_mean: Tensor | None,
    batch_state_var: Tensor | None,
    variant: Variant,
    state_eps: float,
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
        dense(learned.norm_bias),
        dense(learned.edge),
        dense(state_mean),
        dense(state_var),
        dense(learned.state_weight),
        dense(learned.state_bias),
        dense(learned.scale_weight),
        dense(learned.shift_weight),
        learned.scale_bias.contiguous(),
        learned.shift_bias.contiguous(),
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
        NORM=variant.norm,
        EDGES=variant.edges,
        PIXEL=variant.modulation == "pixel",
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


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``vcr_middle``."""
    y, norm_mean, norm_var, state_mean, state_var, learned, norm_eps, state_eps, variant = by_name(arguments)
    save = arguments[-1]
    size = sizes_of(y, learned.value.shape)
    N, C, p, pt, _ = size[:5]
    acc = acc_dtype(y.dtype)
    out = empty_map_like(y)
    batch, state_batch = variant.norm == "batch", state_mean is None

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

    sampling = sampling_of(y, size, variant, save)
    stats = channel_statistics(y, size) if batch or sampling.needs_means else Stats(None, None, 0, 1, 1)
    found = (batch_mean, batch_var)
    sample(y, size, sampling, stats, norm_mean, norm_var, learned, saved, *found, variant, norm_eps, save)
    state_parts = reason(y, size, sampling, learned, saved, variant, save) if state_batch or save else None
    found = (batch_state_mean, batch_state_var)
    modulate(y, out, size, state_mean, state_var, learned, saved, state_parts, *found, variant, state_eps, save)
    return out, batch_mean, batch_var, batch_state_mean, batch_state_var, saved if save else numbers(0)
