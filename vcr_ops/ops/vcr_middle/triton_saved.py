"""The numbers that the middle keeps for its backward pass: where they stand in ``saved``, and what they give."""

import triton
import triton.language as tl

from ...triton_common.blocks import load_channels, load_optional, scalar
from ..concept_modulate.triton_kernels import coefficients


@triton.jit
def rstd_of(saved, C: tl.constexpr, P: tl.constexpr):
    """(C*p)"""
    return saved + C * P


@triton.jit
def s_of(saved, C: tl.constexpr, P: tl.constexpr):
    """(C*p): s of z = s * yhat + b"""
    return saved + 2 * C * P


@triton.jit
def per_image(saved, N, which: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """(N, C*p): 0 m (mean of yhat), 1 u, 2 r, 3 abar, 4 bbar"""
    return saved + 3 * C * P + scalar(N).to(tl.int64) * (which * C * P)


@triton.jit
def states_at(saved, N, which: tl.constexpr, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(N, C, pt): 0 q, 1 h, 2 G, 3 state"""
    return saved + 3 * C * P + scalar(N).to(tl.int64) * (5 * C * P + which * C * PT)


@triton.jit
def softmax_of(saved, N, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(N, C, 3): maximum, sum, unused"""
    return states_at(saved, N, 4, C, P, PT)


@triton.jit
def state_norm_of(saved, N, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(4, pt): see store_state_norm"""
    return softmax_of(saved, N, C, P, PT) + scalar(N).to(tl.int64) * (3 * C)


@triton.jit
def edges_of(saved, N, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(N, C, C): tanh(H W^edge)"""
    return state_norm_of(saved, N, C, P, PT) + 4 * PT


@triton.jit
def covariance_of(saved, N, C: tl.constexpr, P: tl.constexpr, PT: tl.constexpr):
    """(N, C*p, pt): R"""
    return edges_of(saved, N, C, P, PT) + scalar(N).to(tl.int64) * (C * C)


@triton.jit
def norm_view(saved, norm_bias, n, N, c, j, NORM: tl.constexpr, C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """(mu, s, b, mhat), (CB, P2) each: z = s (y - mu) + b, and the image's mean of y - mu.

    Without a batch norm every image is centred on its own mean, so that nothing is computed uncentred.
    """
    m = load_channels(per_image(saved, N, 0, C, P), n, c, j, C, P, ACC)
    if NORM == "none":
        return m, tl.full((c.shape[0], j.shape[0]), 1.0, ACC), m, tl.zeros((c.shape[0], j.shape[0]), ACC)
    else:
        mu = load_channels(saved, scalar(0), c, j, C, P, ACC)
        s = load_channels(s_of(saved, C, P), scalar(0), c, j, C, P, ACC)
        return mu, s, load_optional(norm_bias, scalar(0), c, j, 0.0, C, P, ACC), m


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
    """(mu, v, maximum, A1, B1, A0, B0) of image n; v of the sampler's logits, A and B of the modulator."""
    mu, s, b, _ = norm_view(saved, norm_bias, n, N, c, j, NORM, C, P, ACC)
    abar = load_channels(per_image(saved, N, 3, C, P), n, c, j, C, P, ACC)
    bbar = load_channels(per_image(saved, N, 4, C, P), n, c, j, C, P, ACC)
    A1, B1, A0, B0 = coefficients(abar, bbar, s, b, scale_bias, shift_bias, c, j, PIXEL, C, P, ACC)
    v = s * load_channels(per_image(saved, N, 1, C, P), n, c, j, C, P, ACC)
    maximum = tl.load(softmax_of(saved, N, C, P, PT) + (n.to(tl.int64) * C + c) * 3, mask=c < C, other=0.0)
    return mu, v, maximum, A1, B1, A0, B0
