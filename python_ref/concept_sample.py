"""Concept sampler (paper, Equations 1 and 2): one state h_c per concept from the concept's feature map Z_c."""

import math

import torch
from torch import Tensor, nn

from .maps import (
    dot_positions,
    mean_positions,
    merge_concepts,
    position_dim,
    project_positions,
    project_states,
    split_concepts,
    weigh_positions,
)
from .variants import SAMPLERS, as_type, check_name, state_width, uniform_projection


def concept_sample(
    z: Tensor,
    value: Tensor,
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    logit: Tensor | None = None,
    sampler: str = "dynamic",
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Summarise each concept's feature map in one state.

    Args:
        z: (N, C*p, *spatial), concept-major channels.
        value: W^v (C, p, p̃), always.  query, key: W^q, W^k (C, p, p̃), "dynamic".  logit: (C, p), "static".
        return_attention: also return M (N, C, *spatial), the softmax over positions; not with "pool".
    Returns:
        h (N, C, p̃) in z's dtype, or (h, M).
    """
    check_name("sampler", sampler, SAMPLERS)
    concepts, _, width = value.shape
    Z, last = split_concepts(z, concepts)
    w_v = as_type(value, z)

    if sampler == "pool":
        if return_attention:
            raise ValueError("sampler='pool' has no attention map to return")
        # h_c = F_GAP(Z_c) W^v_c                                                                        (Equation 1)
        return project_states(mean_positions(Z, last), w_v)

    if sampler == "dynamic":
        if query is None or key is None:
            raise ValueError("sampler='dynamic' takes query and key")
        # q_c = F_GAP(Z_c) W^q_c
        q = project_states(mean_positions(Z, last), as_type(query, z))
        # K_c = Z_c W^k_c
        K = project_positions(Z, as_type(key, z), last)
        # q_c K_c^T / sqrt(p̃)
        logits = dot_positions(K, q, last) / math.sqrt(width)
    else:
        if logit is None:
            raise ValueError("sampler='static' takes logit")
        # A 1x1 convolution with one output per concept stands for the scaled product with the query.
        logits = dot_positions(Z, as_type(logit, z), last)

    # M_c = softmax(...),  h_c = (M_c Z_c) W^v_c                                                        (Equation 2)
    M = torch.softmax(logits, position_dim(last))
    h = project_states(weigh_positions(M, Z, last), w_v)
    if not return_attention:
        return h
    return h, merge_concepts(M, last, torch.Size((z.shape[0], concepts, *z.shape[2:])))


class ConceptSampler(nn.Module):
    """Equation 1 ("pool") or 2 ("static", "dynamic") with its parameters.

    Args:
        channels: C*p of the map.  concepts: C.  sampler: "dynamic", "static" or "pool".
    """

    query: nn.Parameter | None
    key: nn.Parameter | None
    logit: nn.Parameter | None

    def __init__(self, channels: int, concepts: int = 32, *, sampler: str = "dynamic") -> None:
        super().__init__()
        check_name("sampler", sampler, SAMPLERS)
        if channels % concepts:
            raise ValueError(f"channels is {channels}, which concepts={concepts} doesn't divide")
        p = channels // concepts
        width = state_width(p)
        self.concepts, self.sampler = concepts, sampler
        self.value = uniform_projection(concepts, p, width, fan_in=p)
        dynamic, static = sampler == "dynamic", sampler == "static"
        self.query = uniform_projection(concepts, p, width, fan_in=p) if dynamic else None
        self.key = uniform_projection(concepts, p, width, fan_in=p) if dynamic else None
        self.logit = uniform_projection(concepts, p, fan_in=p) if static else None

    def forward(self, z: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        return concept_sample(
            z,
            self.value,
            query=self.query,
            key=self.key,
            logit=self.logit,
            sampler=self.sampler,
            return_attention=return_attention,
        )
