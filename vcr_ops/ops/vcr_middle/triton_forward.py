"""The middle's kernels, forward: sampler and modulator with the batch norms folded in.

Training: channel_stats (1R), concept_sample (1R), concept_reason, concept_modulate (1R + 1W). Evaluation:
concept_sample and concept_modulate, whose prologue does the reasoning.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    LOWEST,
    inverse_root,
    load_channels,
    load_optional,
    load_states,
    load_tile,
    load_weight,
    map_tile,
    place,
    project,
    scalar,
    split_range,
    store_channels,
    store_covariance,
    store_states,
)
from ...triton_common.channel_stats import merge_rows
from ..concept_modulate.triton_kernels import centre_of, coefficients, modulate_sweep, project_state
from ..concept_reason.triton_kernels import (
    edges_row,
    exchange,
    normalise,
    reason_image,
    rows_stats,
    state_norm,
    store_edges,
    store_state_norm,
    store_state_part,
)
from ..concept_sample.triton_forward import (
    attend,
    attend_tile,
    finish_attention,
    image_mean,
    middling,
    score_vector,
    store_sampled,
)
from .triton_saved import (
    covariance_of,
    edges_of,
    norm_view,
    per_image,
    rstd_of,
    s_of,
    softmax_of,
    state_norm_of,
    states_at,
)


@triton.jit
def concept_sample(
    y,
    image,
    channel,
    position,
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
    NORM: tl.constexpr,
    NORM_EPS: tl.constexpr,
    SAMPLER: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    STATS_SPLITS: tl.constexpr,
    STATS_BS: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (N * SPLITS * concept blocks,). With one split r, h and R are finished here, else ``parts`` gets the sums.

    stats, image_means: what channel_stats has found, for batch statistics or split images. parts: see store_part.
    """
    row, c = place(CB, C)
    n = row // SPLITS
    split = row % SPLITS
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    # Where the images' means aren't known, a query made of them takes a sweep first. A learned one needs no mean: what
    # stands for it is but a centre, here and in the passes to come.
    KNOWN: tl.constexpr = NORM == "batch" or SPLITS > 1
    ONE_SWEEP: tl.constexpr = SAMPLER == "static" and not KNOWN and not ONE_TILE
    rows, some = map_tile(y, n, image, channel, position, c, j, C, P, LAST)
    zero = tl.zeros((CB, P2), ACC)
    tile = load_tile(rows, some, tl.arange(0, BS), S, position, LAST, ACC) if ONE_TILE else tl.zeros((1, 1, 1), ACC)

    s = tl.full((CB, P2), 1.0, ACC)
    if NORM == "none":
        mu = zero
        mhat = zero
        b = zero
    else:
        b = load_optional(norm_bias, scalar(0), c, j, 0.0, C, P, ACC)
        if NORM == "batch":
            mean, squares, count = merge_rows(
                stats, 0, stats_rows, N, S, per_group, c, j, C, P, CB, P2, STATS_BS, STATS_SPLITS, ROWS
            )
            mu = mean.to(ACC)
            rstd = inverse_root((squares / count + NORM_EPS).to(ACC), ACC)
            if row == 0:
                store_channels(batch_mean, scalar(0), c, j, mu, C, P)
                store_channels(batch_var, scalar(0), c, j, squares / (count - 1.0), C, P)
        else:
            mu = load_channels(norm_mean, scalar(0), c, j, C, P, ACC)
            rstd = inverse_root(load_channels(norm_var, scalar(0), c, j, C, P, ACC) + NORM_EPS, ACC)
        s = rstd * load_optional(norm_weight, scalar(0), c, j, 1.0, C, P, ACC)
        if row == 0:
            store_channels(saved, scalar(0), c, j, mu, C, P)
            store_channels(rstd_of(saved, C, P), scalar(0), c, j, rstd, C, P)
            store_channels(s_of(saved, C, P), scalar(0), c, j, s, C, P)
    # the image's mean less mu
    if STATS_SPLITS > 1:
        first = n * STATS_SPLITS
        exact, _, _ = merge_rows(
            stats, first, STATS_SPLITS, N, S, per_group, c, j, C, P, CB, P2, STATS_BS, STATS_SPLITS, ROWS
        )
        m = (exact - mu.to(tl.float64)).to(ACC)
    elif KNOWN:
        exact = load_channels(image_means, n, c, j, C, P, tl.float64)
        m = (exact - mu.to(tl.float64)).to(ACC)
    elif ONE_SWEEP:
        m = middling(rows, some, S, position, LAST, ACC) - mu
    else:
        m = image_mean(rows, some, position, S, mu, tile, ONE_TILE, BS, LAST, ACC)
    if NORM == "none":
        mu = m
        b = m
    else:
        mhat = m

    weight = load_weight(value, c, j, k, C, P, PT, ACC)
    if SAMPLER == "pool":
        u = zero
        r = mhat
    else:
        q, u = score_vector(s * mhat + b, query, key, logit, c, j, k, SAMPLER, C, P, PT, ACC)
        projection = s[:, :, None] * weight
        if ONE_TILE:
            maximum, total, r, R = attend_tile(
                tile, tl.arange(0, BS) < S, mu, mhat, s * u, projection, SAVE, CB, P2, PT2, ACC
            )
        else:
            begin, end = split_range(split, scalar(S), BS, SPLITS)
            maximum, total, r, R = attend(
                rows,
                some,
                position,
                begin,
                end,
                mu,
                mhat,
                s * u,
                projection,
                SAVE,
                not KNOWN and not ONE_SWEEP,
                CB,
                P2,
                PT2,
                BS,
                LAST,
                ACC,
            )
        if SPLITS == 1:
            r, R = finish_attention(total, r, R, mhat, projection, SAVE)
            store_sampled(
                per_image(saved, N, 1, C, P),
                states_at(saved, N, 0, C, P, PT),
                softmax_of(saved, N, C, P, PT),
                n,
                c,
                j,
                k,
                u,
                q,
                maximum,
                total,
                C,
                P,
                PT,
            )
            if SAVE:
                store_covariance(covariance_of(saved, N, C, P, PT), n, c, j, k, R, C, P, PT)
        else:
            store_part(parts, row, N * SPLITS, c, j, k, maximum, total, r, R, SAVE, C, P, PT)
            if split == 0:
                store_channels(per_image(saved, N, 1, C, P), n, c, j, u, C, P)
                store_states(states_at(saved, N, 0, C, P, PT), n, c, k, q, C, PT)
    if split == 0:
        store_channels(per_image(saved, N, 0, C, P), n, c, j, m, C, P)
        if SAMPLER == "pool":
            store_channels(per_image(saved, N, 1, C, P), n, c, j, u, C, P)
    if (SPLITS == 1) | (SAMPLER == "pool"):
        if split == 0:
            store_channels(per_image(saved, N, 2, C, P), n, c, j, r, C, P)
            store_states(states_at(saved, N, 1, C, P, PT), n, c, k, project(s * r + b, weight), C, PT)


