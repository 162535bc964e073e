"""The sampler's backward pass: from the states' gradient to the parameters' and to what the map's is made of, for the
middle, too; and the op alone, where the attention may have a gradient of its own.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    load_channels,
    load_tile,
    map_tile,
    outer_sum,
    place,
    rows_of,
    scalar,
    split_range,
    store_channels,
    store_rows,
    store_tile,
    store_weight_sum,
    weight_of,
)
from .triton_forward import states_size


@triton.jit
def sampler_backward(
    value,
    query,
    key,
    u_from,
    r_from,
    q_from,
    R_from,
    K1,
    s,
    b,
    mhat,
    dh,
    dr_to,
    constant_to,
    rdr_to,
    S,
    n,
    live,
    c,
    j,
    k,
    SAMPLER: tl.constexpr,
    EXTRA: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Concept c in the images ``n``: from dh (BN, PT2) to what the map's gradient is made of, which is stored, and to
    the sums over these images of the gradients of value, query, key (P2, PT2), logit, s and b (P2,).

    s, b (1 or BN, P2). EXTRA: K1 (BN, P2) reaches v besides, from pixel modulation or the attention's own gradient.
    """
    r = rows_of(r_from, n, live, c, j, C, P, ACC)
    x = tl.sum(weight_of(value, c, j, k, P, PT, ACC) * dh[:, None, :], 2)  # drbar
    dr = s * x
    dvalue = outer_sum(tl.where(live[:, None], s * r + b, 0.0), dh)
    dquery = tl.zeros_like(dvalue)
    dkey = tl.zeros_like(dvalue)
    ds = tl.sum(r * x, 0)
    db = tl.sum(x, 0)
    dlogit = tl.zeros_like(db)
    constant = dr / S
    if SAMPLER != "pool":
        u = rows_of(u_from, n, live, c, j, C, P, ACC)
        at = (n.to(tl.int64) * (C * P) + c * P)[:, None] + j[None, :]
        mask = live[:, None, None] & (j < P)[None, :, None] & (k < PT)[None, None, :]
        R = tl.load(R_from + at[:, :, None] * PT + k[None, None, :], mask=mask, other=0.0)
        dv = tl.sum(R * dh[:, None, :], 2)
        if EXTRA:
            dv += K1
        du = s * dv
        ds += tl.sum(u * dv, 0)
        constant = tl.zeros_like(dr)
        if SAMPLER == "static":
            dlogit = tl.sum(du, 0)
        else:
            du *= 1.0 / tl.sqrt(tl.full((), PT, ACC))
            dq = tl.sum(weight_of(key, c, j, k, P, PT, ACC) * du[:, :, None], 1)
            dkey = outer_sum(du, rows_of(q_from, n, live, c, k, C, PT, ACC))
            dzbar = tl.sum(weight_of(query, c, j, k, P, PT, ACC) * dq[:, None, :], 2)
            dquery = outer_sum(tl.where(live[:, None], s * mhat + b, 0.0), dq)
            ds += tl.sum(mhat * dzbar, 0)
            db += tl.sum(dzbar, 0)
            constant = s * dzbar / S
        tl.store(rdr_to + n.to(tl.int64) * C + c, tl.sum(r * dr, 1), mask=live)
    store_rows(dr_to, n, live, c, j, dr, C, P)
    store_rows(constant_to, n, live, c, j, constant, C, P)
    return dvalue, dquery, dkey, dlogit, ds, db


@triton.jit
def attention_at(rows, some, i, end, position, mu, v, maximum, total, LAST: tl.constexpr, ACC: tl.constexpr):
    """(yhat, attention) at the positions ``i``, recomputed; no attention outside the map, where exp may be infinite."""
    yhat = load_tile(rows, some, i, end, position, LAST, ACC) - mu[:, :, None]
    logits = tl.sum(yhat * v[:, :, None], 1)
    return yhat, tl.where((i < end)[None, :], tl.exp(logits - maximum[:, None]), 0.0) / total[:, None]


@triton.jit
def load_softmax(base, n, c, C: tl.constexpr):
    """(maximum, sum) (CB,) of image n from an array (N, C, 3)."""
    at = base + (n.to(tl.int64) * C + c) * 3
    return tl.load(at, mask=c < C, other=0.0), tl.load(at + 1, mask=c < C, other=1.0)


