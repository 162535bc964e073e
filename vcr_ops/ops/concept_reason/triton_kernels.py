"""The reasoner's small functions (contract: interact; paper, Eq. 3)."""

import triton
import triton.language as tl

from ...triton_common.blocks import load_vector, relu, scalar, tanh


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
