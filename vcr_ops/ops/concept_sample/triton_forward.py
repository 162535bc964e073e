"""Pass ``concept_sample``: attention pooling over the map, centred (contract: attend; paper, Eq. 1 and 2).

z = s * yhat + b with yhat = y - mu. Logits are ``yhat . v``, v = s * u, u = W^k q / sqrt(pt) or the learned vector:
what is left out is constant over positions. Every lane keeps a softmax of its own (maximum, sum, weighted sums); lanes,
and splits of an image, are merged at the end in a fixed order.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    LOWEST,
    load_channels,
    load_tile,
    load_weight,
    map_tile,
    place,
    project,
    project_back,
    scalar,
    store_channels,
    store_covariance,
    store_states,
)


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
    near,
    v,
    projection,
    COVARIANCE: tl.constexpr,
    BACK: tl.constexpr,
    CB: tl.constexpr,
    P2: tl.constexpr,
    PT2: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """One sweep over [begin, end): the softmax's maximum and sum (CB,); with its unnormalised weights the sums of
    x = yhat - near (CB, P2) and, for the covariance, of x (x projection) (CB, P2, PT2).

    ``near`` is the mean, or not far from it. Where p <= pt, x x^T is summed, and projected once, at the end. BACK: from
    the last tile to the first, since the last ones of an earlier sweep are those that a cache still has.
    """
    NARROW: tl.constexpr = P2 <= PT2
    WIDTH: tl.constexpr = P2 if NARROW else PT2
    lanes = tl.arange(0, BS)
    top = tl.full((CB, BS), LOWEST, ACC)
    total = tl.zeros((CB, BS), ACC)
    r = tl.zeros((CB, P2, BS), ACC)
    R = tl.zeros((CB, P2, WIDTH, BS), ACC) if COVARIANCE else tl.zeros((1, 1, 1, 1), ACC)
    last = begin + (tl.cdiv(end - begin, BS) - 1) * BS
    for start in range(begin, end, BS):
        i = (last - (start - begin) if BACK else start) + lanes
        inside = (i < end)[None, :]
        yhat = load_tile(rows, some, i, end, position, LAST, ACC) - mu[:, :, None]
        logits = tl.sum(yhat * v[:, :, None], 1)
        new = tl.where(inside, tl.maximum(top, logits), top)
        old = tl.exp(top - new)
        e = tl.where(inside, tl.exp(logits - new), 0.0)
        x = tl.where(inside[:, None, :], yhat - near[:, :, None], 0.0)
        weighed = e[:, None, :] * x
        r = tl.fma(r, tl.broadcast_to(old[:, None, :], r.shape), weighed)
        if COVARIANCE:
            states = x if NARROW else tl.sum(x[:, :, None, :] * projection[:, :, :, None], 1)
            products = weighed[:, :, None, :] * states[:, None, :, :]
            R = tl.fma(R, tl.broadcast_to(old[:, None, None, :], R.shape), products)
        total = tl.fma(total, old, e)
        top = new
    maximum = tl.max(top, 1)
    share = tl.exp(top - maximum[:, None])
    total_all = tl.sum(total * share, 1)
    r_all = tl.sum(r * share[:, None, :], 2)
    if COVARIANCE:
        R_all = tl.sum(R * share[:, None, None, :], 3)
        if NARROW:
            R_all = tl.sum(R_all[:, :, :, None] * projection[:, None, :, :], 2)
        return maximum, total_all, r_all, R_all
    else:
        return maximum, total_all, r_all, tl.zeros((CB, P2, PT2), ACC)


@triton.jit
def attend_tile(
    tile,
    inside,
    mu,
    near,
    v,
    projection,
    COVARIANCE: tl.constexpr,
    CB: tl.constexpr,
    P2: tl.constexpr,
    PT2: tl.constexpr,
    ACC: tl.constexpr,
):
    """attend's results of an image that is one tile (CB, P2, BS), of which the positions ``inside`` (BS,) count."""
    inside = inside[None, :]
    yhat = tile - mu[:, :, None]
    logits = tl.where(inside, tl.sum(yhat * v[:, :, None], 1), LOWEST)
    maximum = tl.maximum(tl.max(logits, 1), LOWEST)
    e = tl.where(inside, tl.exp(logits - maximum[:, None]), 0.0)
    x = tl.where(inside[:, None, :], yhat - near[:, :, None], 0.0)
    weighed = e[:, None, :] * x
    if COVARIANCE:
        states = tl.sum(x[:, :, None, :] * projection[:, :, :, None], 1)
        R = tl.sum(weighed[:, :, None, :] * states[:, None, :, :], 3)
    else:
        R = tl.zeros((CB, P2, PT2), ACC)
    return maximum, tl.sum(e, 1), tl.sum(weighed, 2), R


