"""A feature map seen as concepts: the four products that the equations are made of, in both memory formats.

A map z (N, C*p, *spatial) becomes Z (N, C, p, S) where z is contiguous and Z (N, S, C, p) where its channels are
innermost, so that neither format is copied into the other. ``last`` says which of the two Z is. Attention maps are
(N, C, S) and (N, S, C) in the same way.
"""

import math

import torch
from torch import Tensor


def is_channels_last(z: Tensor) -> bool:
    """True where the channels of ``z`` are innermost and its positions lie in order (any number of spatial dims)."""
    return not z.is_contiguous() and z.movedim(1, -1).is_contiguous()


def split_concepts(z: Tensor, concepts: int) -> tuple[Tensor, bool]:
    """``z`` (N, C*p, *spatial) as Z, and whether Z is channels last."""
    n, channels, positions = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    p = channels // concepts
    if is_channels_last(z):
        return z.movedim(1, -1).reshape(n, positions, concepts, p), True
    return z.reshape(n, concepts, p, positions), False


def merge_concepts(zc: Tensor, last: bool, shape: torch.Size) -> Tensor:
    """Z back to (N, C*p, *spatial), in the memory format it came from."""
    n, channels, *spatial = shape
    if last:
        return zc.reshape(n, *spatial, channels).movedim(-1, 1)
    return zc.reshape(shape)


def split_attention(m: Tensor, last: bool) -> Tensor:
    """An attention map (N, C, *spatial) as it stands beside Z: (N, C, S), or (N, S, C) where Z is channels last."""
    n, concepts, positions = m.shape[0], m.shape[1], math.prod(m.shape[2:])
    return m.movedim(1, -1).reshape(n, positions, concepts) if last else m.reshape(n, concepts, positions)


def position_dim(last: bool) -> int:
    """The dimension of an attention map that holds the positions."""
    return 1 if last else 2


def mean_positions(zc: Tensor, last: bool) -> Tensor:
    """F_GAP: the mean of Z over its positions, (N, C, p)."""
    return zc.mean(1 if last else 3)


def project_states(x: Tensor, weight: Tensor) -> Tensor:
    """x_c W_c for every concept: (N, C, a) with weights (C, a, b) gives (N, C, b)."""
    return torch.einsum("nca,cab->ncb", x, weight)


def project_positions(zc: Tensor, weight: Tensor, last: bool) -> Tensor:
    """Z_c W_c at every position, with weights (C, a, b)."""
    if last:
        return torch.einsum("nsca,cab->nscb", zc, weight)
    return torch.matmul(weight.transpose(1, 2), zc)


def dot_positions(zc: Tensor, vector: Tensor, last: bool) -> Tensor:
    """The product of every position of Z with one vector per concept, (N, C, a) or (C, a): an attention map."""
    if last:
        return (zc * vector.unsqueeze(-3)).sum(-1)
    return torch.matmul(vector.unsqueeze(-2), zc).squeeze(-2)


def weigh_positions(m: Tensor, zc: Tensor, last: bool) -> Tensor:
    """M Z: the sum of Z's positions weighted by the attention map M, (N, C, p)."""
    if last:
        return (m.unsqueeze(-1) * zc).sum(1)
    return torch.matmul(zc, m.unsqueeze(-1)).squeeze(-1)


def spread_states(m: Tensor, state: Tensor, last: bool) -> Tensor:
    """M̃_i h̃ at every position i: the outer product of an attention map with the states (N, C, p̃)."""
    if last:
        return m.unsqueeze(-1) * state.unsqueeze(1)
    return state.unsqueeze(-1) * m.unsqueeze(2)


def beside_positions(x: Tensor, last: bool) -> Tensor:
    """Numbers per concept and channel, (N, C, p) or (C, p), shaped to be broadcast over Z's positions."""
    return x.unsqueeze(-3) if last else x.unsqueeze(-1)