@triton.jit
def store_part(
    parts,
    row,
    rows,
    c,
    j,
    k,
    maximum,
    total,
    r,
    R,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
):
    """Row ``row`` of the splits' sums: maximum, total (rows, C); r (rows, C*p); R (rows, C*p, pt)."""
    many = scalar(rows).to(tl.int64) * C
    tl.store(parts + row.to(tl.int64) * C + c, maximum, mask=c < C)
    tl.store(parts + many + row.to(tl.int64) * C + c, total, mask=c < C)
    store_channels(parts + 2 * many, row, c, j, r, C, P)
    if SAVE:
        store_covariance(parts + 2 * many + many * P, row, c, j, k, R, C, P, PT)


@triton.jit
def merge_parts(
    parts,
    n,
    N,
    c,
    j,
    k,
    SPLITS: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    CB: tl.constexpr,
    ACC: tl.constexpr,
):
    """attend's results for all of image n, its splits merged in order."""
    rows = scalar(N) * SPLITS
    many = rows.to(tl.int64) * C
    first = n.to(tl.int64) * SPLITS
    top = tl.full((CB,), LOWEST, ACC)
    for split in tl.static_range(0, SPLITS):
        top = tl.maximum(top, tl.load(parts + (first + split) * C + c, mask=c < C, other=LOWEST))
    total = tl.zeros((CB,), ACC)
    r = tl.zeros((CB, P2), ACC)
    R = tl.zeros((CB, P2, PT2), ACC)
    for split in tl.static_range(0, SPLITS):
        row = first + split
        maximum = tl.load(parts + row * C + c, mask=c < C, other=LOWEST)
        share = tl.exp(maximum - top)
        total += share * tl.load(parts + many + row * C + c, mask=c < C, other=1.0)
        r += share[:, None] * load_channels(parts + 2 * many, row, c, j, C, P, ACC)
        if SAVE:
            at = (row * (C * P) + c[:, None, None] * P + j[None, :, None]) * PT + k[None, None, :]
            mask = (c[:, None, None] < C) & (j[None, :, None] < P) & (k[None, None, :] < PT)
            R += share[:, None, None] * tl.load(parts + 2 * many + many * P + at, mask=mask, other=0.0)
    return top, total, r, R