@triton.jit
def attention_sums(
    z,
    image,
    channel,
    position,
    dattention,
    saved,
    K0_to,
    K1_to,
    N,
    S,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone, where the attention has a gradient of its own: K0 = sum a da (N, C) and K1 = sum a (da - K0) yhat
    (N, C*p). Grid (N * concept blocks,); 1R."""
    n, c = place(CB, C)
    j = tl.arange(0, P2)
    maps = scalar(N).to(tl.int64) * (C * P)
    rows, some = map_tile(z, n, image, channel, position, c, j, C, P, LAST)
    mu = load_channels(saved, n, c, j, C, P, ACC)
    v = load_channels(saved + maps, n, c, j, C, P, ACC)
    r = load_channels(saved + 2 * maps, n, c, j, C, P, ACC)
    maximum, total = load_softmax(saved + 3 * maps + states_size(N, C, PT), n, c, C)
    K0 = tl.zeros((CB, BS), ACC)
    K1 = tl.zeros((CB, P2, BS), ACC)
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        yhat, a = attention_at(rows, some, i, S, position, mu, v, maximum, total, LAST, ACC)
        at = (n.to(tl.int64) * C + c)[:, None] * S + i[None, :]
        k = a * tl.load(dattention + at, mask=(c < C)[:, None] & (i < S)[None, :], other=0.0)
        K0 += k
        K1 += k[:, None, :] * yhat
    K0_all = tl.sum(K0, 1)
    tl.store(K0_to + n.to(tl.int64) * C + c, K0_all, mask=c < C)
    store_channels(K1_to, n, c, j, tl.sum(K1, 2) - K0_all[:, None] * r, C, P)


@triton.jit
def sample_gradients(
    value,
    query,
    key,
    saved,
    dh_from,
    K1,
    dr_to,
    constant_to,
    rdr_to,
    dvalue_to,
    dquery_to,
    dkey_to,
    dlogit_to,
    N,
    S,
    SAMPLER: tl.constexpr,
    EXTRA: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: the parameters' gradients of one concept, over all images in order. Grid (C,)."""
    c = tl.program_id(0)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    maps = scalar(N).to(tl.int64) * (C * P)
    softmax = 3 * maps + states_size(N, C, PT)
    dvalue = tl.zeros((P2, PT2), ACC)
    dquery = tl.zeros((P2, PT2), ACC)
    dkey = tl.zeros((P2, PT2), ACC)
    dlogit = tl.zeros((P2,), ACC)
    one = tl.full((1, P2), 1.0, ACC)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        dh = rows_of(dh_from, n, live, c, k, C, PT, ACC)
        dvalue_, dquery_, dkey_, dlogit_, _, _ = sampler_backward(
            value,
            query,
            key,
            saved + maps,
            saved + 2 * maps,
            saved + 3 * maps,
            saved + softmax + scalar(N).to(tl.int64) * (3 * C),
            rows_of(K1, n, live, c, j, C, P, ACC) if EXTRA else None,
            one,
            rows_of(saved, n, live, c, j, C, P, ACC),
            tl.zeros((BN, P2), ACC),
            dh,
            dr_to,
            constant_to,
            rdr_to,
            S,
            n,
            live,
            c,
            j,
            k,
            SAMPLER,
            EXTRA,
            C,
            P,
            PT,
            ACC,
        )
        dvalue += dvalue_
        dquery += dquery_
        dkey += dkey_
        dlogit += dlogit_
    store_weight_sum(dvalue_to, c, j, k, dvalue.to(dvalue_to.dtype.element_ty), P, PT)
    if SAMPLER == "dynamic":
        store_weight_sum(dquery_to, c, j, k, dquery.to(dquery_to.dtype.element_ty), P, PT)
        store_weight_sum(dkey_to, c, j, k, dkey.to(dkey_to.dtype.element_ty), P, PT)
    if SAMPLER == "static":
        tl.store(dlogit_to + c * P + j, dlogit.to(dlogit_to.dtype.element_ty), mask=j < P)


@triton.jit
def sample_input_grad(
    z,
    image,
    channel,
    position,
    out,
    out_image,
    out_channel,
    out_position,
    dattention,
    saved,
    K0_from,
    dr_from,
    constant_from,
    rdr_from,
    N,
    S,
    SAMPLER: tl.constexpr,
    EXTRA: tl.constexpr,
    CHUNKS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: dL/dz. Grid (N * CHUNKS * concept blocks,); 1R + 1W."""
    row, c = place(CB, C)
    n = row // CHUNKS
    j = tl.arange(0, P2)
    maps = scalar(N).to(tl.int64) * (C * P)
    rows, some = map_tile(z, n, image, channel, position, c, j, C, P, LAST)
    out_rows, _ = map_tile(out, n, out_image, out_channel, out_position, c, j, C, P, LAST)
    mu = load_channels(saved, n, c, j, C, P, ACC)
    constant = load_channels(constant_from, n, c, j, C, P, ACC)
    if SAMPLER != "pool":
        dr = load_channels(dr_from, n, c, j, C, P, ACC)
        v = load_channels(saved + maps, n, c, j, C, P, ACC)
        maximum, total = load_softmax(saved + 3 * maps + states_size(N, C, PT), n, c, C)
        rdr = tl.load(rdr_from + n.to(tl.int64) * C + c, mask=c < C, other=0.0)
        if EXTRA:
            rdr += tl.load(K0_from + n.to(tl.int64) * C + c, mask=c < C, other=0.0)
    begin, end = split_range(row % CHUNKS, scalar(S), BS, CHUNKS)
    for start in range(begin, end, BS):
        i = start + tl.arange(0, BS)
        if SAMPLER == "pool":
            dz = tl.broadcast_to(constant[:, :, None], (CB, P2, BS))
        else:
            yhat, a = attention_at(rows, some, i, end, position, mu, v, maximum, total, LAST, ACC)
            through = tl.sum(yhat * dr[:, :, None], 1)
            if EXTRA:
                at = (n.to(tl.int64) * C + c)[:, None] * S + i[None, :]
                through += tl.load(dattention + at, mask=(c < C)[:, None] & (i < end)[None, :], other=0.0)
            dlogits = a * (through - rdr[:, None])
            dz = constant[:, :, None] + a[:, None, :] * dr[:, :, None] + dlogits[:, None, :] * v[:, :, None]
        store_tile(out_rows, some, i, end, out_position, dz, LAST)
