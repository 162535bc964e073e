"""The modulator's folded algebra in PyTorch ops: rank one at the pixel level, so never a projection per position."""

import torch
from torch import Tensor

from ...maps import acc_dtype, beside_positions, merge_concepts, positions, project, split_concepts, without_autocast


def modulate(
    x: Tensor,
    last: bool,
    s: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    a: Tensor | None,
) -> Tensor:
    """relu((m_i alpha + scale_bias) * z_i + m_i beta + shift_bias) for a split map, z = s * x + b, m = a / max(a).

    s and b are (C, p), None: z = x. ``a``: attention beside x, None: m = 1 (channel modulation).
    """
    alpha = None if scale_weight is None else project(state, scale_weight)
    beta = None if shift_weight is None else project(state, shift_weight)
    # Per (n, channel): the slope and offset of x that a position's m doesn't touch, and those that it scales.
    slope, offset = (scale_bias, shift_bias)
    if s is not None and b is not None:
        slope, offset = scale_bias * s, scale_bias * b + shift_bias
        if alpha is not None:
            beta = alpha * b if beta is None else alpha * b + beta
            alpha = alpha * s
    if a is None:
        slope = slope if alpha is None else slope + alpha
        offset = offset if beta is None else offset + beta
        return torch.relu(torch.addcmul(beside_positions(offset, last), beside_positions(slope, last), x))
    m = (a / torch.amax(a, 1 if last else 2, keepdim=True)).unsqueeze(-1 if last else 2)
    slope, offset = beside_positions(slope, last), beside_positions(offset, last)
    if alpha is not None:
        slope = torch.addcmul(slope, m, beside_positions(alpha, last))
    if beta is not None:
        offset = torch.addcmul(offset, m, beside_positions(beta, last))
    return torch.relu(torch.addcmul(offset, slope, x))


def concept_modulate(
    z: Tensor,
    state: Tensor,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    attention: Tensor | None,
) -> Tensor:
    """z's shape, type and format; attention (N, C, *spatial) for pixel modulation."""
    dtype = acc_dtype(z.dtype)

    def cast(w: Tensor | None) -> Tensor | None:
        return None if w is None else w.to(dtype)

    with without_autocast(z):
        x, last = split_concepts(z, scale_bias.shape[0])
        a = None
        if attention is not None:
            n, concepts = attention.shape[:2]
            a, S = attention.to(dtype), positions(z)
            a = a.movedim(1, -1).reshape(n, S, concepts) if last else a.reshape(n, concepts, S)
        out = modulate(
            x.to(dtype),
            last,
            None,
            None,
            state.to(dtype),
            cast(scale_weight),
            cast(shift_weight),
            scale_bias.to(dtype),
            shift_bias.to(dtype),
            a,
        )
        return merge_concepts(out.to(z.dtype), last, z.shape)
