"""The middle's kernels, backward, up to the last: modulate_backward_sums (2R), then small_gradients.

Two barriers stand between the passes. The batch norm of the states needs sums over all states, which the programs of
the first pass leave, a row each, and those of small_gradients add up; that of the map needs sums over all images, which
small_gradients leaves, a row for each group of them, and the last kernel's programs add up. Those finish the
parameters' gradients in the same way, a slice each.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    all_states,
    load_states,
    load_vector,
    load_weight_back,
    map_tile,
    outer_sum,
    rows_of,
    scalar,
    split_range,
    store_rows,
    store_states,
    store_weight_back_sum,
    store_weight_sum,
    vector_of,
)
from ..concept_modulate.triton_kernels import backward_sweep, merge_sums, store_sums
from ..concept_reason.triton_kernels import (
    load_state_norm,
    load_state_sums,
    norm_gradient,
    reasoner_backward,
    store_norm_gradients,
    store_state_sums,
)
from ..concept_sample.triton_backward import sampler_backward
from .triton_input_grad import gradients_size
from .triton_saved import (
    covariance_of,
    edges_of,
    modulator_of,
    norm_view,
    per_image,
    s_of,
    state_norm_of,
    states_at,
)


@triton.jit
def state_gradient(
    F0,
    F1,
    s,
    b,
    scale_weight,
    shift_weight,
    state_from,
    n,
    c,
    j,
    k,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dL/d(state before its ReLU) of image n, (CB, PT2), as far as the positions behind F0 and F1 make it."""
    dstate = tl.zeros((c.shape[0], k.shape[0]), ACC)
    if scale_weight is not None:
        dabar = s * F1 + b * F0
        dstate += tl.sum(dabar[:, :, None] * load_weight_back(scale_weight, c, j, k, C, P, PT, ACC), 1)
    if shift_weight is not None:
        dstate += tl.sum(F0[:, :, None] * load_weight_back(shift_weight, c, j, k, C, P, PT, ACC), 1)
    return tl.where(load_states(state_from, n, c, k, C, PT, ACC) <= 0, 0.0, dstate)


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
    scale_weight,
    shift_weight,
    scale_bias,
    shift_bias,
    saved,
    sums,
    first_to,
    dstate_to,
    state_sums,
    N,
    S,
    NORM: tl.constexpr,
    PIXEL: tl.constexpr,
    SPLITS: tl.constexpr,
    ALONE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    CB: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """2R. Grid (programs,): they take turns with the parts, (N * SPLITS * concept blocks,). ALONE: each has one, and
    registers are fewer than in a loop.

    sums, first_to: see store_sums; they and dstate_to, (N * SPLITS, C, pt), have a row for each split of an image.
    state_sums: see store_state_sums; a row for each program.
    """
    blocks: tl.constexpr = (C + CB - 1) // CB
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    sum0 = tl.zeros((PT2,), tl.float64)
    sum1 = tl.zeros((PT2,), tl.float64)
    own = tl.program_id(0)
    end_of_parts = own + 1 if ALONE else scalar(N) * SPLITS * blocks
    for part_number in range(own, end_of_parts, 1 if ALONE else tl.num_programs(0)):
        part = scalar(part_number)
        row = part // blocks
        n = row // SPLITS
        c = part % blocks * CB + tl.arange(0, CB)
        begin, end = split_range(row % SPLITS, scalar(S), BS, SPLITS)
        mu, v, maximum, A1, B1, A0, B0 = modulator_of(
            saved, norm_bias, scale_bias, shift_bias, n, N, c, j, NORM, PIXEL, C, P, PT, ACC
        )
        rows, some = map_tile(y, n, image, channel, position, c, j, C, P, LAST)
        grad_rows, _ = map_tile(grad, n, grad_image, grad_channel, grad_position, c, j, C, P, LAST)
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
        if not PIXEL:
            F0 = E0
            F1 = E1
        _, s, b, _ = norm_view(saved, norm_bias, n, N, c, j, NORM, C, P, ACC)  # loaded late: registers are short above
        state = states_at(saved, N, 3, C, P, PT)
        dstate = state_gradient(F0, F1, s, b, scale_weight, shift_weight, state, n, c, j, k, C, P, PT, ACC)
        store_states(dstate_to, row, c, k, dstate, C, PT)
        g = load_states(states_at(saved, N, 2, C, P, PT), n, c, k, C, PT, tl.float64)
        mean, _ = load_state_norm(state_norm_of(saved, N, C, P, PT), k, PT)
        wide = dstate.to(tl.float64)
        sum0 += tl.sum(wide, 0)
        sum1 += tl.sum(wide * tl.where((c < C)[:, None], g - mean[None, :], 0.0), 0)
    store_state_sums(state_sums, own, k, sum0, sum1, PT)


