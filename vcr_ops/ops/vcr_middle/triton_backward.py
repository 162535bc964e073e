"""The middle's kernels, backward: modulate_backward_sums (2R), then what is small, then middle_input_grad (2R + 1W).

Two barriers stand between the passes: the batch norm of the states needs sums over all concepts (state_gradients gives
each image's), and that of the map sums over all images (small_gradients gives each group's). The parameters' gradients
are summed over groups of images by small_gradients, and over the groups by the last kernel's programs, a slice each.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    load_channels,
    load_optional,
    load_tile,
    load_vector,
    load_weight_back,
    map_tile,
    scalar,
    split_range,
    store_channels,
    store_tile,
)
from ..concept_modulate.triton_kernels import (
    backward_sweep,
    coefficients,
    merge_sums,
    pre_activation,
    store_sums,
)
from ..concept_sample.triton_kernels import load_states, store_states
from .triton_saved import (
    covariance_of,
    edges_of,
    norm_view,
    per_image,
    rstd_of,
    s_of,
    softmax_of,
    state_rstd_of,
    states_at,
)


@triton.jit
def modulator_of(
    saved,
    norm_bias,
    scale_bias,
    shift_bias,
    n,
    N,
    c,
    j,
    NORM: tl.constexpr,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(mu, s, v, maximum, A1, B1, A0, B0) of image n."""
    mu, s, b, _ = norm_view(saved, norm_bias, n, N, c, j, NORM, C, P, ACC)
    abar = load_channels(per_image(saved, N, 3, C, P), n, c, j, C, P, ACC)
    bbar = load_channels(per_image(saved, N, 4, C, P), n, c, j, C, P, ACC)
    A1, B1, A0, B0 = coefficients(abar, bbar, s, b, scale_bias, shift_bias, c, j, PIXEL, C, P, ACC)
    v = s * load_channels(per_image(saved, N, 1, C, P), n, c, j, C, P, ACC)
    maximum = tl.load(softmax_of(saved, N, C, P, PT) + (n.to(tl.int64) * C + c) * 3, mask=c < C, other=0.0)
    return mu, s, v, maximum, A1, B1, A0, B0


