"""Pass ``concept_sample``: attention pooling over the map, centred (contract: attend; paper, Eq. 1 and 2).

z = s * yhat + b with yhat = y - mu. Logits are ``yhat . v``, v = s * u, u = W^k q / sqrt(pt) or the learned vector: what
is left out is constant over positions. Every lane keeps a softmax of its own (maximum, sum, weighted sums); lanes, and
splits of an image, are merged at the end in a fixed order.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    LOWEST,
    load_channels,
    load_optional,
    load_tile,
    load_weight,
    map_tile,
    project,
    project_back,
    scalar,
    split_range,
    store_channels,
)
from ...triton_common.channel_stats import sweep_stats


@triton.jit
def score_vector(
    zbar,
    query,
    key,
    logit,
    c,
    j,
    k,
    SAMPLER: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(q (CB, PT2), u (CB, P2)) from the mean of z (CB, P2)."""
    if SAMPLER == "dynamic":
        q = project(zbar, load_weight(query, c, j, k, C, P, PT, ACC))
        u = project_back(q, load_weight(key, c, j, k, C, P, PT, ACC)) * (1.0 / tl.sqrt(tl.full((), PT, ACC)))
        return q, u
    else:
        return tl.zeros((c.shape[0], k.shape[0]), ACC), load_channels(logit, scalar(0), c, j, C, P, ACC)