@triton.jit
def finish_sample(
    parts,
    saved,
    norm_bias,
    value,
    n,
    N,
    c,
    j,
    k,
    NORM: tl.constexpr,
    SAVE: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    CB: tl.constexpr,
    ACC: tl.constexpr,
):
    """h (CB, PT2) of image n from its splits, and (maximum, total, r, R)."""
    mu, s, b, mhat = norm_view(saved, norm_bias, n, N, c, j, NORM, C, P, ACC)
    maximum, total, r, R = merge_parts(parts, n, N, c, j, k, SPLITS, SAVE, C, P, P2, PT, PT2, CB, ACC)
    weight = load_weight(value, c, j, k, C, P, PT, ACC)
    r, R = finish_attention(total, r, R, mhat, s[:, :, None] * weight, SAVE)
    return project(s * r + b, weight), maximum, total, r, R


@triton.jit
def concept_reason(
    value,
    norm_bias,
    edge,
    saved,
    parts,
    state_parts,
    N,
    per_row,
    NORM: tl.constexpr,
    EDGES: tl.constexpr,
    SAVE: tl.constexpr,
    MERGE: tl.constexpr,
    SPLITS: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ACC: tl.constexpr,
):
    """G = H + A H of ``per_row`` images, and their row of state_parts (see store_state_part). Grid (rows,).

    MERGE: the sampler has left each image in splits.
    """
    row = tl.program_id(0)
    k = tl.arange(0, PT2)
    h_at = states_at(saved, N, 1, C, P, PT)
    g_to = states_at(saved, N, 2, C, P, PT)
    edges_to = edges_of(saved, N, C, P, PT)
    first = row * per_row
    mean = tl.zeros((PT2,), tl.float64)
    squares = tl.zeros((PT2,), tl.float64)
    for image in range(first, tl.minimum(first + per_row, N)):
        n = scalar(image)
        if MERGE:
            c = tl.arange(0, C2)
            j = tl.arange(0, P2)
            h, maximum, total, r, R = finish_sample(
                parts, saved, norm_bias, value, n, N, c, j, k, NORM, SAVE, SPLITS, C, P, P2, PT, PT2, C2, ACC
            )
            store_channels(per_image(saved, N, 2, C, P), n, c, j, r, C, P)
            at = softmax_of(saved, N, C, P, PT) + (n.to(tl.int64) * C + c) * 3
            tl.store(at, maximum, mask=c < C)
            tl.store(at + 1, total, mask=c < C)
            if SAVE:
                store_covariance(covariance_of(saved, N, C, P, PT), n, c, j, k, R, C, P, PT)
            store_states(h_at, n, c, k, h, C, PT)
            g = h
            if EDGES != "none":
                a = edges_row(h, edge, c, c, k, EDGES, C, PT, ACC)
                if SAVE & (EDGES == "dynamic"):
                    store_edges(edges_to, n, c, c, a, C)
                g = h + tl.sum(a[:, :, None] * h[None, :, :], 1)
            store_states(g_to, n, c, k, g, C, PT)
            image_mean, image_squares = rows_stats(g, c, scalar(C).to(tl.float64), C)
        else:
            image_mean, image_squares = reason_image(h_at, edge, g_to, edges_to, n, k, EDGES, SAVE, RB, DB, C, PT, ACC)
        done = scalar(image - first).to(tl.float64)
        apart = image_mean - mean
        mean += apart / (done + 1.0)
        squares += image_squares + apart * apart * (C * done / (done + 1.0))
    store_state_part(state_parts, row, k, mean, squares, PT)