@triton.jit
def modulate_backward_sums(
    y,
    image,
    channel,
    position,
    grad,
    grad_image,
    grad_channel,
    grad_position,
    norm_bias,
    scale_bias,
    shift_bias,
    saved,
    sums,
    first_to,
    N,
    S,
    NORM: tl.constexpr,
    PIXEL: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid (N * SPLITS, concept blocks); 2R."""
    n = tl.program_id(0) // SPLITS
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    j = tl.arange(0, P2)
    mu, s, v, maximum, A1, B1, A0, B0 = modulator_of(
        saved, norm_bias, scale_bias, shift_bias, n, N, c, j, NORM, PIXEL, C, P, PT, ACC
    )
    rows, some = map_tile(y, n, image, channel, position, c, j, C, P, LAST)
    grad_rows, _ = map_tile(grad, n, grad_image, grad_channel, grad_position, c, j, C, P, LAST)
    begin, end = split_range(tl.program_id(0) % SPLITS, scalar(S), BS, SPLITS)
    E0, E1, F0, F1, K0, K1, highest, count, first, top_sum = backward_sweep(
        rows,
        grad_rows,
        some,
        begin,
        end,
        position,
        grad_position,
        mu,
        v,
        maximum,
        A1,
        B1,
        A0,
        B0,
        PIXEL,
        CB,
        P2,
        BS,
        LAST,
        ACC,
    )
    store_sums(
        sums,
        first_to,
        tl.program_id(0),
        scalar(N) * SPLITS,
        c,
        j,
        E0,
        E1,
        F0,
        F1,
        K0,
        K1,
        highest,
        count,
        first,
        top_sum,
        PIXEL,
        C,
        P,
    )


@triton.jit
def state_gradients(
    sums,
    first_from,
    norm_bias,
    scale_weight,
    shift_weight,
    saved,
    merged,
    first_to,
    dstate_to,
    dstate_parts,
    N,
    NORM: tl.constexpr,
    PIXEL: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    CB: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of image n: the sums over its splits, and dL/d(state before its ReLU). Grid (N,).

    merged: store_sums's arrays for N rows; K1 is there less its share of the maxima. dstate_parts (N, 2, pt): the sums
    over concepts of dstate and dstate xhat.
    """
    n = tl.program_id(0)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    sum0 = tl.zeros((PT2,), ACC)
    sum1 = tl.zeros((PT2,), ACC)
    for block in range(0, tl.cdiv(C, CB)):
        c = block * CB + tl.arange(0, CB)
        mu, s, b, _ = norm_view(saved, norm_bias, n, N, c, j, NORM, C, P, ACC)
        E0, E1, F0, F1, K0, K1, highest, count, first, top_sum = merge_sums(
            sums, first_from, n, scalar(N) * SPLITS, c, j, PIXEL, SPLITS, C, P, CB, P2, ACC
        )
        if PIXEL:
            K1 -= (K0 / tl.maximum(count, 1.0))[:, None] * top_sum
        else:
            F0 = E0
            F1 = E1
        store_sums(
            merged, first_to, n, N, c, j, E0, E1, F0, F1, K0, K1, highest, count, first, top_sum, PIXEL, C, P
        )
        dstate = tl.zeros((CB, PT2), ACC)
        if scale_weight is not None:
            dabar = s * F1 + b * F0
            dstate += tl.sum(dabar[:, :, None] * load_weight_back(scale_weight, c, j, k, C, P, PT, ACC), 1)
        if shift_weight is not None:
            dstate += tl.sum(F0[:, :, None] * load_weight_back(shift_weight, c, j, k, C, P, PT, ACC), 1)
        state = load_states(states_at(saved, N, 3, C, P, PT), n, c, k, C, PT, ACC)
        dstate = tl.where(state <= 0, 0.0, dstate)
        store_states(dstate_to, n, c, k, dstate, C, PT)
        xhat = load_states(states_at(saved, N, 2, C, P, PT), n, c, k, C, PT, ACC)
        sum0 += tl.sum(dstate, 0)
        sum1 += tl.sum(dstate * xhat, 0)
    tl.store(dstate_parts + 2 * n * PT + k, sum0, mask=k < PT)
    tl.store(dstate_parts + (2 * n + 1) * PT + k, sum1, mask=k < PT)


@triton.jit
def rows_of(base, n, live, c, j, C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """(BN, P2): concept c of the images ``n`` in an array (N, C*p)."""
    at = (n.to(tl.int64) * (C * P) + c * P)[:, None] + j[None, :]
    return tl.load(base + at, mask=live[:, None] & (j < P)[None, :], other=0.0).to(ACC)


@triton.jit
def store_rows(base, n, live, c, j, x, C: tl.constexpr, P: tl.constexpr):
    """The reverse of rows_of."""
    at = (n.to(tl.int64) * (C * P) + c * P)[:, None] + j[None, :]
    tl.store(base + at, x, mask=live[:, None] & (j < P)[None, :])


@triton.jit
def vector_of(base, c, j, default: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """(1, P2): concept c's part of an array (C*p)."""
    if base is None:
        return tl.full((1, j.shape[0]), default, ACC)
    else:
        return tl.load(base + c * P + j, mask=j < P, other=0.0).to(ACC)[None, :]


@triton.jit
def weight_of(base, c, j, k, P: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """(1, P2, PT2): concept c's part of a weight (C, p, pt)."""
    at = (c * P + j)[:, None] * PT + k[None, :]
    return tl.load(base + at, mask=(j < P)[:, None] & (k < PT)[None, :], other=0.0).to(ACC)[None, :, :]


@triton.jit
def all_states(base, n, live, d, k, C: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """(BN, C2, PT2): all states of the images ``n``."""
    at = (n.to(tl.int64)[:, None] * C + d[None, :])[:, :, None] * PT + k[None, None, :]
    mask = live[:, None, None] & (d < C)[None, :, None] & (k < PT)[None, None, :]
    return tl.load(base + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_weight_sum(base, c, j, k, x, P: tl.constexpr, PT: tl.constexpr):
    """(P2, PT2) into concept c's part of a weight (C, p, pt)."""
    tl.store(base + (c * P + j)[:, None] * PT + k[None, :], x, mask=(j < P)[:, None] & (k < PT)[None, :])


@triton.jit
def store_weight_back_sum(base, c, j, k, x, P: tl.constexpr, PT: tl.constexpr):
    """(P2, PT2) into concept c's part of a weight (C, pt, p)."""
    tl.store(base + (c * PT + k)[None, :] * P + j[:, None], x, mask=(j < P)[:, None] & (k < PT)[None, :])


@triton.jit
def outer_sum(x, y):
    """(P2, PT2): the sum over images of x (BN, P2) times y (BN, PT2)."""
    return tl.sum(x[:, :, None] * y[:, None, :], 0)


@triton.jit
def small_gradients(
    norm_bias,
    value,
    query,
    key,
    edge,
    state_weight,
    scale_bias,
    saved,
    merged,
    dstate_from,
    dstate_parts,
    v_to,
    dr_to,
    constant_to,
    rdr_to,
    partial,
    dstate_weight,
    dstate_bias,
    N,
    S,
    per_group,
    NORM: tl.constexpr,
    SAMPLER: tl.constexpr,
    EDGES: tl.constexpr,
    PIXEL: tl.constexpr,
    STATE_BATCH: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Concept c over a group of images: the parameters' gradients, and what the last pass needs. Grid (C, groups).

    partial (groups, total): value, query, key (C, p, pt), scale_weight, shift_weight (C, pt, p), logit, scale_bias,
    shift_bias, ds, db (C*p), edge. v_to, dr_to, constant_to (N, C*p), rdr_to (N, C).
    """
    c = tl.program_id(0)
    group = tl.program_id(1)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    d = tl.arange(0, C2)
    size = scalar(N).to(tl.int64) * (C * P)

    # sums over all states
    sum0 = tl.zeros((PT2,), ACC)
    sum1 = tl.zeros((PT2,), ACC)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & (k < PT)[None, :]
        at = dstate_parts + (2 * n * PT)[:, None] + k[None, :]
        sum0 += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        sum1 += tl.sum(tl.load(at + PT, mask=mask, other=0.0), 0)
    if (c == 0) & (group == 0):
        if dstate_weight is not None:
            tl.store(dstate_weight + k, sum1.to(dstate_weight.dtype.element_ty), mask=k < PT)
        if dstate_bias is not None:
            tl.store(dstate_bias + k, sum0.to(dstate_bias.dtype.element_ty), mask=k < PT)
    share = 1.0 / (scalar(N).to(ACC) * C) if STATE_BATCH else 0.0
    mean0 = sum0 * share
    mean1 = sum1 * share
    gain = load_vector(state_weight, k, 1.0, PT, ACC) * load_vector(
        state_rstd_of(saved, N, C, P, PT), k, 0.0, PT, ACC
    )

    wv = weight_of(value, c, j, k, P, PT, ACC)
    if SAMPLER == "dynamic":
        wq = weight_of(query, c, j, k, P, PT, ACC)
        wk = weight_of(key, c, j, k, P, PT, ACC)
    bias = vector_of(scale_bias, c, j, 0.0, P, ACC)
    if NORM != "none":
        s = vector_of(s_of(saved, C, P), c, j, 1.0, P, ACC)
        b = vector_of(norm_bias, c, j, 0.0, P, ACC)
    else:
        s = tl.full((1, P2), 1.0, ACC)
    dvalue = tl.zeros((P2, PT2), ACC)
    dquery = tl.zeros((P2, PT2), ACC)
    dkey = tl.zeros((P2, PT2), ACC)
    dscale = tl.zeros((P2, PT2), ACC)
    dshift = tl.zeros((P2, PT2), ACC)
    dlogit = tl.zeros((P2,), ACC)
    dscale_bias = tl.zeros((P2,), ACC)
    dshift_bias = tl.zeros((P2,), ACC)
    ds = tl.zeros((P2,), ACC)
    db = tl.zeros((P2,), ACC)
    dedge = tl.zeros((C2 if EDGES == "static" else PT2,), ACC)
    states = states_at(saved, N, 3, C, P, PT)
    last = tl.minimum((group + 1) * per_group, N)
    for start in range(group * per_group, last, BN):
        n = start + tl.arange(0, BN)
        live = n < last
        here = live[:, None] & (k < PT)[None, :]
        # through the reasoner: dg of concept c, then dh
        xhat = rows_of(states_at(saved, N, 2, C, P, PT), n, live, c, k, C, PT, ACC)
        dg = (rows_of(dstate_from, n, live, c, k, C, PT, ACC) - mean0[None, :] - xhat * mean1[None, :]) * gain[None, :]
        dg = tl.where(here, dg, 0.0)
        dh = dg
        if EDGES != "none":
            h_all = all_states(states_at(saved, N, 1, C, P, PT), n, live, d, k, C, PT, ACC)
            xhat_all = all_states(states_at(saved, N, 2, C, P, PT), n, live, d, k, C, PT, ACC)
            dg_all = all_states(dstate_from, n, live, d, k, C, PT, ACC)
            dg_all = (dg_all - mean0[None, None, :] - xhat_all * mean1[None, None, :]) * gain[None, None, :]
            dg_all = tl.where(live[:, None, None] & (d < C)[None, :, None] & (k < PT)[None, None, :], dg_all, 0.0)
            da = tl.sum(dg[:, None, :] * h_all, 2)  # of row c of A
            if EDGES == "dynamic":
                mask = live[:, None] & (d < C)[None, :]
                at = edges_of(saved, N, C, P, PT) + n.to(tl.int64)[:, None] * (C * C)
                row = tl.load(at + c * C + d[None, :], mask=mask, other=0.0)
                column = tl.load(at + d[None, :] * C + c, mask=mask, other=0.0)
                we = tl.load(edge + k[None, :] * C + d[:, None], mask=(d < C)[:, None] & (k < PT)[None, :], other=0.0)
                dscore = da * (1.0 - row * row)
                dh += tl.sum(column[:, :, None] * dg_all, 1) + tl.sum(dscore[:, :, None] * we.to(ACC)[None, :, :], 1)
                # column c of the gradient of W^edge, which all concepts' scores against c reach
                h = rows_of(states_at(saved, N, 1, C, P, PT), n, live, c, k, C, PT, ACC)
                into = tl.sum(dg_all * h[:, None, :], 2) * (1.0 - column * column)
                dedge += tl.sum(tl.sum(into[:, :, None] * h_all, 1), 0)
            else:
                column = tl.load(edge + d * C + c, mask=d < C, other=0.0).to(ACC)
                dh += tl.sum(column[None, :, None] * dg_all, 1)
                dedge += tl.sum(da, 0)
        # the norm's view of these images
        m = rows_of(per_image(saved, N, 0, C, P), n, live, c, j, C, P, ACC)
        if NORM == "none":
            b = m
            mhat = tl.zeros((BN, P2), ACC)
        else:
            mhat = m
        # value, and what reaches the attention
        r = rows_of(per_image(saved, N, 2, C, P), n, live, c, j, C, P, ACC)
        x = tl.sum(wv * dh[:, None, :], 2)
        dr = s * x
        dvalue += outer_sum(tl.where(live[:, None], s * r + b, 0.0), dh)
        ds += tl.sum(r * x, 0)
        db += tl.sum(x, 0)
        constant = tl.zeros((BN, P2), ACC)
        if SAMPLER != "pool":
            u = rows_of(per_image(saved, N, 1, C, P), n, live, c, j, C, P, ACC)
            at = (n.to(tl.int64) * (C * P) + c * P)[:, None] + j[None, :]
            mask = live[:, None, None] & (j < P)[None, :, None] & (k < PT)[None, None, :]
            R = tl.load(covariance_of(saved, N, C, P, PT) + at[:, :, None] * PT + k[None, None, :], mask=mask, other=0.0)
            dv = tl.sum(R * dh[:, None, :], 2)
            if PIXEL:
                dv += rows_of(merged + 4 * size, n, live, c, j, C, P, ACC)
            du = s * dv
            ds += tl.sum(u * dv, 0)
            if SAMPLER == "static":
                dlogit += tl.sum(du, 0)
            else:
                du *= 1.0 / tl.sqrt(tl.full((), PT, ACC))
                q = rows_of(states_at(saved, N, 0, C, P, PT), n, live, c, k, C, PT, ACC)
                dq = tl.sum(wk * du[:, :, None], 1)
                dkey += outer_sum(du, q)
                dzbar = tl.sum(wq * dq[:, None, :], 2)
                dquery += outer_sum(tl.where(live[:, None], s * mhat + b, 0.0), dq)
                ds += tl.sum(mhat * dzbar, 0)
                db += tl.sum(dzbar, 0)
                constant = s * dzbar / S
            store_rows(v_to, n, live, c, j, s * u, C, P)
            tl.store(rdr_to + n.to(tl.int64) * C + c, tl.sum(r * dr, 1), mask=live)
        else:
            constant = dr / S
        store_rows(dr_to, n, live, c, j, dr, C, P)
        store_rows(constant_to, n, live, c, j, constant, C, P)
        # the modulator
        E0 = rows_of(merged, n, live, c, j, C, P, ACC)
        E1 = rows_of(merged + size, n, live, c, j, C, P, ACC)
        F0 = rows_of(merged + 2 * size, n, live, c, j, C, P, ACC) if PIXEL else E0
        F1 = rows_of(merged + 3 * size, n, live, c, j, C, P, ACC) if PIXEL else E1
        abar = rows_of(per_image(saved, N, 3, C, P), n, live, c, j, C, P, ACC)
        state = rows_of(states, n, live, c, k, C, PT, ACC)
        if SCALE:
            dscale += outer_sum(s * F1 + b * F0, state)
        if SHIFT:
            dshift += outer_sum(F0, state)
        dscale_bias += tl.sum(s * E1 + b * E0, 0)
        dshift_bias += tl.sum(E0, 0)
        ds += tl.sum(abar * F1 + bias * E1, 0)
        db += tl.sum(abar * F0 + bias * E0, 0)
    to = partial + group.to(tl.int64) * gradients_size(EDGES, C, P, PT)
    store_weight_sum(to, c, j, k, dvalue, P, PT)
    store_weight_sum(to + C * P * PT, c, j, k, dquery, P, PT)
    store_weight_sum(to + 2 * C * P * PT, c, j, k, dkey, P, PT)
    store_weight_back_sum(to + 3 * C * P * PT, c, j, k, dscale, P, PT)
    store_weight_back_sum(to + 4 * C * P * PT, c, j, k, dshift, P, PT)
    vectors = to + 5 * C * P * PT + c * P + j
    tl.store(vectors, dlogit, mask=j < P)
    tl.store(vectors + C * P, dscale_bias, mask=j < P)
    tl.store(vectors + 2 * C * P, dshift_bias, mask=j < P)
    tl.store(vectors + 3 * C * P, ds, mask=j < P)
    tl.store(vectors + 4 * C * P, db, mask=j < P)
    edges_to = to + 5 * C * P * PT + 5 * C * P
    if EDGES == "dynamic":
        tl.store(edges_to + k * C + c, dedge, mask=k < PT)
    if EDGES == "static":
        tl.store(edges_to + c * C + d, dedge, mask=d < C)


@triton.jit
def gradients_size(EDGES: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """Numbers in one group's row of ``partial``."""
    edges: tl.constexpr = PT * C if EDGES == "dynamic" else (C * C if EDGES == "static" else 0)
    return 5 * C * P * PT + 5 * C * P + edges


@triton.jit
def sum_groups(
    partial, groups, total: tl.constexpr, offset: tl.constexpr, at, count: tl.constexpr, GB: tl.constexpr, ACC: tl.constexpr
):
    """The sum over groups, GB of them at a time, of the numbers ``at`` below ``count`` that stand ``offset`` into a row."""
    x = tl.zeros(at.shape, ACC)
    for start in range(0, groups, GB):
        group = start + tl.arange(0, GB)
        mask = (group < groups)[:, None] & (at < count)[None, :]
        rows = (group.to(tl.int64) * total + offset)[:, None]
        x += tl.sum(tl.load(partial + rows + at[None, :], mask=mask, other=0.0), 0)
    return x


@triton.jit
def finish(
    partial, groups, total: tl.constexpr, offset: tl.constexpr, to, block, count: tl.constexpr, RB: tl.constexpr, GB: tl.constexpr, ACC: tl.constexpr
):
    """Elements [block * RB, ...) of one parameter's gradient; nothing for a block outside it. Returns the next
    parameter's ``block``."""
    if to is not None:
        at = block * RB + tl.arange(0, RB)
        if (block >= 0) & (block * RB < count):
            x = sum_groups(partial, groups, total, offset, at, count, GB, ACC)
            tl.store(to + at, x.to(to.dtype.element_ty), mask=at < count)
    return block - tl.cdiv(count, RB)


@triton.jit
def finish_gradients(
    partial,
    groups,
    saved,
    dvalue,
    dquery,
    dkey,
    dscale,
    dshift,
    dlogit,
    dscale_bias,
    dshift_bias,
    dnorm_weight,
    dnorm_bias,
    dedge,
    program,
    programs,
    EDGES: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
    RB: tl.constexpr,
    GB: tl.constexpr,
    ACC: tl.constexpr,
):
    """This program's share of the sums over groups of images."""
    W: tl.constexpr = C * P * PT
    CP: tl.constexpr = C * P
    edges: tl.constexpr = PT * C if EDGES == "dynamic" else (C * C if EDGES == "static" else 0)
    total: tl.constexpr = 5 * W + 5 * CP + edges
    blocks = 5 * tl.cdiv(W, RB) + 5 * tl.cdiv(CP, RB) + tl.cdiv(edges, RB)
    for first in range(program, blocks, programs):
        block = scalar(first)
        block = finish(partial, groups, total, 0, dvalue, block, W, RB, GB, ACC)
        block = finish(partial, groups, total, W, dquery, block, W, RB, GB, ACC)
        block = finish(partial, groups, total, 2 * W, dkey, block, W, RB, GB, ACC)
        block = finish(partial, groups, total, 3 * W, dscale, block, W, RB, GB, ACC)
        block = finish(partial, groups, total, 4 * W, dshift, block, W, RB, GB, ACC)
        block = finish(partial, groups, total, 5 * W, dlogit, block, CP, RB, GB, ACC)
        block = finish(partial, groups, total, 5 * W + CP, dscale_bias, block, CP, RB, GB, ACC)
        block = finish(partial, groups, total, 5 * W + 2 * CP, dshift_bias, block, CP, RB, GB, ACC)
        if dnorm_weight is not None:
            at = block * RB + tl.arange(0, RB)
            if (block >= 0) & (block * RB < CP):
                x = sum_groups(partial, groups, total, 5 * W + 3 * CP, at, CP, GB, ACC)
                x *= tl.load(rstd_of(saved, C, P) + at, mask=at < CP, other=0.0)
                tl.store(dnorm_weight + at, x.to(dnorm_weight.dtype.element_ty), mask=at < CP)
        block -= tl.cdiv(CP, RB)
        block = finish(partial, groups, total, 5 * W + 4 * CP, dnorm_bias, block, CP, RB, GB, ACC)
        if EDGES != "none":
            finish(partial, groups, total, 5 * W + 5 * CP, dedge, block, edges, RB, GB, ACC)


@triton.jit
def group_channels(
    partial,
    groups,
    total: tl.constexpr,
    offset: tl.constexpr,
    c,
    j,
    GB: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ACC: tl.constexpr,
):
    """(CB, P2): the sum over groups, GB of them at a time, of an array (C*p) that stands ``offset`` into a row."""
    x = tl.zeros((c.shape[0], j.shape[0]), ACC)
    at = (c[:, None] * P + j[None, :])[None, :, :]
    some = ((c[:, None] < C) & (j[None, :] < P))[None, :, :]
    for start in range(0, groups, GB):
        group = start + tl.arange(0, GB)
        rows = (group.to(tl.int64) * total + offset)[:, None, None]
        x += tl.sum(tl.load(partial + rows + at, mask=some & (group < groups)[:, None, None], other=0.0), 0)
    return x


@triton.jit
def middle_input_grad(
    y,
    image,
    channel,
    position,
    grad,
    grad_image,
    grad_channel,
    grad_position,
    out,
    out_image,
    out_channel,
    out_position,
    norm_bias,
    scale_bias,
    shift_bias,
    saved,
    merged,
    first_from,
    v_from,
    dr_from,
    constant_from,
    rdr_from,
    partial,
    dvalue,
    dquery,
    dkey,
    dscale,
    dshift,
    dlogit,
    dscale_bias,
    dshift_bias,
    dnorm_weight,
    dnorm_bias,
    dedge,
    N,
    S,
    groups,
    NORM: tl.constexpr,
    SAMPLER: tl.constexpr,
    EDGES: tl.constexpr,
    PIXEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    RB: tl.constexpr,
    GB: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """dL/dy; 2R + 1W. Grid (N * CHUNKS, concept blocks)."""
    n = tl.program_id(0) // CHUNKS
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    j = tl.arange(0, P2)
    edges: tl.constexpr = PT * C if EDGES == "dynamic" else (C * C if EDGES == "static" else 0)
    total: tl.constexpr = 5 * C * P * PT + 5 * C * P + edges
    vectors: tl.constexpr = 5 * C * P * PT
    mu, s, v, maximum, A1, B1, A0, B0 = modulator_of(
        saved, norm_bias, scale_bias, shift_bias, n, N, c, j, NORM, PIXEL, C, P, PT, ACC
    )
    constant = load_channels(constant_from, n, c, j, C, P, ACC)
    c1 = tl.zeros((CB, P2), ACC)
    if NORM == "batch":
        count = scalar(N).to(ACC) * S
        rstd = load_channels(rstd_of(saved, C, P), scalar(0), c, j, C, P, ACC)
        ds = group_channels(partial, groups, total, vectors + 3 * C * P, c, j, GB, C, P, ACC)
        db = group_channels(partial, groups, total, vectors + 4 * C * P, c, j, GB, C, P, ACC)
        constant -= s * db / count
        c1 = -s * rstd * rstd * ds / count
    if SAMPLER != "pool":
        dr = load_channels(dr_from, n, c, j, C, P, ACC)
        at = n.to(tl.int64) * C + c
        rdr = tl.load(rdr_from + at, mask=c < C, other=0.0)
        inverse = 1.0 / tl.load(softmax_of(saved, N, C, P, PT) + at * 3 + 1, mask=c < C, other=1.0)
        if PIXEL:
            size = scalar(N).to(tl.int64) * (C * P)
            small = scalar(N).to(tl.int64) * C
            K0 = tl.load(merged + 6 * size + at, mask=c < C, other=0.0)
            highest = tl.load(merged + 6 * size + small + at, mask=c < C, other=0.0)
            ties = tl.load(merged + 6 * size + 2 * small + at, mask=c < C, other=1.0)
            first = tl.load(first_from + at, mask=c < C, other=0)
    rows, some = map_tile(y, n, image, channel, position, c, j, C, P, LAST)
    if PIXEL:
        # This kernel may round a logit otherwise than the one that found the maximum: a single one goes by its place,
        # and ties are what is within rounding of it.
        there = first.to(tl.int64) * position if LAST else first.to(tl.int64)
        summands = (tl.load(rows + there[:, None, None], mask=some, other=0.0).to(ACC) - mu[:, :, None]) * v[:, :, None]
        near = (1e-14 if ACC == tl.float64 else 1e-6) * tl.sum(tl.sum(tl.abs(summands), 2), 1)
    grad_rows, _ = map_tile(grad, n, grad_image, grad_channel, grad_position, c, j, C, P, LAST)
    out_rows, _ = map_tile(out, n, out_image, out_channel, out_position, c, j, C, P, LAST)
    begin, end = split_range(tl.program_id(0) % CHUNKS, scalar(S), BS, CHUNKS)
    for start in range(begin, end, BS):
        i = start + tl.arange(0, BS)
        yhat = load_tile(rows, some, i, end, position, LAST, ACC) - mu[:, :, None]
        d = load_tile(grad_rows, some, i, end, grad_position, LAST, ACC)
        m = tl.zeros((1, 1), ACC)
        if SAMPLER != "pool":
            logits = tl.sum(yhat * v[:, :, None], 1)
            m = tl.exp(logits - maximum[:, None])
        e = tl.where(pre_activation(yhat, m, A1, B1, A0, B0, PIXEL) <= 0, 0.0, d)
        slope = tl.broadcast_to(A0[:, :, None], yhat.shape)
        if PIXEL:
            slope = tl.fma(tl.broadcast_to(m[:, None, :], yhat.shape), tl.broadcast_to(A1[:, :, None], yhat.shape), slope)
        dy = slope * e + constant[:, :, None] + c1[:, :, None] * yhat
        if SAMPLER != "pool":
            a = m * inverse[:, None]
            dlogits = a * (tl.sum(yhat * dr[:, :, None], 1) - rdr[:, None])
            if PIXEL:
                gain = tl.fma(tl.broadcast_to(A1[:, :, None], yhat.shape), yhat, tl.broadcast_to(B1[:, :, None], yhat.shape))
                dlogits += m * tl.sum(e * gain, 1)
                alone = (ties == 1.0)[:, None]
                at_top = tl.where(alone, i[None, :] == first[:, None], logits >= (highest - near)[:, None])
                dlogits -= tl.where(at_top, (K0 / ties)[:, None], 0.0)
            dy += a[:, None, :] * dr[:, :, None] + dlogits[:, None, :] * v[:, :, None]
        store_tile(out_rows, some, i, end, out_position, dy, LAST)
    program = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    finish_gradients(
        partial,
        groups,
        saved,
        dvalue,
        dquery,
        dkey,
        dscale,
        dshift,
        dlogit,
        dscale_bias,
        dshift_bias,
        dnorm_weight,
        dnorm_bias,
        dedge,
        program,
        tl.num_programs(0) * tl.num_programs(1),
        EDGES,
        C,
        P,
        PT,
        RB,
        GB,
        ACC,
    )
