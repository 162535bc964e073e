"""The middle's kernels, backward, up to the last: modulate_backward_sums (2R), then what is small.

Two barriers stand between the passes: the batch norm of the states needs sums over all concepts (state_gradients gives
each image's, state_norm_backward uses them), and that of the map sums over all images (small_gradients gives each
group's). The parameters' gradients are summed over groups of images by small_gradients, and over the groups by the last
kernel's programs, a slice each.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    load_states,
    load_weight_back,
    map_tile,
    outer_sum,
    place,
    rows_of,
    scalar,
    split_range,
    store_states,
    store_weight_back_sum,
    store_weight_sum,
    vector_of,
)
from ..concept_modulate.triton_kernels import (
    backward_sweep,
    merge_sums,
    store_sums,
)
from ..concept_reason.triton_kernels import reasoner_backward, store_state_sums
from ..concept_sample.triton_backward import sampler_backward
from .triton_input_grad import gradients_size
from .triton_saved import (
    covariance_of,
    edges_of,
    modulator_of,
    norm_view,
    per_image,
    s_of,
    states_at,
)


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
    """Grid (N * SPLITS * concept blocks,); 2R."""
    row, c = place(CB, C)
    n = row // SPLITS
    j = tl.arange(0, P2)
    mu, s, v, maximum, A1, B1, A0, B0 = modulator_of(
        saved, norm_bias, scale_bias, shift_bias, n, N, c, j, NORM, PIXEL, C, P, PT, ACC
    )
    rows, some = map_tile(y, n, image, channel, position, c, j, C, P, LAST)
    grad_rows, _ = map_tile(grad, n, grad_image, grad_channel, grad_position, c, j, C, P, LAST)
    begin, end = split_range(row % SPLITS, scalar(S), BS, SPLITS)
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
        row,
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

    merged: store_sums's arrays for N rows; K1 is there less its share of the maxima. dstate_parts: see
    store_state_sums.
    """
    n = tl.program_id(0)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    g_sum = tl.zeros((PT2,), tl.float64)
    sum0 = tl.zeros((PT2,), tl.float64)
    sum1 = tl.zeros((PT2,), tl.float64)
    for block in range(tl.cdiv(C, CB)):
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
        store_sums(merged, first_to, n, N, c, j, E0, E1, F0, F1, K0, K1, highest, count, first, top_sum, PIXEL, C, P)
        dstate = tl.zeros((CB, PT2), ACC)
        if scale_weight is not None:
            dabar = s * F1 + b * F0
            dstate += tl.sum(dabar[:, :, None] * load_weight_back(scale_weight, c, j, k, C, P, PT, ACC), 1)
        if shift_weight is not None:
            dstate += tl.sum(F0[:, :, None] * load_weight_back(shift_weight, c, j, k, C, P, PT, ACC), 1)
        state = load_states(states_at(saved, N, 3, C, P, PT), n, c, k, C, PT, ACC)
        dstate = tl.where(state <= 0, 0.0, dstate)
        store_states(dstate_to, n, c, k, dstate, C, PT)
        g = load_states(states_at(saved, N, 2, C, P, PT), n, c, k, C, PT, tl.float64)
        g_sum += tl.sum(g, 0)
        sum0 += tl.sum(dstate.to(tl.float64), 0)
        sum1 += tl.sum(dstate.to(tl.float64) * g, 0)
    store_state_sums(dstate_parts, n, k, g_sum, sum0, sum1, C, PT)


@triton.jit
def small_gradients(
    norm_bias,
    value,
    query,
    key,
    edge,
    scale_bias,
    saved,
    merged,
    dg_from,
    dr_to,
    constant_to,
    rdr_to,
    partial,
    N,
    S,
    per_group,
    NORM: tl.constexpr,
    SAMPLER: tl.constexpr,
    EDGES: tl.constexpr,
    PIXEL: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Concept c over a group of images: the parameters' gradients, and what the last pass needs. Grid (C, groups).

    partial (groups, total): value, query, key (C, p, pt), scale_weight, shift_weight (C, pt, p), logit, scale_bias,
    shift_bias, ds, db (C*p), edge. dr_to, constant_to (N, C*p), rdr_to (N, C).
    """
    c = tl.program_id(0)
    group = tl.program_id(1)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    d = tl.arange(0, C2)
    size = scalar(N).to(tl.int64) * (C * P)

    bias = vector_of(scale_bias, c, j, 0.0, P, ACC)
    if NORM == "none":
        s = tl.full((1, P2), 1.0, ACC)
    else:
        s = vector_of(s_of(saved, C, P), c, j, 1.0, P, ACC)
        b = vector_of(norm_bias, c, j, 0.0, P, ACC)
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
    last = tl.minimum((group + 1) * per_group, N)
    for start in range(group * per_group, last, BN):
        n = start + tl.arange(0, BN)
        live = n < last
        dh, more = reasoner_backward(
            dg_from,
            states_at(saved, N, 1, C, P, PT),
            edge,
            edges_of(saved, N, C, P, PT),
            n,
            live,
            c,
            d,
            k,
            EDGES,
            C,
            PT,
            ACC,
        )
        dedge += more
        m = rows_of(per_image(saved, N, 0, C, P), n, live, c, j, C, P, ACC)
        if NORM == "none":
            b = m
            mhat = tl.zeros((BN, P2), ACC)
        else:
            mhat = m
        dvalue_, dquery_, dkey_, dlogit_, ds_, db_ = sampler_backward(
            value,
            query,
            key,
            per_image(saved, N, 1, C, P),
            per_image(saved, N, 2, C, P),
            states_at(saved, N, 0, C, P, PT),
            covariance_of(saved, N, C, P, PT),
            merged + 4 * size,
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
            SAMPLER,
            PIXEL,
            C,
            P,
            PT,
            ACC,
        )
        dvalue += dvalue_
        dquery += dquery_
        dkey += dkey_
        dlogit += dlogit_
        E0 = rows_of(merged, n, live, c, j, C, P, ACC)
        E1 = rows_of(merged + size, n, live, c, j, C, P, ACC)
        F0 = rows_of(merged + 2 * size, n, live, c, j, C, P, ACC) if PIXEL else E0
        F1 = rows_of(merged + 3 * size, n, live, c, j, C, P, ACC) if PIXEL else E1
        abar = rows_of(per_image(saved, N, 3, C, P), n, live, c, j, C, P, ACC)
        state = rows_of(states_at(saved, N, 3, C, P, PT), n, live, c, k, C, PT, ACC)
        if SCALE:
            dscale += outer_sum(s * F1 + b * F0, state)
        if SHIFT:
            dshift += outer_sum(F0, state)
        dscale_bias += tl.sum(s * E1 + b * E0, 0)
        dshift_bias += tl.sum(E0, 0)
        ds += ds_ + tl.sum(abar * F1 + bias * E1, 0)
        db += db_ + tl.sum(abar * F0 + bias * E0, 0)
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