@triton.jit
def concept_modulate(
    y,
    image,
    channel,
    position,
    out,
    out_image,
    out_channel,
    out_position,
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
    N,
    S,
    state_rows,
    per_row,
    NORM: tl.constexpr,
    EDGES: tl.constexpr,
    PIXEL: tl.constexpr,
    STATE_BATCH: tl.constexpr,
    STATE_EPS: tl.constexpr,
    REASONED: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNKS: tl.constexpr,
    DB: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    ROWS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (N * CHUNKS of positions * concept blocks,). The prologue takes the concepts from G, or from H where no
    kernel has reasoned before (REASONED), to their scale and shift."""
    row, c = place(CB, C)
    n = row // CHUNKS
    chunk = row % CHUNKS
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    mu, s, b, mhat = norm_view(saved, norm_bias, n, N, c, j, NORM, C, P, ACC)
    v = tl.zeros((CB, P2), ACC)
    maximum = tl.zeros((CB,), ACC)
    if PIXEL:
        v = s * load_channels(per_image(saved, N, 1, C, P), n, c, j, C, P, ACC)
    if REASONED:
        g = load_states(states_at(saved, N, 2, C, P, PT), n, c, k, C, PT, ACC)
        if PIXEL:
            maximum = tl.load(softmax_of(saved, N, C, P, PT) + (n.to(tl.int64) * C + c) * 3, mask=c < C, other=0.0)
    else:
        h_from = states_at(saved, N, 1, C, P, PT)
        h_mine = load_states(h_from, n, c, k, C, PT, ACC)
        if PIXEL:
            maximum = tl.load(softmax_of(saved, N, C, P, PT) + (n.to(tl.int64) * C + c) * 3, mask=c < C, other=0.0)
        g = exchange(h_mine, h_from, edge, saved, n, c, k, EDGES, False, DB, C, PT, ACC)
    first = tl.program_id(0) == 0
    mean, rstd, var = state_norm(
        state_parts, state_mean, state_var, state_rows, per_row, N, k, STATE_EPS, STATE_BATCH, ONE_BLOCK, C, PT, ROWS
    )
    if STATE_BATCH:
        if first:
            tl.store(batch_state_mean + k, mean.to(ACC), mask=k < PT)
            tl.store(batch_state_var + k, var.to(ACC), mask=k < PT)
    state = normalise(g, mean, rstd, state_weight, state_bias, k, PT, ACC)
    state = tl.where((c < C)[:, None] & (k < PT)[None, :], state, 0.0)
    abar = project_state(state, scale_weight, c, j, k, C, P, PT, ACC)
    bbar = project_state(state, shift_weight, c, j, k, C, P, PT, ACC)
    if SAVE:
        if first:
            store_state_norm(state_norm_of(saved, N, C, P, PT), k, rstd, mean, PT)
        if chunk == 0:
            store_states(states_at(saved, N, 3, C, P, PT), n, c, k, state, C, PT)
            store_channels(per_image(saved, N, 3, C, P), n, c, j, abar, C, P)
            store_channels(per_image(saved, N, 4, C, P), n, c, j, bbar, C, P)
    A1, B1, A0, B0 = coefficients(abar, bbar, s, b, scale_bias, shift_bias, c, j, PIXEL, C, P, ACC)
    mu = centre_of(mu, s, b, A0, PIXEL)
    rows, some = map_tile(y, n, image, channel, position, c, j, C, P, LAST)
    out_rows, _ = map_tile(out, n, out_image, out_channel, out_position, c, j, C, P, LAST)
    begin, end = split_range(chunk, scalar(S), BS, CHUNKS)
    modulate_sweep(
        rows, out_rows, some, begin, end, position, out_position, mu, v, maximum, A1, B1, A0, B0, PIXEL, BS, LAST, ACC
    )