@triton.jit
def finish_attention(total, r, R, near, projection, COVARIANCE: tl.constexpr):
    """(r = near + the mean of x under attention, R = Cov_a(yhat, yhat projection)) from attend's sums."""
    mean = r / total[:, None]
    if COVARIANCE:
        return near + mean, R / total[:, None, None] - mean[:, :, None] * project(mean, projection)[:, None, :]
    else:
        return near + mean, R


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
        total = tl.zeros((center.shape[0], center.shape[1], BS), ACC)
        for start in range(0, S, BS):
            i = start + tl.arange(0, BS)
            y = load_tile(rows, some, i, S, position, LAST, ACC)
            total += tl.where((i < S)[None, None, :], y - center[:, :, None], 0.0)
        return tl.sum(total, 2) / S


@triton.jit
def middling(rows, some, S, position, LAST: tl.constexpr, ACC: tl.constexpr):
    """(CB, P2): an image's median of its first, middle and last position (0 where it isn't finite), which is not far
    from the mean."""
    middle = scalar(S) // 2
    last = scalar(S) - 1
    step = scalar(position).to(tl.int64) if LAST else 1
    a = tl.sum(tl.load(rows, mask=some, other=0.0).to(ACC), 2)
    b = tl.sum(tl.load(rows + middle * step, mask=some, other=0.0).to(ACC), 2)
    c = tl.sum(tl.load(rows + last * step, mask=some, other=0.0).to(ACC), 2)
    x = tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
    return tl.where(x - x == 0.0, x, 0.0)


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
    tile,
    ONE_TILE: tl.constexpr,
    C: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The softmax itself, (N, C, S); 1R where the image is more than one tile."""
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        y = tile if ONE_TILE else load_tile(rows, some, i, S, position, LAST, ACC)
        yhat = y - mu[:, :, None]
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
    """The sampler alone, z centred on each image's own mean, or near it. Grid (N * concept blocks,).

    ``saved`` is m, u, r (N, C*p), q (N, C, pt), the softmax's (maximum, sum, unused) (N, C, 3), R (N, C*p, pt).
    """
    n, c = place(CB, C)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    rows, some = map_tile(z, n, image, channel, position, c, j, C, P, LAST)
    maps = scalar(N).to(tl.int64) * (C * P)
    zero = tl.zeros((CB, P2), ACC)
    tile = load_tile(rows, some, tl.arange(0, BS), S, position, LAST, ACC) if ONE_TILE else tl.zeros((1, 1, 1), ACC)
    weight = load_weight(value, c, j, k, C, P, PT, ACC)
    ONE_SWEEP: tl.constexpr = SAMPLER == "static" and not ONE_TILE
    near = zero
    if ONE_SWEEP:
        mu = middling(rows, some, S, position, LAST, ACC)
    else:
        mu = image_mean(rows, some, position, S, zero, tile, ONE_TILE, BS, LAST, ACC)
    if SAMPLER == "pool":
        r = zero
        if SAVE:
            store_channels(saved + maps, n, c, j, zero, C, P)
    else:
        q, u = score_vector(mu, query, key, logit, c, j, k, SAMPLER, C, P, PT, ACC)
        if ONE_TILE:
            maximum, total, r, R = attend_tile(tile, tl.arange(0, BS) < S, mu, near, u, weight, SAVE, CB, P2, PT2, ACC)
        else:
            maximum, total, r, R = attend(
                rows,
                some,
                position,
                0,
                scalar(S),
                mu,
                near,
                u,
                weight,
                SAVE,
                not ONE_SWEEP,
                CB,
                P2,
                PT2,
                BS,
                LAST,
                ACC,
            )
        r, R = finish_attention(total, r, R, near, weight, SAVE)
        if SAVE:
            store_sampled(
                saved + maps,
                saved + 3 * maps,
                saved + 3 * maps + states_size(N, C, PT),
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
            store_covariance(
                saved + 3 * maps + states_size(N, C, PT) + scalar(N).to(tl.int64) * (3 * C), n, c, j, k, R, C, P, PT
            )
        if attention is not None:
            store_attention(
                attention, n, c, rows, some, position, S, mu, u, maximum, total, tile, ONE_TILE, C, BS, LAST, ACC
            )
    if SAVE:
        store_channels(saved, n, c, j, mu, C, P)
        store_channels(saved + 2 * maps, n, c, j, r, C, P)
    store_states(h, n, c, k, project(mu + r, weight), C, PT)


@triton.jit
def states_size(N, C: tl.constexpr, PT: tl.constexpr):
    """N * C * pt in 64 bits."""
    return scalar(N).to(tl.int64) * (C * PT)


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