@triton.jit
def attend(
    rows,
    some,
    position,
    begin,
    end,
    mu,
    mhat,
    v,
    projection,
    ONE_TILE: tl.constexpr,
    tile,
    COVARIANCE: tl.constexpr,
    CB: tl.constexpr,
    P2: tl.constexpr,
    PT2: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """One sweep over [begin, end): the softmax's maximum and sum (CB,), and with its unnormalised weights the sums of
    x = yhat - mhat (CB, P2) and, for the covariance, of x (x projection) (CB, P2, PT2)."""
    lanes = tl.arange(0, BS)
    top = tl.full((CB, BS), LOWEST, ACC)
    total = tl.zeros((CB, BS), ACC)
    r = tl.zeros((CB, P2, BS), ACC)
    R = tl.zeros((CB, P2, PT2, BS), ACC) if COVARIANCE else tl.zeros((1, 1, 1, 1), ACC)
    for start in range(begin, end, BS):
        i = start + lanes
        inside = (i < end)[None, :]
        y = tile if ONE_TILE else load_tile(rows, some, i, end, position, LAST, ACC)
        yhat = y - mu[:, :, None]
        logits = tl.sum(yhat * v[:, :, None], 1)
        new = tl.where(inside, tl.maximum(top, logits), top)
        old = tl.exp(top - new)
        e = tl.where(inside, tl.exp(logits - new), 0.0)
        x = tl.where(inside[:, None, :], yhat - mhat[:, :, None], 0.0)
        weighed = e[:, None, :] * x
        r = r * old[:, None, :] + weighed
        if COVARIANCE:
            states = tl.sum(x[:, :, None, :] * projection[:, :, :, None], 1)
            R = R * old[:, None, None, :] + weighed[:, :, None, :] * states[:, None, :, :]
        total = total * old + e
        top = new
    maximum = tl.max(top, 1)
    share = tl.exp(top - maximum[:, None])
    total_all = tl.sum(total * share, 1)
    r_all = tl.sum(r * share[:, None, :], 2)
    if COVARIANCE:
        return maximum, total_all, r_all, tl.sum(R * share[:, None, None, :], 3)
    else:
        return maximum, total_all, r_all, tl.zeros((CB, P2, PT2), ACC)


@triton.jit
def finish_attention(total, r, R, mhat, projection, COVARIANCE: tl.constexpr):
    """(r = mhat + the mean of x under attention, R = Cov_a(yhat, yhat projection)) from attend's sums."""
    mean = r / total[:, None]
    if COVARIANCE:
        return mhat + mean, R / total[:, None, None] - mean[:, :, None] * project(mean, projection)[:, None, :]
    else:
        return mhat + mean, R


@triton.jit
def image_mean(
    rows,
    some,
    position,
    S,
    center,
    tile,
    ONE_TILE: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """(CB, P2): the mean of an image less ``center``."""
    if ONE_TILE:
        inside = (tl.arange(0, BS) < S)[None, None, :]
        return tl.sum(tl.where(inside & some, tile - center[:, :, None], 0.0), 2) / S
    else:
        mean, _ = sweep_stats(rows, some, center, scalar(0), scalar(S), position, False, BS, LAST, ACC)
        return mean


@triton.jit
def store_attention(
    attention,
    n,
    c,
    rows,
    some,
    position,
    S,
    mu,
    v,
    maximum,
    total,
    C: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The softmax itself, (N, C, S)."""
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        yhat = load_tile(rows, some, i, S, position, LAST, ACC) - mu[:, :, None]
        a = tl.exp(tl.sum(yhat * v[:, :, None], 1) - maximum[:, None]) / total[:, None]
        at = (n.to(tl.int64) * C + c)[:, None] * S + i[None, :]
        tl.store(attention + at, a, mask=(c < C)[:, None] & (i < S)[None, :])


@triton.jit
def concept_sample(
    z,
    image,
    channel,
    position,
    value,
    query,
    key,
    logit,
    h,
    attention,
    saved,
    N,
    S,
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
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sampler alone, z centred on each image's own mean. Grid (N, concept blocks).

    ``saved`` is m, u, r (N, C*p), q (N, C, pt), the softmax's (maximum, sum, unused) (N, C, 3), R (N, C*p, pt).
    """
    n = tl.program_id(0)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    rows, some = map_tile(z, n, image, channel, position, c, j, C, P, LAST)
    maps = scalar(N).to(tl.int64) * (C * P)
    zero = tl.zeros((CB, P2), ACC)
    tile = load_tile(rows, some, tl.arange(0, BS), S, position, LAST, ACC) if ONE_TILE else tl.zeros((1, 1, 1), ACC)
    mu = image_mean(rows, some, position, S, zero, tile, ONE_TILE, BS, LAST, ACC)
    weight = load_weight(value, c, j, k, C, P, PT, ACC)
    if SAMPLER == "pool":
        r = zero
        if SAVE:
            store_channels(saved + maps, n, c, j, zero, C, P)
    else:
        q, u = score_vector(mu, query, key, logit, c, j, k, SAMPLER, C, P, PT, ACC)
        maximum, total, r, R = attend(
            rows, some, position, 0, scalar(S), mu, zero, u, weight, ONE_TILE, tile, SAVE, CB, P2, PT2, BS, LAST, ACC
        )
        r, R = finish_attention(total, r, R, zero, weight, SAVE)
        if SAVE:
            store_sampled(saved + maps, saved + 3 * maps, saved + 3 * maps + states_size(N, C, PT), n, c, j, k, u, q, maximum, total, C, P, PT)
            store_covariance(saved + 3 * maps + states_size(N, C, PT) + scalar(N).to(tl.int64) * (3 * C), n, c, j, k, R, C, P, PT)
        if attention is not None:
            store_attention(attention, n, c, rows, some, position, S, mu, u, maximum, total, C, BS, LAST, ACC)
    if SAVE:
        store_channels(saved, n, c, j, mu, C, P)
        store_channels(saved + 2 * maps, n, c, j, r, C, P)
    store_states(h, n, c, k, project(mu + r, weight), C, PT)


@triton.jit
def states_size(N, C: tl.constexpr, PT: tl.constexpr):
    """N * C * pt in 64 bits."""
    return scalar(N).to(tl.int64) * (C * PT)


@triton.jit
def store_states(base, n, c, k, x, C: tl.constexpr, PT: tl.constexpr):
    """(CB, PT2) into image n of an array (N, C, pt)."""
    at = (n.to(tl.int64) * C + c)[:, None] * PT + k[None, :]
    tl.store(base + at, x, mask=(c < C)[:, None] & (k < PT)[None, :])


@triton.jit
def load_states(base, n, c, k, C: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """The reverse of store_states."""
    at = (n.to(tl.int64) * C + c)[:, None] * PT + k[None, :]
    return tl.load(base + at, mask=(c < C)[:, None] & (k < PT)[None, :], other=0.0).to(ACC)


@triton.jit
def store_sampled(
    u_to, q_to, softmax_to, n, c, j, k, u, q, maximum, total, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr
):
    """What later passes need of the softmax of image n."""
    store_channels(u_to, n, c, j, u, C, P)
    store_states(q_to, n, c, k, q, C, PT)
    at = (n.to(tl.int64) * C + c) * 3
    tl.store(softmax_to + at, maximum, mask=c < C)
    tl.store(softmax_to + at + 1, total, mask=c < C)


@triton.jit
def store_covariance(base, n, c, j, k, R, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(CB, P2, PT2) into image n of an array (N, C*p, pt)."""
    at = (n.to(tl.int64) * (C * P) + c[:, None, None] * P + j[None, :, None]) * PT + k[None, None, :]
    mask = (c[:, None, None] < C) & (j[None, :, None] < P) & (k[None, None, :] < PT)
    tl.store(base + at, R, mask=mask)
