"""Passes ``concept_modulate`` and ``modulate_backward_sums`` (contract: modulate).

out = relu(M (A1 yhat + B1) + A0 yhat + B0), M = exp(logit - max logit); without M for channel modulation.
"""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    LOWEST,
    load_channels,
    load_states,
    load_tile,
    load_weight_back,
    map_tile,
    outer_sum,
    place,
    relu,
    rows_of,
    scalar,
    split_range,
    store_channels,
    store_rows,
    store_tile,
    store_weight_back_sum,
)


@triton.jit
def project_state(state, weight, c, j, k, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """(CB, P2): state (CB, PT2) times the weight (C, pt, p); 0 where affine leaves it out."""
    if weight is None:
        return tl.zeros((c.shape[0], j.shape[0]), ACC)
    else:
        return tl.sum(state[:, None, :] * load_weight_back(weight, c, j, k, C, P, PT, ACC), 2)


@triton.jit
def coefficients(
    abar,
    bbar,
    s,
    b,
    scale_bias,
    shift_bias,
    c,
    j,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ACC: tl.constexpr,
):
    """(A1, B1, A0, B0), (CB, P2) each; the first two matter for pixel modulation alone."""
    scale = load_channels(scale_bias, scalar(0), c, j, C, P, ACC)
    shift = load_channels(shift_bias, scalar(0), c, j, C, P, ACC)
    if PIXEL:
        # abar may be infinite, and infinity times 0 is not 0
        return s * abar, tl.where(b == 0.0, bbar, tl.fma(abar, b, bbar)), s * scale, tl.fma(scale, b, shift)
    else:
        both = abar + scale
        offset = bbar + shift
        return abar, bbar, s * both, tl.where(both - both == 0.0, tl.fma(both, b, offset), offset)


@triton.jit
def centre_of(mu, s, b, A0, PIXEL: tl.constexpr):
    """What channel modulation subtracts from y: mu, but mu - b / s where alpha is infinite, so that alpha z is
    alpha s (y - centre) and not a difference of infinities; coefficients leaves b out there."""
    if PIXEL:
        return mu
    else:
        return tl.where(A0 - A0 == 0.0, mu, mu - b / s)


@triton.jit
def pre_activation(yhat, m, A1, B1, A0, B0, PIXEL: tl.constexpr):
    """What the ReLU is taken of, the same bits in every pass. m (CB, BS)."""
    slope = tl.broadcast_to(A0[:, :, None], yhat.shape)
    offset = tl.broadcast_to(B0[:, :, None], yhat.shape)
    if PIXEL:
        m = tl.broadcast_to(m[:, None, :], yhat.shape)
        slope = tl.fma(m, tl.broadcast_to(A1[:, :, None], yhat.shape), slope)
        offset = tl.fma(m, tl.broadcast_to(B1[:, :, None], yhat.shape), offset)
    return tl.fma(slope, yhat, offset)


@triton.jit
def modulate_sweep(
    rows,
    out_rows,
    some,
    begin,
    end,
    position,
    out_position,
    mu,
    v,
    maximum,
    A1,
    B1,
    A0,
    B0,
    PIXEL: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Positions [begin, end): 1R + 1W."""
    for start in range(begin, end, BS):
        i = start + tl.arange(0, BS)
        yhat = load_tile(rows, some, i, end, position, LAST, ACC) - mu[:, :, None]
        m = tl.zeros((1, 1), ACC)
        if PIXEL:
            m = tl.exp(tl.sum(yhat * v[:, :, None], 1) - maximum[:, None])
        x = relu(pre_activation(yhat, m, A1, B1, A0, B0, PIXEL))
        store_tile(out_rows, some, i, end, out_position, x, LAST)


@triton.jit
def backward_sweep(
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
    PIXEL: tl.constexpr,
    CB: tl.constexpr,
    P2: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sums over [begin, end) of e = dL/dout where the ReLU let through; 2R.

    Returns E0 = sum e, E1 = sum e yhat, F0, F1 the same weighted by M, K0 = sum k (CB,) and K1 = sum k yhat for
    k = dL/dM * M, and, of the positions where the logit is largest: the logit, their number, the first one, and the sum
    of yhat over them. What only pixel modulation has is 0 otherwise.
    """
    lanes = tl.arange(0, BS)
    E0 = tl.zeros((CB, P2, BS), ACC)
    E1 = tl.zeros((CB, P2, BS), ACC)
    F0 = tl.zeros((CB, P2, BS), ACC)
    F1 = tl.zeros((CB, P2, BS), ACC)
    K0 = tl.zeros((CB, BS), ACC)
    K1 = tl.zeros((CB, P2, BS), ACC)
    top = tl.full((CB, BS), LOWEST, ACC)
    ties = tl.zeros((CB, BS), ACC)
    where = tl.zeros((CB, BS), tl.int32)
    at_top = tl.zeros((CB, P2, BS), ACC)
    for start in range(begin, end, BS):
        i = start + lanes
        yhat = load_tile(rows, some, i, end, position, LAST, ACC) - mu[:, :, None]
        d = load_tile(grad_rows, some, i, end, grad_position, LAST, ACC)
        m = tl.zeros((1, 1), ACC)
        if PIXEL:
            logits = tl.sum(yhat * v[:, :, None], 1)
            # Outside the map yhat is -mu, far from every position where mu is large: exp may be infinite there, and
            # infinity times the zeros of e is NaN.
            m = tl.where((i < end)[None, :], tl.exp(logits - maximum[:, None]), 0.0)
        e = tl.where(pre_activation(yhat, m, A1, B1, A0, B0, PIXEL) <= 0, 0.0, d)
        E0 += e
        E1 += e * yhat
        if PIXEL:
            weighed = m[:, None, :] * e
            F0 += weighed
            F1 += weighed * yhat
            gain = tl.fma(
                tl.broadcast_to(A1[:, :, None], yhat.shape), yhat, tl.broadcast_to(B1[:, :, None], yhat.shape)
            )
            kappa = tl.sum(weighed * gain, 1)
            K0 += kappa
            K1 += kappa[:, None, :] * yhat
            inside = (i < end)[None, :]
            above = inside & (logits > top)
            equal = inside & (logits == top)
            at_top = tl.where(above[:, None, :], yhat, tl.where(equal[:, None, :], at_top + yhat, at_top))
            ties = tl.where(above, 1.0, tl.where(equal, ties + 1.0, ties))
            where = tl.where(above, i[None, :], where)
            top = tl.where(above, logits, top)
    highest = tl.max(top, 1)
    here = top == highest[:, None]
    first = tl.min(tl.where(here & (ties > 0), where, 2147483647), 1)
    count = tl.sum(tl.where(here, ties, 0.0), 1)
    top_sum = tl.sum(tl.where(here[:, None, :], at_top, 0.0), 2)
    return (
        tl.sum(E0, 2),
        tl.sum(E1, 2),
        tl.sum(F0, 2),
        tl.sum(F1, 2),
        tl.sum(K0, 1),
        tl.sum(K1, 2),
        highest,
        count,
        first,
        top_sum,
    )


@triton.jit
def store_sums(
    sums,
    first_to,
    row,
    rows,
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
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
):
    """Row ``row`` of ``sums``: E0, E1, and for pixel modulation F0, F1, K1, top_sum (rows, C*p), K0, highest, count
    (rows, C)."""
    size = scalar(rows).to(tl.int64) * (C * P)
    store_channels(sums, row, c, j, E0, C, P)
    store_channels(sums + size, row, c, j, E1, C, P)
    if PIXEL:
        store_channels(sums + 2 * size, row, c, j, F0, C, P)
        store_channels(sums + 3 * size, row, c, j, F1, C, P)
        store_channels(sums + 4 * size, row, c, j, K1, C, P)
        store_channels(sums + 5 * size, row, c, j, top_sum, C, P)
        at = row.to(tl.int64) * C + c
        small = scalar(rows).to(tl.int64) * C
        tl.store(sums + 6 * size + at, K0, mask=c < C)
        tl.store(sums + 6 * size + small + at, highest, mask=c < C)
        tl.store(sums + 6 * size + 2 * small + at, count, mask=c < C)
        tl.store(first_to + at, first, mask=c < C)


@triton.jit
def merge_sums(
    sums,
    first_from,
    n,
    live,
    rows,
    c,
    j,
    PIXEL: tl.constexpr,
    SPLITS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    ACC: tl.constexpr,
):
    """Concept c of the images ``n`` (BN,): what backward_sweep returns, of whole images, (BN, P2) and (BN,). An image
    has SPLITS of the ``rows`` rows, which are merged in order."""
    size = scalar(rows).to(tl.int64) * (C * P)
    small = scalar(rows).to(tl.int64) * C
    first_row = n.to(tl.int64) * SPLITS
    E0 = tl.zeros((n.shape[0], j.shape[0]), ACC)
    E1 = tl.zeros_like(E0)
    F0 = tl.zeros_like(E0)
    F1 = tl.zeros_like(E0)
    K1 = tl.zeros_like(E0)
    top_sum = tl.zeros_like(E0)
    K0 = tl.zeros((n.shape[0],), ACC)
    count = tl.zeros((n.shape[0],), ACC)
    highest = tl.full((n.shape[0],), LOWEST, ACC)
    first = tl.zeros((n.shape[0],), tl.int32)
    for split in range(SPLITS):
        row = first_row + split
        E0 += rows_of(sums, row, live, c, j, C, P, ACC)
        E1 += rows_of(sums + size, row, live, c, j, C, P, ACC)
        if PIXEL:
            F0 += rows_of(sums + 2 * size, row, live, c, j, C, P, ACC)
            F1 += rows_of(sums + 3 * size, row, live, c, j, C, P, ACC)
            K1 += rows_of(sums + 4 * size, row, live, c, j, C, P, ACC)
            at = row * C + c
            K0 += tl.load(sums + 6 * size + at, mask=live, other=0.0)
            new = tl.load(sums + 6 * size + small + at, mask=live, other=LOWEST)
            some = tl.load(sums + 6 * size + 2 * small + at, mask=live, other=0.0)
            place = tl.load(first_from + at, mask=live, other=0)
            sum_there = rows_of(sums + 5 * size, row, live, c, j, C, P, ACC)
            above = new > highest
            equal = new == highest
            top_sum = tl.where(above[:, None], sum_there, tl.where(equal[:, None], top_sum + sum_there, top_sum))
            count = tl.where(above, some, tl.where(equal, count + some, count))
            first = tl.where(above, place, first)
            highest = tl.where(above, new, highest)
    if not PIXEL:
        F0 = E0
        F1 = E1
    return E0, E1, F0, F1, K0, K1, highest, count, first, top_sum


@triton.jit
def attention_top(attention, n, c, S, C: tl.constexpr, CB: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr):
    """(CB,): the largest attention of each concept; NaN where one of them is."""
    top = tl.zeros((CB, BS), ACC)
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        top = tl.maximum(top, load_attention(attention, n, c, i, S, C, ACC), propagate_nan=tl.PropagateNan.ALL)
    nans = tl.sum(tl.where(top == top, 0, 1), 1)  # tl.max passes over them
    return tl.where(nans > 0, float("nan"), tl.max(top, 1))


@triton.jit
def load_attention(attention, n, c, i, S, C: tl.constexpr, ACC: tl.constexpr):
    """(CB, BS) of an array (N, C, S)."""
    at = (n.to(tl.int64) * C + c)[:, None] * S + i[None, :]
    return tl.load(attention + at, mask=(c < C)[:, None] & (i < S)[None, :], other=0.0).to(ACC)


@triton.jit
def coefficients_of(
    state,
    scale_weight,
    shift_weight,
    scale_bias,
    shift_bias,
    n,
    c,
    j,
    k,
    PIXEL: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """(A1, B1, A0, B0) of image n for z as it is: s = 1, b = 0."""
    states = load_states(state, n, c, k, C, PT, ACC)
    one = tl.full((c.shape[0], j.shape[0]), 1.0, ACC)
    return coefficients(
        project_state(states, scale_weight, c, j, k, C, P, PT, ACC),
        project_state(states, shift_weight, c, j, k, C, P, PT, ACC),
        one,
        tl.zeros_like(one),
        scale_bias,
        shift_bias,
        c,
        j,
        PIXEL,
        C,
        P,
        ACC,
    )


@triton.jit
def concept_modulate(
    z,
    image,
    channel,
    position,
    out,
    out_image,
    out_channel,
    out_position,
    state,
    scale_weight,
    shift_weight,
    scale_bias,
    shift_bias,
    attention,
    S,
    PIXEL: tl.constexpr,
    CHUNKS: tl.constexpr,
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
    """The op alone. Grid (N * CHUNKS * concept blocks,); 1R + 1W."""
    row, c = place(CB, C)
    n = row // CHUNKS
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    A1, B1, A0, B0 = coefficients_of(
        state, scale_weight, shift_weight, scale_bias, shift_bias, n, c, j, k, PIXEL, C, P, PT, ACC
    )
    if PIXEL:
        top = attention_top(attention, n, c, S, C, CB, BS, ACC)
    rows, some = map_tile(z, n, image, channel, position, c, j, C, P, LAST)
    out_rows, _ = map_tile(out, n, out_image, out_channel, out_position, c, j, C, P, LAST)
    begin, end = split_range(row % CHUNKS, scalar(S), BS, CHUNKS)
    for start in range(begin, end, BS):
        i = start + tl.arange(0, BS)
        m = tl.zeros((1, 1), ACC)
        if PIXEL:
            m = load_attention(attention, n, c, i, S, C, ACC) / top[:, None]
        x = pre_activation(load_tile(rows, some, i, end, position, LAST, ACC), m, A1, B1, A0, B0, PIXEL)
        store_tile(out_rows, some, i, end, out_position, relu(x), LAST)


@triton.jit
def concept_modulate_backward(
    z,
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
    state,
    scale_weight,
    shift_weight,
    scale_bias,
    shift_bias,
    attention,
    dattention,
    sums,
    N,
    S,
    PIXEL: tl.constexpr,
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
    """The op alone: dL/dz, and E0, E1, F0, F1 (4, N, C*p). Grid (N * concept blocks,); 2R + 1W.

    dattention (N, C, S) gets dL/dM~, which attention_gradient takes on to dL/dM.
    """
    n, c = place(CB, C)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    A1, B1, A0, B0 = coefficients_of(
        state, scale_weight, shift_weight, scale_bias, shift_bias, n, c, j, k, PIXEL, C, P, PT, ACC
    )
    if PIXEL:
        top = attention_top(attention, n, c, S, C, CB, BS, ACC)
    rows, some = map_tile(z, n, image, channel, position, c, j, C, P, LAST)
    grad_rows, _ = map_tile(grad, n, grad_image, grad_channel, grad_position, c, j, C, P, LAST)
    out_rows, _ = map_tile(out, n, out_image, out_channel, out_position, c, j, C, P, LAST)
    E0 = tl.zeros((CB, P2, BS), ACC)
    E1 = tl.zeros((CB, P2, BS), ACC)
    F0 = tl.zeros((CB, P2, BS), ACC)
    F1 = tl.zeros((CB, P2, BS), ACC)
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        x = load_tile(rows, some, i, S, position, LAST, ACC)
        d = load_tile(grad_rows, some, i, S, grad_position, LAST, ACC)
        m = tl.zeros((1, 1), ACC)
        if PIXEL:
            m = load_attention(attention, n, c, i, S, C, ACC) / top[:, None]
        e = tl.where(pre_activation(x, m, A1, B1, A0, B0, PIXEL) <= 0, 0.0, d)
        slope = tl.broadcast_to(A0[:, :, None], x.shape)
        E0 += e
        E1 += e * x
        if PIXEL:
            slope = tl.fma(tl.broadcast_to(m[:, None, :], x.shape), tl.broadcast_to(A1[:, :, None], x.shape), slope)
            F0 += m[:, None, :] * e
            F1 += m[:, None, :] * e * x
            through = tl.sum(e * (A1[:, :, None] * x + B1[:, :, None]), 1)
            at = (n.to(tl.int64) * C + c)[:, None] * S + i[None, :]
            tl.store(dattention + at, through, mask=(c < C)[:, None] & (i < S)[None, :])
        store_tile(out_rows, some, i, S, out_position, slope * e, LAST)
    size = scalar(N).to(tl.int64) * (C * P)
    store_channels(sums, n, c, j, tl.sum(E0, 2), C, P)
    store_channels(sums + size, n, c, j, tl.sum(E1, 2), C, P)
    store_channels(sums + 2 * size, n, c, j, tl.sum(F0 if PIXEL else E0, 2), C, P)
    store_channels(sums + 3 * size, n, c, j, tl.sum(F1 if PIXEL else E1, 2), C, P)


@triton.jit
def attention_gradient(attention, through, dattention, S, C: tl.constexpr, BS: tl.constexpr, ACC: tl.constexpr):
    """dL/dM = dL/dM~ / max M, less the maximum's share, which ties share evenly. Grid (N, C)."""
    n = tl.program_id(0)
    c = tl.program_id(1) + tl.arange(0, 1)
    top = attention_top(attention, n, c, S, C, 1, BS, ACC)
    total = tl.zeros((1, BS), ACC)
    ties = tl.zeros((1, BS), ACC)
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        a = load_attention(attention, n, c, i, S, C, ACC)
        total += a * load_attention(through, n, c, i, S, C, ACC)
        ties += tl.where((a == top[:, None]) & (i < S)[None, :], 1.0, 0.0)
    share = tl.sum(total, 1) / (top * top * tl.maximum(tl.sum(ties, 1), 1.0))
    for start in range(0, S, BS):
        i = start + tl.arange(0, BS)
        a = load_attention(attention, n, c, i, S, C, ACC)
        x = load_attention(through, n, c, i, S, C, ACC) / top[:, None] - tl.where(
            a == top[:, None], share[:, None], 0.0
        )
        at = (n.to(tl.int64) * C + c)[:, None] * S + i[None, :]
        tl.store(dattention + at, x.to(dattention.dtype.element_ty), mask=(i < S)[None, :])


@triton.jit
def modulate_gradients(
    sums,
    state,
    scale_weight,
    shift_weight,
    dstate_to,
    dscale_to,
    dshift_to,
    dscale_bias_to,
    dshift_bias_to,
    N,
    C: tl.constexpr,
    P: tl.constexpr,
    P2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: one concept's gradients, over all images in order. Grid (C,)."""
    c = tl.program_id(0)
    j = tl.arange(0, P2)
    k = tl.arange(0, PT2)
    size = scalar(N).to(tl.int64) * (C * P)
    dscale = tl.zeros((P2, PT2), ACC)
    dshift = tl.zeros((P2, PT2), ACC)
    dscale_bias = tl.zeros((P2,), ACC)
    dshift_bias = tl.zeros((P2,), ACC)
    mask = (j < P)[:, None] & (k < PT)[None, :]
    weights = (c * PT + k)[None, :] * P + j[:, None]
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        states = rows_of(state, n, live, c, k, C, PT, ACC)
        F0 = rows_of(sums + 2 * size, n, live, c, j, C, P, ACC)
        F1 = rows_of(sums + 3 * size, n, live, c, j, C, P, ACC)
        dstate = tl.zeros((BN, PT2), ACC)
        if scale_weight is not None:
            dscale += outer_sum(F1, states)
            w = tl.load(scale_weight + weights, mask=mask, other=0.0).to(ACC)
            dstate += tl.sum(F1[:, :, None] * w[None, :, :], 1)
        if shift_weight is not None:
            dshift += outer_sum(F0, states)
            w = tl.load(shift_weight + weights, mask=mask, other=0.0).to(ACC)
            dstate += tl.sum(F0[:, :, None] * w[None, :, :], 1)
        store_rows(dstate_to, n, live, c, k, dstate.to(dstate_to.dtype.element_ty), C, PT)
        dscale_bias += tl.sum(rows_of(sums + size, n, live, c, j, C, P, ACC), 0)
        dshift_bias += tl.sum(rows_of(sums, n, live, c, j, C, P, ACC), 0)
    if scale_weight is not None:
        store_weight_back_sum(dscale_to, c, j, k, dscale.to(dscale_to.dtype.element_ty), P, PT)
    if shift_weight is not None:
        store_weight_back_sum(dshift_to, c, j, k, dshift.to(dshift_to.dtype.element_ty), P, PT)
    tl.store(dscale_bias_to + c * P + j, dscale_bias.to(dscale_bias_to.dtype.element_ty), mask=j < P)
    tl.store(dshift_bias_to + c * P + j, dshift_bias.to(dshift_bias_to.dtype.element_ty), mask=j < P)
