"""The reasoner in PyTorch ops (paper, Eq. 3)."""

import torch
from torch import Tensor

from ...collectives import Group, synced_moments
from ...maps import acc_dtype, without_autocast


def edge_matrix(h: Tensor, edge: Tensor, edges: str) -> Tensor:
    """A: (N, C, C) for dynamic edges, the learned (C, C) for static ones."""
    return torch.tanh(torch.matmul(h, edge)) if edges == "dynamic" else edge


def interact(h: Tensor, edge: Tensor | None, edges: str) -> Tensor:
    """H + A H for the states h (N, C, pt); H alone where there are no edges."""
    if edges == "none":
        return h
    assert edge is not None
    return h + torch.matmul(edge_matrix(h, edge, edges), h)


def concept_reason(
    h: Tensor,
    edge: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    edges: str,
    group: Group | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(BN(H + A H)), with the statistics used: those given, or the batch's, the variance unbiased and detached.

    group: the batch is all its processes'.
    """
    dtype = acc_dtype(h.dtype)
    with without_autocast(h):
        n, concepts, pt = h.shape
        rows = interact(h.to(dtype), None if edge is None else edge.to(dtype), edges).reshape(-1, pt)
        if mean is not None and var is not None:
            used_mean, used_var = mean, var
            centred, variance = rows - mean.to(dtype), var.to(dtype)
        elif group is not None:
            centred, variance, used_mean, used_var = synced_moments(rows, (0,), n * concepts, group)
        elif n == 0:
            used_mean, used_var = h.new_zeros(pt, dtype=dtype), h.new_ones(pt, dtype=dtype)
            centred, variance = rows, used_var
        else:
            batch_mean = rows.mean(0)
            centred = rows - batch_mean
            variance = centred.square().mean(0)
            used_mean, used_var = batch_mean.detach(), variance.detach() * (n * concepts / (n * concepts - 1))
        x = centred * torch.rsqrt(variance + eps)
        if weight is not None:
            x = x * weight.to(dtype)
        if bias is not None:
            x = x + bias.to(dtype)
        return torch.relu(x).reshape(n, concepts, pt), used_mean, used_var
