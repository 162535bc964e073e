"""Pass ``channel_stats``: mean and centred sum of squares of every channel; 1 read of the map.

Partial results go to ``partial`` (rows, 2, C*p), float64: a row for each group of whole images, or, where an image is
split, for each (image, split). A mean may be far smaller than the values, so lanes keep their sums together with what
rounding took away. Squares are centred: lanes keep running means relative to a pivot, the map's first value (Welford);
lanes, images and rows are merged by Chan's formula, never by ``sum y^2 - (sum y)^2 / n``.
"""

import triton
import triton.language as tl

from .blocks import load_tile, map_tile, place, scalar, split_range, store_channels


@triton.jit
def pivot_of(y, channel, c, j, C: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr):
    """(CB, P2): the first value of each channel, if it is finite, else 0."""
    channels = (c[:, None] * P + j[None, :]).to(tl.int64)
    offsets = channels if LAST else channels * channel
    x = tl.load(y + offsets, mask=(c[:, None] < C) & (j[None, :] < P), other=0.0).to(ACC)
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def sweep_stats(rows, some, pivot, begin, end, position, BS: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr):
    """(mean, centred sum of squares) over the positions [begin, end), each (CB, P2) float64."""
    total = tl.zeros((pivot.shape[0], pivot.shape[1], BS), ACC)
    lost = tl.zeros((pivot.shape[0], pivot.shape[1], BS), ACC)
    mean = tl.zeros((pivot.shape[0], pivot.shape[1], BS), ACC)
    squares = tl.zeros((pivot.shape[0], pivot.shape[1], BS), ACC)
    count = tl.zeros((BS,), ACC)
    lanes = tl.arange(0, BS)
    turn = tl.full((), 0.0, ACC)
    for start in range(begin, end, BS):
        i = start + lanes
        turn += 1.0
        inside = (i < end)[None, None, :]
        y = load_tile(rows, some, i, end, position, LAST, ACC)
        # total + y, and what rounding takes of it (Knuth)
        new = total + y
        taken = new - total
        lost += (total - (new - taken)) + (y - taken)
        total = new
        x = y - pivot[:, :, None]
        step = tl.where(inside, x - mean, 0.0)
        mean += step * (1.0 / turn)
        squares += step * tl.where(inside, x - mean, 0.0)
        count += tl.where(i < end, 1.0, 0.0)
    values = tl.maximum((end - begin).to(tl.float64), 1.0)
    exact = (tl.sum(total.to(tl.float64), 2) + tl.sum(lost.to(tl.float64), 2)) / values
    merged = tl.sum(mean * count[None, None, :], 2) / values.to(ACC)
    apart = mean - merged[:, :, None]
    return exact, tl.sum(squares + count[None, None, :] * apart * apart, 2).to(tl.float64)


@triton.jit
def channel_stats(
    y,
    image,
    channel,
    position,
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
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (rows of ``partial`` * concept blocks,). SPLITS == 1: ``means`` (N, C*p), float64, gets the images'
    means."""
    row, c = place(CB, C)
    j = tl.arange(0, P2)
    pivot = pivot_of(y, channel, c, j, C, P, LAST, ACC)
    if SPLITS == 1:
        mean = tl.zeros((CB, P2), tl.float64)
        squares = tl.zeros((CB, P2), tl.float64)
        first = row * per_group
        for n in range(first, tl.minimum(first + per_group, N)):
            rows, some = map_tile(y, scalar(n), image, channel, position, c, j, C, P, LAST)
            begin, end = split_range(0, scalar(S), BS, SPLITS)
            image_mean, image_squares = sweep_stats(rows, some, pivot, begin, end, position, BS, LAST, ACC)
            store_channels(means, scalar(n), c, j, image_mean, C, P)
            done = scalar(n - first).to(tl.float64)
            apart = image_mean - mean
            mean += apart / (done + 1.0)
            squares += image_squares + apart * apart * (S * done / (done + 1.0))
    else:
        rows, some = map_tile(y, row // SPLITS, image, channel, position, c, j, C, P, LAST)
        begin, end = split_range(row % SPLITS, S, BS, SPLITS)
        mean, squares = sweep_stats(rows, some, pivot, begin, end, position, BS, LAST, ACC)
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
):
    """Rows [first, first + count) of ``partial`` merged: (mean, centred sum of squares, number of values), float64."""
    lanes = tl.arange(0, ROWS)
    some = (c[None, :, None] < C) & (j[None, None, :] < P)
    at = (c[None, :, None] * P + j[None, None, :]).to(tl.int64)
    total = tl.zeros((), tl.float64)
    weighted = tl.zeros((CB, P2), tl.float64)
    for start in range(0, count, ROWS):
        row = first + start + lanes
        values = tl.where(start + lanes < count, values_in_row(row, N, S, per_group, BS, SPLITS), 0).to(tl.float64)
        mask = some & (start + lanes < count)[:, None, None]
        mean = tl.load(partial + (2 * row.to(tl.int64) * (C * P))[:, None, None] + at, mask=mask, other=0.0)
        total += tl.sum(values, 0)
        weighted += tl.sum(mean * values[:, None, None], 0)
    mean_all = weighted / tl.maximum(total, 1.0)
    squares_all = tl.zeros((CB, P2), tl.float64)
    for start in range(0, count, ROWS):
        row = first + start + lanes
        values = tl.where(start + lanes < count, values_in_row(row, N, S, per_group, BS, SPLITS), 0).to(tl.float64)
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
