"""The reasoner's small functions (contract: interact; paper, Eq. 3)."""

import triton
import triton.language as tl

from ...triton_common.blocks import (
    all_states,
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
def block_state_stats(parts, start, rows, per_row, N, k, C: tl.constexpr, PT: tl.constexpr, ROWS: tl.constexpr):
    """(mean, centred sum of squares, number of states) of ROWS rows of parts, from ``start`` on; see below."""
    row = start + tl.arange(0, ROWS)
    mask = (row < rows)[:, None] & (k < PT)[None, :]
    at = parts + (2 * row * PT)[:, None] + k[None, :]
    means = tl.load(at, mask=mask, other=0.0)
    squares = tl.load(at + PT, mask=mask, other=0.0)
    values = tl.maximum(tl.minimum(N - row * per_row, per_row), 0).to(tl.float64) * C
    count = tl.sum(values, 0)
    mean = tl.sum(means * values[:, None], 0) / count
    apart = tl.where(mask, means - mean[None, :], 0.0)
    return mean, tl.sum(squares + values[:, None] * apart * apart, 0), count


@triton.jit
def merge_state_stats(
    parts, rows, per_row, N, k, ONE_BLOCK: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, ROWS: tl.constexpr
):
    """(mean, centred sum of squares), (PT2,) float64 each, of the states of all images, from parts (rows, 2, pt), a row
    for each ``per_row`` images; ROWS rows at a time, merged by Chan's formula. ONE_BLOCK: that is all of them.

    The batch norm of the states is in float64 whatever the features are: of few states it lets through next to nothing
    of a gradient, and rounding errors must be smaller than that.
    """
    mean, squares, before = block_state_stats(parts, 0, rows, per_row, N, k, C, PT, ROWS)
    if not ONE_BLOCK:
        for start in range(ROWS, rows, ROWS):
            block_mean, block_squares, count = block_state_stats(parts, start, rows, per_row, N, k, C, PT, ROWS)
            share = count / (before + count)
            shift = block_mean - mean
            mean += shift * share
            squares += block_squares + shift * shift * (before * share)
            before += count
    return mean, squares


@triton.jit
def state_norm(
    parts,
    mean_from,
    var_from,
    rows,
    per_row,
    N,
    k,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(mean, 1 / sqrt(var + eps), unbiased var), (PT2,) float64 each: the batch's or the given ones."""
    if BATCH:
        mean, squares = merge_state_stats(parts, rows, per_row, N, k, ONE_BLOCK, C, PT, ROWS)
        count = scalar(N).to(tl.float64) * C
        return mean, 1.0 / tl.sqrt(squares / count + EPS), squares / (count - 1.0)
    else:
        var = load_vector(var_from, k, 1.0, PT, tl.float64)
        return load_vector(mean_from, k, 0.0, PT, tl.float64), 1.0 / tl.sqrt(var + EPS), var


@triton.jit
def normalise(g, mean, rstd, weight, bias, k, PT: tl.constexpr, ACC: tl.constexpr):
    """relu((g - mean) rstd * weight + bias), rows of states."""
    xhat = (g.to(tl.float64) - mean[None, :]) * rstd[None, :]
    gain = load_vector(weight, k, 1.0, PT, tl.float64)
    return relu(xhat * gain[None, :] + load_vector(bias, k, 0.0, PT, tl.float64)[None, :]).to(ACC)


@triton.jit
def exchange(
    h_rows,
    h_from,
    edge,
    edges_to,
    n,
    c,
    k,
    EDGES: tl.constexpr,
    SAVE: tl.constexpr,
    DB: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Rows ``c`` of G = H + A H of image n, (len(c), PT2), from h_from (N, C, pt), DB concepts at a time; h_rows are
    its rows ``c``. SAVE: dynamic edges go to edges_to (N, C, C)."""
    g = h_rows
    if EDGES != "none":
        for start in range(0, C, DB):
            d = start + tl.arange(0, DB)
            a = edges_row(h_rows, edge, c, d, k, EDGES, C, PT, ACC)
            if SAVE & (EDGES == "dynamic"):
                store_edges(edges_to, n, c, d, a, C)
            g += tl.sum(a[:, :, None] * load_states(h_from, n, d, k, C, PT, ACC)[None, :, :], 1)
    return g


@triton.jit
def store_edges(base, n, c, d, a, C: tl.constexpr):
    """Rows ``c``, columns ``d`` of image n of an array (N, C, C)."""
    at = (n.to(tl.int64) * C + c)[:, None] * C + d[None, :]
    tl.store(base + at, a, mask=(c < C)[:, None] & (d < C)[None, :])


@triton.jit
def reason_image(
    h_from,
    edge,
    g_to,
    edges_to,
    n,
    k,
    EDGES: tl.constexpr,
    SAVE: tl.constexpr,
    RB: tl.constexpr,
    DB: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    ACC: tl.constexpr,
):
    """G of image n, RB concepts at a time. Returns the mean and the centred sum of squares over its concepts, (PT2,)
    float64 each."""
    mean = tl.zeros((k.shape[0],), tl.float64)
    squares = tl.zeros((k.shape[0],), tl.float64)
    for start in range(0, C, RB):
        c = start + tl.arange(0, RB)
        h = load_states(h_from, n, c, k, C, PT, ACC)
        g = exchange(h, h_from, edge, edges_to, n, c, k, EDGES, SAVE, DB, C, PT, ACC)
        store_states(g_to, n, c, k, g, C, PT)
        before = scalar(start).to(tl.float64)
        count = tl.minimum(scalar(RB).to(tl.float64), C - before)
        block_mean, block_squares = rows_stats(g, c, count, C)
        shift = block_mean - mean
        mean += shift * (count / (before + count))
        squares += block_squares + shift * shift * (before * count / (before + count))
    return mean, squares


@triton.jit
def rows_stats(g, c, count, C: tl.constexpr):
    """(mean, centred sum of squares), float64, of the rows of G that there are."""
    wide = g.to(tl.float64)
    mean = tl.sum(wide, 0) / count
    apart = tl.where((c < C)[:, None], wide - mean[None, :], 0.0)
    return mean, tl.sum(apart * apart, 0)


@triton.jit
def store_state_part(parts, row, k, mean, squares, PT: tl.constexpr):
    """Row ``row`` of parts (rows, 2, pt): mean and centred sum of squares over the concepts of some images."""
    tl.store(parts + 2 * row * PT + k, mean, mask=k < PT)
    tl.store(parts + (2 * row + 1) * PT + k, squares, mask=k < PT)


@triton.jit
def store_state_norm(to, k, rstd, mean, PT: tl.constexpr):
    """What both directions must see alike, (4, pt): 1 / sqrt(var + eps), what rounding takes from it, and the mean in
    the same way. (Two float32 have 48 of float64's 53 bits.)"""
    store_split(to, k, rstd, PT)
    store_split(to + 2 * PT, k, mean, PT)


@triton.jit
def store_split(to, k, x, PT: tl.constexpr):
    """x, float64, as a number and what rounding takes from it, (2, pt); nothing, where x isn't finite."""
    rounded = x.to(to.dtype.element_ty)
    rest = x - rounded.to(tl.float64)
    tl.store(to + k, rounded, mask=k < PT)
    tl.store(to + PT + k, tl.where(rest - rest == 0.0, rest, 0.0).to(to.dtype.element_ty), mask=k < PT)


@triton.jit
def load_state_norm(base, k, PT: tl.constexpr):
    """(mean, 1 / sqrt(var + eps)), (PT2,) float64 each."""
    rstd = load_vector(base, k, 0.0, PT, tl.float64) + load_vector(base + PT, k, 0.0, PT, tl.float64)
    mean = load_vector(base + 2 * PT, k, 0.0, PT, tl.float64) + load_vector(base + 3 * PT, k, 0.0, PT, tl.float64)
    return mean, rstd


@triton.jit
def store_state_sums(parts, row, k, dstate, product, PT: tl.constexpr):
    """Row ``row`` of parts (rows, 2, pt): the sums of dstate and of dstate (G - mean) over some states."""
    at = parts + 2 * row * PT + k
    tl.store(at, dstate, mask=k < PT)
    tl.store(at + PT, product, mask=k < PT)


@triton.jit
def load_state_sums(parts, rows, k, rstd, PT: tl.constexpr, ROWS: tl.constexpr):
    """The sums of dstate and of dstate xhat over all rows of parts, ROWS at a time: (PT2,) float64 each, the gradients
    of the norm's bias and weight."""
    dstate = tl.zeros((k.shape[0],), tl.float64)
    product = tl.zeros((k.shape[0],), tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (k < PT)[None, :]
        at = parts + (2 * row * PT)[:, None] + k[None, :]
        dstate += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        product += tl.sum(tl.load(at + PT, mask=mask, other=0.0), 0)
    return dstate, product * rstd


@triton.jit
def store_norm_gradients(dweight, dbias, k, sum0, sum1, PT: tl.constexpr, ACC: tl.constexpr):
    """The gradients of the norm's weight and bias, where they are wanted."""
    if dweight is not None:
        # by way of ACC: the interpreter can't make bfloat16 of float64
        tl.store(dweight + k, sum1.to(ACC).to(dweight.dtype.element_ty), mask=k < PT)
    if dbias is not None:
        tl.store(dbias + k, sum0.to(ACC).to(dbias.dtype.element_ty), mask=k < PT)


@triton.jit
def norm_gradient(dstate, g, mean, rstd, gain, share0, share1, BATCH: tl.constexpr):
    """dL/dG of states, float64. BATCH: share0 and share1 are the sums over all states by their number; given
    statistics are constants. The vectors broadcast."""
    if BATCH:
        dstate = dstate - share0 - (g - mean) * rstd * share1
    return dstate * gain


@triton.jit
def state_norm_backward(
    dstate,
    g_from,
    parts,
    weight,
    norm_from,
    dg_to,
    dweight,
    dbias,
    N,
    BATCH: tl.constexpr,
    C: tl.constexpr,
    CB: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: dL/dG through the batch norm of the states. Grid (N,): each adds up the sums of all images first.

    parts: see store_state_sums, a row for each image. norm_from: see store_state_norm.
    """
    n = tl.program_id(0)
    k = tl.arange(0, PT2)
    mean, rstd = load_state_norm(norm_from, k, PT)
    sum0, sum1 = load_state_sums(parts, N, k, rstd, PT, ROWS)
    if n == 0:
        store_norm_gradients(dweight, dbias, k, sum0, sum1, PT, ACC)
    gain = load_vector(weight, k, 1.0, PT, tl.float64) * rstd
    share = 1.0 / (scalar(N).to(tl.float64) * C)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        dg = norm_gradient(
            load_states(dstate, n, c, k, C, PT, tl.float64),
            load_states(g_from, n, c, k, C, PT, tl.float64),
            mean[None, :],
            rstd[None, :],
            gain[None, :],
            (sum0 * share)[None, :],
            (sum1 * share)[None, :],
            BATCH,
        )
        store_states(dg_to, n, c, k, dg.to(ACC), C, PT)


@triton.jit
def reasoner_backward(
    dg,
    dg_all,
    h,
    edge,
    edges,
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
    """dL/dh of concept c in the images ``n``, (BN, PT2), from its dL/dG, dg, and that of all concepts, dg_all (BN, C2,
    PT2); and their share of the edges' gradient: column c of W^edge (PT2,), which all concepts' scores against c reach,
    or row c of the learned matrix (C2,)."""
    if EDGES == "none":
        return dg, tl.zeros((k.shape[0],), ACC)
    else:
        h_all = all_states(h, n, live, d, k, C, PT, ACC)
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
    RB: tl.constexpr,
    DB: tl.constexpr,
    C: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone, before its batch norm. Grid (N,). g_to (N, C, pt), edges_to (N, C, C), parts (N, 2, pt)."""
    n = tl.program_id(0)
    k = tl.arange(0, PT2)
    mean, squares = reason_image(h, edge, g_to, edges_to, n, k, EDGES, SAVE, RB, DB, C, PT, ACC)
    store_state_part(parts, n, k, mean, squares, PT)


@triton.jit
def normalise_states(
    g_from,
    parts,
    mean_from,
    var_from,
    weight,
    bias,
    state_to,
    norm_to,
    mean_to,
    var_to,
    N,
    EPS: tl.constexpr,
    BATCH: tl.constexpr,
    C: tl.constexpr,
    CB: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: batch norm and ReLU of G. Grid (N,)."""
    n = tl.program_id(0)
    k = tl.arange(0, PT2)
    mean, rstd, var = state_norm(parts, mean_from, var_from, N, 1, N, k, EPS, BATCH, False, C, PT, ROWS)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        state = normalise(load_states(g_from, n, c, k, C, PT, ACC), mean, rstd, weight, bias, k, PT, ACC)
        store_states(state_to, n, c, k, state, C, PT)
    if n == 0:
        store_state_norm(norm_to, k, rstd, mean, PT)
        if BATCH:
            tl.store(mean_to + k, mean.to(ACC), mask=k < PT)
            tl.store(var_to + k, var.to(ACC), mask=k < PT)


@triton.jit
def state_relu_backward(
    dstate_from,
    g_from,
    weight,
    bias,
    norm_from,
    dstate_to,
    parts,
    C: tl.constexpr,
    CB: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: dL/d(what the ReLU is taken of), and its sums, see store_state_sums. Grid (N,)."""
    n = tl.program_id(0)
    k = tl.arange(0, PT2)
    mean, rstd = load_state_norm(norm_from, k, PT)
    sum0 = tl.zeros((PT2,), tl.float64)
    sum1 = tl.zeros((PT2,), tl.float64)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        g = load_states(g_from, n, c, k, C, PT, ACC)
        state = normalise(g, mean, rstd, weight, bias, k, PT, ACC)
        dstate = tl.where(state <= 0, 0.0, load_states(dstate_from, n, c, k, C, PT, ACC))
        store_states(dstate_to, n, c, k, dstate, C, PT)
        sum0 += tl.sum(dstate.to(tl.float64), 0)
        sum1 += tl.sum(dstate.to(tl.float64) * tl.where((c < C)[:, None], g.to(tl.float64) - mean[None, :], 0.0), 0)
    store_state_sums(parts, n, k, sum0, sum1, PT)


@triton.jit
def reason_gradients(
    dg,
    h,
    edge,
    edges,
    dh_to,
    dedge,
    N,
    EDGES: tl.constexpr,
    C: tl.constexpr,
    C2: tl.constexpr,
    PT: tl.constexpr,
    PT2: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """The op alone: one concept's dh (N, C, pt), and its part of the edges' gradient. Grid (C,)."""
    c = tl.program_id(0)
    d = tl.arange(0, C2)
    k = tl.arange(0, PT2)
    total = tl.zeros((C2 if EDGES == "static" else PT2,), ACC)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        live = n < N
        dg_mine = rows_of(dg, n, live, c, k, C, PT, ACC)
        dg_all = all_states(dg, n, live, d, k, C, PT, ACC)
        dh, more = reasoner_backward(dg_mine, dg_all, h, edge, edges, n, live, c, d, k, EDGES, C, PT, ACC)
        store_rows(dh_to, n, live, c, k, dh, C, PT)
        total += more
    if EDGES == "dynamic":
        tl.store(dedge + k * C + c, total.to(dedge.dtype.element_ty), mask=k < PT)
    if EDGES == "static":
        tl.store(dedge + c * C + d, total.to(dedge.dtype.element_ty), mask=d < C)
