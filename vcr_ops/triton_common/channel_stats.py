"""Pass ``channel_stats``: mean and centred sum of squares of every channel; 1 read of the map.

Partial results go to ``partial`` (rows, 2, C*p): a row for each group of whole images, or, where an image is split, for
each (image, split). Lanes keep running means (Welford), lanes, images and rows are merged by Chan's formula, never by
``sum y^2 - (sum y)^2 / n``. Everything is relative to a pivot per channel, the map's first value there.
"""

import triton
import triton.language as tl

from .blocks import load_channels, load_tile, map_tile, scalar, split_range, store_channels


@triton.jit
def pivot_of(
    y,
    channel,
    center,
    c,
    j,
    CENTERED: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """(CB, P2): the statistics' origin: ``center`` (C*p), else the first value, if finite; 0 where not CENTERED."""
    if not CENTERED:
        return tl.zeros((c.shape[0], j.shape[0]), ACC)
    elif center is None:
        channels = (c[:, None] * P + j[None, :]).to(tl.int64)
        offsets = channels if LAST else channels * channel
        x = tl.load(y + offsets, mask=(c[:, None] < C) & (j[None, :] < P), other=0.0).to(ACC)
        return tl.where(x - x == 0.0, x, 0.0)
    else:
        return load_channels(center, scalar(0), c, j, C, P, ACC)


@triton.jit
def sweep_stats(
    rows,
    some,
    pivot,
    begin,
    end,
    position,
    SQUARES: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """(mean - pivot, centred sum of squares) over the positions [begin, end), each (CB, P2)."""
    mean = tl.zeros((pivot.shape[0], pivot.shape[1], BS), ACC)
    squares = tl.zeros((pivot.shape[0], pivot.shape[1], BS), ACC)
    count = tl.zeros((BS,), ACC)
    lanes = tl.arange(0, BS)
    turn = tl.full((), 0.0, ACC)
    for start in range(begin, end, BS):
        i = start + lanes
        turn += 1.0
        inside = (i < end)[None, None, :]
        x = load_tile(rows, some, i, end, position, LAST, ACC) - pivot[:, :, None]
        step = tl.where(inside, x - mean, 0.0)
        mean += step * (1.0 / turn)
        if SQUARES:
            squares += step * tl.where(inside, x - mean, 0.0)
        count += tl.where(i < end, 1.0, 0.0)
    total = tl.maximum((end - begin).to(ACC), 1.0)
    merged = tl.sum(mean * count[None, None, :], 2) / total
    if SQUARES:
        apart = mean - merged[:, :, None]
        return merged, tl.sum(squares + count[None, None, :] * apart * apart, 2)
    else:
        return merged, merged


@triton.jit
def channel_stats(
    y,
    image,
    channel,
    position,
    center,
    means,
    partial,
    N,
    S,
    per_group,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    SPLITS: tl.constexpr,
    CENTERED: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (rows of ``partial``, concept blocks). SPLITS == 1: ``means`` (N, C*p) gets the images' means less the
    pivot."""
    row = tl.program_id(0)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    j = tl.arange(0, P2)
    pivot = pivot_of(y, channel, center, c, j, CENTERED, C, P, LAST, ACC)
    if SPLITS == 1:
        mean = tl.zeros((CB, P2), ACC)
        squares = tl.zeros((CB, P2), ACC)
        first = row * per_group
        for n in range(first, tl.minimum(first + per_group, N)):
            rows, some = map_tile(y, scalar(n), image, channel, position, c, j, C, P, LAST)
            begin, end = split_range(0, scalar(S), BS, SPLITS)
            image_mean, image_squares = sweep_stats(rows, some, pivot, begin, end, position, True, BS, LAST, ACC)
            store_channels(means, scalar(n), c, j, image_mean, C, P)
            done = scalar(n - first).to(ACC)
            apart = image_mean - mean
            mean += apart / (done + 1.0)
            squares += image_squares + apart * apart * (S * done / (done + 1.0))
    else:
        rows, some = map_tile(y, row // SPLITS, image, channel, position, c, j, C, P, LAST)
        begin, end = split_range(row % SPLITS, S, BS, SPLITS)
        mean, squares = sweep_stats(rows, some, pivot, begin, end, position, True, BS, LAST, ACC)
    store_channels(partial, 2 * row, c, j, mean, C, P)
    store_channels(partial, 2 * row + 1, c, j, squares, C, P)


@triton.jit
def merge_rows(
    partial,
    first,
    count,
    N,
    S,
    per_group,
    c,
    j,
    C: tl.constexpr,
    P: tl.constexpr,
    CB: tl.constexpr,
    P2: tl.constexpr,
    BS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows [first, first + count) of ``partial`` merged: (mean - pivot, centred sum of squares, number of values)."""
    lanes = tl.arange(0, ROWS)
    some = (c[None, :, None] < C) & (j[None, None, :] < P)
    at = (c[None, :, None] * P + j[None, None, :]).to(tl.int64)
    total = tl.zeros((), ACC)
    weighted = tl.zeros((CB, P2), ACC)
    for start in range(0, count, ROWS):
        row = first + start + lanes
        values = tl.where(start + lanes < count, values_in_row(row, N, S, per_group, BS, SPLITS), 0).to(ACC)
        mask = some & (start + lanes < count)[:, None, None]
        mean = tl.load(partial + (2 * row.to(tl.int64) * (C * P))[:, None, None] + at, mask=mask, other=0.0)
        total += tl.sum(values, 0)
        weighted += tl.sum(mean * values[:, None, None], 0)
    mean_all = weighted / tl.maximum(total, 1.0)
    squares_all = tl.zeros((CB, P2), ACC)
    for start in range(0, count, ROWS):
        row = first + start + lanes
        values = tl.where(start + lanes < count, values_in_row(row, N, S, per_group, BS, SPLITS), 0).to(ACC)
        mask = some & (start + lanes < count)[:, None, None]
        pointers = partial + (2 * row.to(tl.int64) * (C * P))[:, None, None] + at
        apart = tl.load(pointers, mask=mask, other=0.0) - mean_all[None, :, :]
        squares = tl.load(pointers + C * P, mask=mask, other=0.0)
        squares_all += tl.sum(squares + values[:, None, None] * apart * apart, 0)
    return mean_all, squares_all, total


@triton.jit
def values_in_row(row, N, S, per_group, BS: tl.constexpr, SPLITS: tl.constexpr):
    """How many values of a channel stand behind the rows ``row`` of ``partial``."""
    if SPLITS == 1:
        return tl.maximum(tl.minimum(N - row * per_group, per_group), 0).to(tl.int64) * S
    else:
        begin, end = split_range(row % SPLITS, S, BS, SPLITS)
        return end - begin
