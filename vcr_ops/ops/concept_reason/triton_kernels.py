"""The reasoner's small functions (contract: interact; paper, Eq. 3)."""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    all_states,
    inverse_root,
    load_states,
    load_vector,
    relu,
    rows_of,
    scalar,
    store_rows,
    store_states,
    tanh,
)


@triton.jit
def edges_row(h, edge, c, d, k, EDGES: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """Rows ``c`` of A, (len(c), len(d)): tanh(h W^edge) for the states h (len(c), PT2), or the learned matrix."""
    some = (c < C)[:, None] & (d < C)[None, :]
    if EDGES == "dynamic":
        mask = (k < PT)[:, None] & (d < C)[None, :]
        w = tl.load(edge + k[:, None] * C + d[None, :], mask=mask, other=0.0).to(ACC)
        a = tanh(tl.sum(h[:, :, None] * w[None, :, :], 1), ACC)
        return tl.where(some, a, 0.0)
    else:
        return tl.load(edge + c[:, None] * C + d[None, :], mask=some, other=0.0).to(ACC)


@triton.jit
def merge_state_stats(parts, N, k, C: tl.constexpr, PT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """(mean, centred sum of squares), (PT2,) each, of the states of all images from parts (N, 2, pt)."""
    lanes = tl.arange(0, ROWS)
    total = tl.zeros((k.shape[0],), ACC)
    for start in range(0, N, ROWS):
        n = start + lanes
        mask = (n < N)[:, None] & (k < PT)[None, :]
        total += tl.sum(tl.load(parts + (2 * n * PT)[:, None] + k[None, :], mask=mask, other=0.0), 0)
    mean = total / scalar(N).to(ACC)
    squares = tl.zeros((k.shape[0],), ACC)
    for start in range(0, N, ROWS):
        n = start + lanes
        mask = (n < N)[:, None] & (k < PT)[None, :]
        at = parts + (2 * n * PT)[:, None] + k[None, :]
        apart = tl.where(mask, tl.load(at, mask=mask, other=0.0) - mean[None, :], 0.0)
        squares += tl.sum(tl.load(at + PT, mask=mask, other=0.0) + C * apart * apart, 0)
    return mean, squares


@triton.jit
def normalise(g, mean, rstd, weight, bias, k, PT: tl.constexpr, ACC: tl.constexpr):
    """(xhat, relu(xhat * weight + bias)), rows of states."""
    xhat = (g - mean[None, :]) * rstd[None, :]
    x = tl.fma(
        xhat,
        tl.broadcast_to(load_vector(weight, k, 1.0, PT, ACC)[None, :], xhat.shape),
        tl.broadcast_to(load_vector(bias, k, 0.0, PT, ACC)[None, :], xhat.shape),
    )
    return xhat, relu(x)


@triton.jit
def exchange(
    h,
    edge,
    edges_to,
    n,
    c,
    k,
    EDGES: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """G = H + A H of image n, (C2, PT2). SAVE: dynamic edges go to edges_to (N, C, C)."""
    if EDGES == "none":
        return h
    else:
        a = edges_row(h, edge, c, c, k, EDGES, C, PT, ACC)
        if SAVE & (EDGES == "dynamic"):
            at = (n.to(tl.int64) * C + c)[:, None] * C + c[None, :]
            tl.store(edges_to + at, a, mask=(c < C)[:, None] & (c < C)[None, :])
        return h + tl.sum(a[:, :, None] * h[None, :, :], 1)


@triton.jit
def store_state_part(parts, n, c, k, g, C: tl.constexpr, PT: tl.constexpr):
    """Image n's row of parts (N, 2, pt): mean and centred sum of squares over concepts."""
    mean = tl.sum(g, 0) / C
    apart = tl.where((c < C)[:, None], g - mean[None, :], 0.0)
    tl.store(parts + 2 * n * PT + k, mean, mask=k < PT)
    tl.store(parts + (2 * n + 1) * PT + k, tl.sum(apart * apart, 0), mask=k < PT)


@triton.jit
def state_norm_gradients(
    parts,
    dweight,
    dbias,
    weight,
    rstd,
    N,
    k,
    store,
    BATCH: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The states' batch norm, backward: (mean of dstate, mean of dstate xhat, weight * rstd), (PT2,) each, from the
    images' sums, parts (N, 2, pt); given statistics are constants, so then the means are 0. One program stores."""
    sum0 = tl.zeros((k.shape[0],), ACC)
    sum1 = tl.zeros((k.shape[0],), ACC)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & (k < PT)[None, :]
        at = parts + (2 * n * PT)[:, None] + k[None, :]
        sum0 += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        sum1 += tl.sum(tl.load(at + PT, mask=mask, other=0.0), 0)
    if store:
        if dweight is not None:
            tl.store(dweight + k, sum1.to(dweight.dtype.element_ty), mask=k < PT)
        if dbias is not None:
            tl.store(dbias + k, sum0.to(dbias.dtype.element_ty), mask=k < PT)
    gain = load_vector(weight, k, 1.0, PT, ACC) * load_vector(rstd, k, 0.0, PT, ACC)
    if BATCH:
        count = scalar(N).to(ACC) * C
        return sum0 / count, sum1 / count, gain
    else:
        return tl.zeros((k.shape[0],), ACC), tl.zeros((k.shape[0],), ACC), gain


@triton.jit
def reasoner_backward(
    dstate,
    xhat,
    h,
    edge,
    edges,
    mean0,
    mean1,
    gain,
    n,
    live,
    c,
    d,
    k,
    EDGES: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """dL/dh of concept c in the images ``n``, (BN, PT2), and their share of the edges' gradient: column c of W^edge
    (PT2,), which all concepts' scores against c reach, or row c of the learned matrix (C2,)."""
    here = live[:, None] & (k < PT)[None, :]
    xhat_c = rows_of(xhat, n, live, c, k, C, PT, ACC)
    dg = (rows_of(dstate, n, live, c, k, C, PT, ACC) - mean0[None, :] - xhat_c * mean1[None, :]) * gain[None, :]
    dg = tl.where(here, dg, 0.0)
    if EDGES == "none":
        return dg, tl.zeros((k.shape[0],), ACC)
    else:
        h_all = all_states(h, n, live, d, k, C, PT, ACC)
        dg_all = all_states(dstate, n, live, d, k, C, PT, ACC) - mean0[None, None, :]
        dg_all = (dg_all - all_states(xhat, n, live, d, k, C, PT, ACC) * mean1[None, None, :]) * gain[None, None, :]
        dg_all = tl.where(live[:, None, None] & (d < C)[None, :, None] & (k < PT)[None, None, :], dg_all, 0.0)
        da = tl.sum(dg[:, None, :] * h_all, 2)  # of row c of A
        if EDGES == "dynamic":
            mask = live[:, None] & (d < C)[None, :]
            at = edges + n.to(tl.int64)[:, None] * (C * C)
            row = tl.load(at + c * C + d[None, :], mask=mask, other=0.0)
            column = tl.load(at + d[None, :] * C + c, mask=mask, other=0.0)
            we = tl.load(edge + k[None, :] * C + d[:, None], mask=(d < C)[:, None] & (k < PT)[None, :], other=0.0)
            dscore = da * (1.0 - row * row)
            dh = dg + tl.sum(column[:, :, None] * dg_all, 1) + tl.sum(dscore[:, :, None] * we.to(ACC)[None, :, :], 1)
            into = tl.sum(dg_all * rows_of(h, n, live, c, k, C, PT, ACC)[:, None, :], 2) * (1.0 - column * column)
            return dh, tl.sum(tl.sum(into[:, :, None] * h_all, 1), 0)
        else:
            column = tl.load(edge + d * C + c, mask=d < C, other=0.0).to(ACC)
            return dg + tl.sum(column[None, :, None] * dg_all, 1), tl.sum(da, 0)


@triton.jit
def reason(
    h,
    edge,
    g_to,
    edges_to,
    parts,
    EDGES: tl.constexpr,
    SAVE: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone, before its batch norm. Grid (N,). g_to (N, C, pt), edges_to (N, C, C), parts (N, 2, pt)."""
    n = tl.program_id(0)
    c = tl.arange(0, C2)
    k = tl.arange(0, PT2)
    g = exchange(load_states(h, n, c, k, C, PT, ACC), edge, edges_to, n, c, k, EDGES, SAVE, C, PT, ACC)
    store_states(g_to, n, c, k, g, C, PT)
    store_state_part(parts, n, c, k, g, C, PT)


@triton.jit
def normalise_states(
    g_from,
    parts,
    mean_from,
    var_from,
    weight,
    bias,
    state_to,
    xhat_to,
    rstd_to,
    mean_to,
    var_to,
    N,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: batch norm and ReLU of G. Grid (N,). xhat_to, rstd_to: what the backward pass reads."""
    n = tl.program_id(0)
    c = tl.arange(0, C2)
    k = tl.arange(0, PT2)
    if BATCH:
        mean, squares = merge_state_stats(parts, N, k, C, PT, ROWS, ACC)
        count = scalar(N).to(ACC) * C
        rstd = inverse_root(squares / count + EPS, ACC)
        if n == 0:
            tl.store(mean_to + k, mean, mask=k < PT)
            tl.store(var_to + k, squares / (count - 1.0), mask=k < PT)
    else:
        mean = load_vector(mean_from, k, 0.0, PT, ACC)
        rstd = inverse_root(load_vector(var_from, k, 1.0, PT, ACC) + EPS, ACC)
    xhat, state = normalise(load_states(g_from, n, c, k, C, PT, ACC), mean, rstd, weight, bias, k, PT, ACC)
    store_states(state_to, n, c, k, state, C, PT)
    store_states(xhat_to, n, c, k, xhat, C, PT)
    if n == 0:
        tl.store(rstd_to + k, rstd, mask=k < PT)
        tl.store(rstd_to + PT + k, mean, mask=k < PT)


@triton.jit
def state_relu_backward(
    dstate_from,
    xhat_from,
    weight,
    bias,
    dstate_to,
    parts,
    C: tl.constexpr,
    C2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: dL/d(what the ReLU is taken of), and parts (N, 2, pt), its sums with 1 and xhat. Grid (N,)."""
    n = tl.program_id(0)
    c = tl.arange(0, C2)
    k = tl.arange(0, PT2)
    xhat = load_states(xhat_from, n, c, k, C, PT, ACC)
    _, state = normalise(xhat, tl.zeros((PT2,), ACC), tl.full((PT2,), 1.0, ACC), weight, bias, k, PT, ACC)
    dstate = tl.where(state <= 0, 0.0, load_states(dstate_from, n, c, k, C, PT, ACC))
    store_states(dstate_to, n, c, k, dstate, C, PT)
    tl.store(parts + 2 * n * PT + k, tl.sum(dstate, 0), mask=k < PT)
    tl.store(parts + (2 * n + 1) * PT + k, tl.sum(dstate * xhat, 0), mask=k < PT)


@triton.jit
def reason_gradients(
    dstate,
    xhat,
    h,
    edge,
    edges,
    parts,
    weight,
    rstd,
    dh_to,
    dedge,
    dweight,
    dbias,
    N,
    EDGES: tl.constexpr,
    BATCH: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: one concept's dh (N, C, pt), and its part of the edges' gradient. Grid (C,)."""
    c = tl.program_id(0)
    d = tl.arange(0, C2)
    k = tl.arange(0, PT2)
    mean0, mean1, gain = state_norm_gradients(
        parts, dweight, dbias, weight, rstd, N, k, c == 0, BATCH, C, PT, ROWS, ACC
    )
    total = tl.zeros((C2 if EDGES == "static" else PT2,), ACC)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        dh, more = reasoner_backward(
            dstate, xhat, h, edge, edges, mean0, mean1, gain, n, live, c, d, k, EDGES, C, PT, ACC
        )
        store_rows(dh_to, n, live, c, k, dh, C, PT)
        total += more
    if EDGES == "dynamic":
        tl.store(dedge + k * C + c, total.to(dedge.dtype.element_ty), mask=k < PT)
    if EDGES == "static":
        tl.store(dedge + c * C + d, total.to(dedge.dtype.element_ty), mask=d < C)
