"""The sampler's folded algebra in PyTorch ops: the keys K = Z W^k are never formed (paper, Eq. 1 and 2)."""

import math

import torch
from torch import Tensor

from ...maps import (
    acc_dtype,
    dot_positions,
    mean_positions,
    merge_concepts,
    project,
    split_concepts,
    weigh_positions,
    without_autocast,
)


def attend(
    x: Tensor,
    last: bool,
    s: Tensor | None,
    b: Tensor | None,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    sampler: str,
) -> tuple[Tensor, Tensor | None]:
    """The states of z = s * x + b for a split map x (s and b (C, p); None: z = x).

    ``q = zbar W^q, u = W^k q / sqrt(pt), v = s * u``; logits x_i . v, since the constant b . u cancels in the softmax.

    Returns:
        h (N, C, pt), and the attention beside x, (N, S, C) or (N, C, S); None for "pool".
    """

    def affine(mean: Tensor) -> Tensor:
        return mean if s is None or b is None else s * mean + b

    if sampler == "pool":
        return project(affine(mean_positions(x, last)), value), None
    if sampler == "dynamic":
        assert query is not None
        assert key is not None
        q = project(affine(mean_positions(x, last)), query)
        u = project(q, key.transpose(1, 2)) / math.sqrt(key.shape[2])
    else:
        assert logit is not None
        u = logit
    v = u if s is None else s * u
    a = torch.softmax(dot_positions(x, v, last), 1 if last else 2)
    return project(affine(weigh_positions(a, x, last)), value), a


def concept_sample(
    z: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    sampler: str,
    need_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """h (N, C, pt) and, where needed, the attention (N, C, *spatial), in the accumulation type."""
    dtype = acc_dtype(z.dtype)
    concepts = value.shape[0]

    def cast(w: Tensor | None) -> Tensor | None:
        return None if w is None else w.to(dtype)

    with without_autocast(z):
        x, last = split_concepts(z, concepts)
        h, a = attend(x.to(dtype), last, None, None, value.to(dtype), cast(query), cast(key), cast(logit), sampler)
        if a is None or not need_attention:
            return h, None
        shape = torch.Size((z.shape[0], concepts, *z.shape[2:]))
        return h, merge_concepts(a, last, shape).contiguous()
