"""The middle's last pass, middle_input_grad (2R + 1W), whose programs also finish the parameters' gradients."""

import triton
import triton.language as tl

from ...triton_common.blocks import load_channels, load_tile, map_tile, place, scalar, split_range, store_tile
from ..concept_modulate.triton_kernels import pre_activation
from .triton_saved import modulator_of, rstd_of, s_of, softmax_of


@triton.jit
def gradients_size(EDGES: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """Numbers in one group's row of ``partial``."""
    edges: tl.constexpr = PT * C if EDGES == "dynamic" else (C * C if EDGES == "static" else 0)
    return 5 * C * P * PT + 5 * C * P + edges


@triton.jit
def sum_groups(
    partial,
    groups,
    total: tl.constexpr,
    offset: tl.constexpr,
    at,
    count: tl.constexpr,
    GB: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum over groups, GB at a time, of the numbers ``at`` below ``count`` that stand ``offset`` into a row."""
    x = tl.zeros(at.shape, ACC)
    for start in range(0, groups, GB):
        group = start + tl.arange(0, GB)
        mask = (group < groups)[:, None] & (at < count)[None, :]
        rows = (group.to(tl.int64) * total + offset)[:, None]
        x += tl.sum(tl.load(partial + rows + at[None, :], mask=mask, other=0.0), 0)
    return x


@triton.jit
def finish(
    partial,
    groups,
    total: tl.constexpr,
    offset: tl.constexpr,
    to,
    block,
    count: tl.constexpr,
    RB: tl.constexpr,
    GB: tl.constexpr,
    ACC: tl.constexpr,
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
    tops,
    first_from,
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
    """dL/dy; 2R + 1W. Grid (N * CHUNKS * concept blocks,). tops, first_from: see small_gradients."""
    row, c = place(CB, C)
    n = row // CHUNKS
    j = tl.arange(0, P2)
    edges: tl.constexpr = PT * C if EDGES == "dynamic" else (C * C if EDGES == "static" else 0)
    total: tl.constexpr = 5 * C * P * PT + 5 * C * P + edges
    vectors: tl.constexpr = 5 * C * P * PT
    mu, v, maximum, A1, B1, A0, B0 = modulator_of(
        saved, norm_bias, scale_bias, shift_bias, n, N, c, j, NORM, PIXEL, C, P, PT, ACC
    )
    constant = load_channels(constant_from, n, c, j, C, P, ACC)
    c1 = tl.zeros((CB, P2), ACC)
    if NORM == "batch":
        count = scalar(N).to(ACC) * S
        s = load_channels(s_of(saved, C, P), scalar(0), c, j, C, P, ACC)
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
            small = scalar(N).to(tl.int64) * C
            K0 = tl.load(tops + at, mask=c < C, other=0.0)
            highest = tl.load(tops + small + at, mask=c < C, other=0.0)
            ties = tl.load(tops + 2 * small + at, mask=c < C, other=1.0)
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
    begin, end = split_range(row % CHUNKS, scalar(S), BS, CHUNKS)
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
            slope = tl.fma(
                tl.broadcast_to(m[:, None, :], yhat.shape), tl.broadcast_to(A1[:, :, None], yhat.shape), slope
            )
        dy = slope * e + constant[:, :, None] + c1[:, :, None] * yhat
        if SAMPLER != "pool":
            a = m * inverse[:, None]
            dlogits = a * (tl.sum(yhat * dr[:, :, None], 1) - rdr[:, None])
            if PIXEL:
                gain = tl.fma(
                    tl.broadcast_to(A1[:, :, None], yhat.shape), yhat, tl.broadcast_to(B1[:, :, None], yhat.shape)
                )
                dlogits += m * tl.sum(e * gain, 1)
                alone = (ties == 1.0)[:, None]
                at_top = tl.where(alone, i[None, :] == first[:, None], logits >= (highest - near)[:, None])
                dlogits -= tl.where(at_top, (K0 / ties)[:, None], 0.0)
            dy += a[:, None, :] * dr[:, :, None] + dlogits[:, None, :] * v[:, :, None]
        store_tile(out_rows, some, i, end, out_position, dy, LAST)
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
        tl.program_id(0),
        tl.num_programs(0),
        EDGES,
        C,
        P,
        PT,
        RB,
        GB,
        ACC,
    )