@triton.jit
def merge_splits(
    sums,
    first_from,
    dstate_from,
    saved,
    merged,
    first_to,
    dstate_to,
    state_sums,
    N,
    PIXEL: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """What modulate_backward_sums leaves, merged to a row for each image; for steps that hand it on. Grid (C,); a row
    of state_sums each."""
    c = tl.program_id(0)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    size = scalar(N).to(tl.int64) * (C * P)
    small = scalar(N).to(tl.int64) * C
    mean, _ = load_state_norm(state_norm_of(saved, N, C, P, PT), k, PT)
    sum0 = tl.zeros((PT2,), tl.float64)
    sum1 = tl.zeros((PT2,), tl.float64)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        E0, E1, F0, F1, K0, K1, highest, count, first, top_sum = merge_sums(
            sums, first_from, n, live, scalar(N) * SPLITS, c, j, PIXEL, SPLITS, C, P, ACC
        )
        store_rows(merged, n, live, c, j, E0, C, P)
        store_rows(merged + size, n, live, c, j, E1, C, P)
        if PIXEL:
            store_rows(merged + 2 * size, n, live, c, j, F0, C, P)
            store_rows(merged + 3 * size, n, live, c, j, F1, C, P)
            store_rows(merged + 4 * size, n, live, c, j, K1, C, P)
            store_rows(merged + 5 * size, n, live, c, j, top_sum, C, P)
            store_tops(merged + 6 * size, first_to, n, live, small, c, K0, highest, count, first, C)
        dstate = tl.zeros((BN, PT2), tl.float64)
        for split in range(SPLITS):
            dstate += rows_of(dstate_from, n.to(tl.int64) * SPLITS + split, live, c, k, C, PT, tl.float64)
        dstate = dstate.to(ACC)
        store_rows(dstate_to, n, live, c, k, dstate, C, PT)
        sum0 += tl.sum(dstate.to(tl.float64), 0)
        g = rows_of(states_at(saved, N, 2, C, P, PT), n, live, c, k, C, PT, tl.float64)
        sum1 += tl.sum(dstate.to(tl.float64) * tl.where(live[:, None], g - mean[None, :], 0.0), 0)
    store_state_sums(state_sums, c, k, sum0, sum1, PT)


@triton.jit
def store_tops(to, first_to, n, live, small, c, K0, highest, count, first, C: tl.constexpr):
    """What the last pass needs to know of the largest logits: to (3, N, C), first_to (N, C)."""
    at = n.to(tl.int64) * C + c
    tl.store(to + at, K0, mask=live)
    tl.store(to + small + at, highest, mask=live)
    tl.store(to + 2 * small + at, count, mask=live)
    tl.store(first_to + at, first, mask=live)


@triton.jit
def all_norm_gradients(
    dstate_from,
    g_from,
    norm,
    n,
    live,
    c,
    d,
    k,
    BATCH: tl.constexpr,
    EDGES: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dL/dG in the images ``n``: of concept c, (BN, PT2), and of all, (BN, C2, PT2), where edges ask for them.

    dstate_from (N * SPLITS, C, pt). norm: (mean, rstd, gain, share0, share1), see norm_gradient.
    """
    mean, rstd, gain, share0, share1 = norm
    first_row = n.to(tl.int64) * SPLITS
    mine = tl.zeros((n.shape[0], k.shape[0]), tl.float64)
    for split in range(SPLITS):
        mine += rows_of(dstate_from, first_row + split, live, c, k, C, PT, tl.float64)
    g = rows_of(g_from, n, live, c, k, C, PT, tl.float64)
    mine = norm_gradient(mine, g, mean[None, :], rstd[None, :], gain[None, :], share0[None, :], share1[None, :], BATCH)
    mine = tl.where(live[:, None] & (k < PT)[None, :], mine, 0.0).to(ACC)
    if EDGES == "none":
        return mine, mine
    else:
        every = tl.zeros((n.shape[0], d.shape[0], k.shape[0]), tl.float64)
        for split in range(SPLITS):
            every += all_states(dstate_from, first_row + split, live, d, k, C, PT, tl.float64)
        every = norm_gradient(
            every,
            all_states(g_from, n, live, d, k, C, PT, tl.float64),
            mean[None, None, :],
            rstd[None, None, :],
            gain[None, None, :],
            share0[None, None, :],
            share1[None, None, :],
            BATCH,
        )
        some = live[:, None, None] & (d < C)[None, :, None] & (k < PT)[None, None, :]
        return mine, tl.where(some, every, 0.0).to(ACC)


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
    sums,
    first_from,
    dstate_from,
    state_sums,
    dr_to,
    constant_to,
    rdr_to,
    tops,
    first_to,
    partial,
    dstate_weight,
    dstate_bias,
    N,
    S,
    per_group,
    state_rows,
    NORM: tl.constexpr,
    STATE_BATCH: tl.constexpr,
    SAMPLER: tl.constexpr,
    EDGES: tl.constexpr,
    PIXEL: tl.constexpr,
    SPLITS: tl.constexpr,
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

    sums to state_sums: what modulate_backward_sums or merge_splits leaves, the last in ``state_rows`` rows. partial
    (groups, total): value, query, key (C, p, pt), scale_weight, shift_weight (C, pt, p), logit, scale_bias, shift_bias,
    ds, db (C*p), edge. dr_to, constant_to (N, C*p), rdr_to (N, C); tops, first_to: see store_tops.
    """
    c = tl.program_id(0)
    group = tl.program_id(1)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    d = tl.arange(0, C2)

    mean, rstd = load_state_norm(state_norm_of(saved, N, C, P, PT), k, PT)
    share0 = tl.zeros((PT2,), tl.float64)
    share1 = tl.zeros((PT2,), tl.float64)
    first_program = (c == 0) & (group == 0)
    if STATE_BATCH:
        sum0, sum1 = load_state_sums(state_sums, state_rows, k, rstd, PT, ROWS)
        share = 1.0 / (scalar(N).to(tl.float64) * C)
        share0 = sum0 * share
        share1 = sum1 * share
        if first_program:
            store_norm_gradients(dstate_weight, dstate_bias, k, sum0, sum1, PT, ACC)
    else:
        if first_program:
            sum0, sum1 = load_state_sums(state_sums, state_rows, k, rstd, PT, ROWS)
            store_norm_gradients(dstate_weight, dstate_bias, k, sum0, sum1, PT, ACC)
    norm = (mean, rstd, load_vector(state_weight, k, 1.0, PT, tl.float64) * rstd, share0, share1)

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
        dg, dg_all = all_norm_gradients(
            dstate_from,
            states_at(saved, N, 2, C, P, PT),
            norm,
            n,
            live,
            c,
            d,
            k,
            STATE_BATCH,
            EDGES,
            SPLITS,
            C,
            PT,
            ACC,
        )
        dh, more = reasoner_backward(
            dg,
            dg_all,
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
        E0, E1, F0, F1, K0, K1, highest, count, first, top_sum = merge_sums(
            sums, first_from, n, live, scalar(N) * SPLITS, c, j, PIXEL, SPLITS, C, P, ACC
        )
        if PIXEL:
            store_tops(tops, first_to, n, live, scalar(N).to(tl.int64) * C, c, K0, highest, count, first, C)
            K1 -= (K0 / tl.maximum(count, 1.0))[:, None] * top_sum
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
