"""What the Triton kernels share: tiles of a map, numbers per channel, weights, and the small functions on them.

A tile is (CB concepts, P2 channels of each, BS positions), P2 being p rounded up to a power of two; the strides and the
constexpr LAST say how the map lies, so each layout compiles to a kernel of its own. Numbers per channel are (CB, P2).
Elements outside the map are zero. Features become the accumulation type ACC right after each load.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2.0**127))  # finite, so that an empty lane's exp(max - max) is 1 and not NaN; exact in float32


@triton.jit
def scalar(x):
    """An int argument as a tensor, also where Triton has made a constant of it (the value 1)."""
    return tl.full((), 0, tl.int32) + x


@triton.jit
def place(CB: tl.constexpr, C: tl.constexpr):
    """(row, concepts (CB,)) of this program of a grid (rows * concept blocks,).

    Blocks of concepts are neighbours: what they take of a channels_last row may be less than a sector (32 bytes), and
    the others of it take the rest while it is in the cache.
    """
    blocks: tl.constexpr = (C + CB - 1) // CB
    program = tl.program_id(0)
    return program // blocks, program % blocks * CB + tl.arange(0, CB)


@triton.jit
def map_tile(base, n, image, channel, position, c, j, C: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr):
    """Pointers (CB, P2, 1) to position 0 of image n, and their mask. ``c`` (CB,), ``j`` (P2,); strides in elements."""
    channels = (c[:, None] * P + j[None, :]).to(tl.int64)
    offsets = channels if LAST else channels * channel
    pointers = base + n.to(tl.int64) * image + offsets
    return pointers[:, :, None], ((c[:, None] < C) & (j[None, :] < P))[:, :, None]


@triton.jit
def positions_of(i, position, LAST: tl.constexpr):
    """Offsets (1, 1, BS) of the positions ``i``."""
    offsets = i.to(tl.int64) * position if LAST else i
    return offsets[None, None, :]


@triton.jit
def load_tile(rows, some, i, end, position, LAST: tl.constexpr, ACC: tl.constexpr):
    """The tile at the positions ``i`` below ``end``."""
    return tl.load(rows + positions_of(i, position, LAST), mask=some & (i < end)[None, None, :], other=0.0).to(ACC)


@triton.jit
def store_tile(rows, some, i, end, position, x, LAST: tl.constexpr):
    """Store a tile, rounded to the map's type."""
    mask = some & (i < end)[None, None, :]
    tl.store(rows + positions_of(i, position, LAST), x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(base, row, c, j, C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """(CB, P2) of row ``row`` of an array (rows, C*p)."""
    at = row.to(tl.int64) * (C * P) + (c[:, None] * P + j[None, :])
    return tl.load(base + at, mask=(c[:, None] < C) & (j[None, :] < P), other=0.0).to(ACC)


@triton.jit
def store_channels(base, row, c, j, x, C: tl.constexpr, P: tl.constexpr):
    """The reverse of load_channels."""
    at = row.to(tl.int64) * (C * P) + (c[:, None] * P + j[None, :])
    tl.store(base + at, x.to(base.dtype.element_ty), mask=(c[:, None] < C) & (j[None, :] < P))


@triton.jit
def load_optional(base, row, c, j, default: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """load_channels, or ``default`` everywhere where ``base`` is None."""
    if base is None:
        return tl.full((c.shape[0], j.shape[0]), default, ACC)
    else:
        return load_channels(base, row, c, j, C, P, ACC)


@triton.jit
def load_weight(base, c, j, k, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """(CB, P2, PT2) of a weight (C, p, pt)."""
    at = (c[:, None, None] * P + j[None, :, None]) * PT + k[None, None, :]
    mask = (c[:, None, None] < C) & (j[None, :, None] < P) & (k[None, None, :] < PT)
    return tl.load(base + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_weight_back(base, c, j, k, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """(CB, P2, PT2) of a weight (C, pt, p): the modulator's."""
    at = (c[:, None, None] * PT + k[None, None, :]) * P + j[None, :, None]
    mask = (c[:, None, None] < C) & (j[None, :, None] < P) & (k[None, None, :] < PT)
    return tl.load(base + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_vector(base, k, default: tl.constexpr, PT: tl.constexpr, ACC: tl.constexpr):
    """(PT2,) of a vector (pt), or ``default`` where there is none."""
    if base is None:
        return tl.full((k.shape[0],), default, ACC)
    else:
        return tl.load(base + k, mask=k < PT, other=0.0).to(ACC)


@triton.jit
def project(x, weight):
    """(CB, P2) times (CB, P2, PT2): (CB, PT2)."""
    return tl.sum(x[:, :, None] * weight, 1)


@triton.jit
def project_back(x, weight):
    """(CB, PT2) times (CB, P2, PT2): (CB, P2)."""
    return tl.sum(x[:, None, :] * weight, 2)


@triton.jit
def split_range(split, S, BS: tl.constexpr, SPLITS: tl.constexpr):
    """[begin, end) of part ``split`` of the positions, whole tiles; empty for the last ones of a small map."""
    if SPLITS == 1:
        return 0, S
    else:
        size = tl.cdiv(tl.cdiv(S, BS), SPLITS) * BS
        begin = tl.minimum(split * size, S)
        return begin, tl.minimum(begin + size, S)


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def inverse_root(x, ACC: tl.constexpr):
    """1 / sqrt(x), rounded well."""
    if ACC == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(tl.full(x.shape, 1.0, ACC), tl.sqrt_rn(x))


@triton.jit
def tanh(x, ACC: tl.constexpr):
    """tanh, to about the last place. Triton has none of its own that every target and the interpreter share."""
    if ACC == tl.float64:
        # Kahan's expm1: the errors of exp(t) - 1 and log(exp(t)) cancel
        t = 2.0 * tl.minimum(tl.abs(x), 20.0)
        e = tl.exp(t)
        expm1 = tl.where(e == 1.0, t, (e - 1.0) * t / tl.log(tl.where(e == 1.0, 2.0, e)))
        y = expm1 / (expm1 + 2.0)
        y = tl.where(x < 0, -y, y)
        return tl.where(x == x, y, x)
    else:
        # an odd polynomial where 1 - 2 / (exp(2x) + 1) would cancel (next term: 9e-3 * x^11)
        x2 = x * x
        small = x * (
            1.0
            + x2
            * (
                -0.33333333
                + x2 * (0.13333333 + x2 * (-0.05396825 + x2 * (0.02186949 + x2 * (-0.00886324 + x2 * 0.00359213))))
            )
        )
        e = tl.exp(-2.0 * tl.abs(x))
        large = (1.0 - e) / (1.0 + e)
        large = tl.where(x < 0, -large, large)
        y = tl.where(tl.abs(x) < 0.35, small, large)
        return tl.where(x == x, y, x)


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
def store_covariance(base, n, c, j, k, R, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(CB, P2, PT2) into image n of an array (N, C*p, pt)."""
    at = (n.to(tl.int64) * (C * P) + c[:, None, None] * P + j[None, :, None]) * PT + k[None, None, :]
    mask = (c[:, None, None] < C) & (j[None, :, None] < P) & (k[None, None, :] < PT)
    tl.store(base + at, R, mask=mask)


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
