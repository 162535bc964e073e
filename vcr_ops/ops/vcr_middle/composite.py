"""The whole middle's folded algebra in PyTorch ops: batch norm goes into v = s * u and into the modulation."""

import torch
from torch import Tensor

from ...collectives import Group, synced_moments
from ...maps import acc_dtype, merge_concepts, split_concepts, without_autocast
from ..concept_modulate.composite import modulate
from ..concept_reason.composite import concept_reason
from ..concept_sample.composite import attend


def vcr_middle(
    y: Tensor,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    edge: Tensor | None,
    state_mean: Tensor | None,
    state_var: Tensor | None,
    state_weight: Tensor | None,
    state_bias: Tensor | None,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    norm: str,
    norm_eps: float,
    state_eps: float,
    sampler: str,
    edges: str,
    modulation: str,
    *,
    norm_group: Group | None = None,
    state_group: Group | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """out, and the statistics used: given, or the batch's (variances unbiased, detached), or None for norm="none".

    norm_group, state_group: the batch is all these processes'.
    """
    dtype = acc_dtype(y.dtype)
    C, p = scale_bias.shape

    def cast(w: Tensor | None) -> Tensor | None:
        return None if w is None else w.to(dtype)

    with without_autocast(y):
        x, last = split_concepts(y, C)
        x = x.to(dtype)
        n, count = y.shape[0], y.numel() // y.shape[1]
        s = b = mean = var = None
        if norm == "given":
            assert norm_mean is not None
            assert norm_var is not None
            mean, var = norm_mean.to(dtype).view(C, p), norm_var.to(dtype).view(C, p)
        elif norm == "batch" and norm_group is not None:
            dims = (0, 1) if last else (0, 3)
            x, var, *found = synced_moments(x, dims, count, norm_group)
            norm_mean, norm_var = (statistic.view(-1) for statistic in found)
        elif norm == "batch" and n == 0:
            mean, var = x.new_zeros(C, p), x.new_ones(C, p)
            norm_mean, norm_var = mean.view(-1), var.view(-1)
        elif norm == "batch":
            mean = x.mean(1 if last else 3).mean(0)
        if mean is not None:
            x = x - (mean if last else mean.unsqueeze(-1))
        if norm != "none":
            if mean is not None and var is None:
                var = x.square().mean((0, 1) if last else (0, 3))
                norm_mean, norm_var = mean.detach().reshape(-1), var.detach().reshape(-1) * (count / (count - 1))
            assert var is not None
            s = torch.rsqrt(var + norm_eps)
            if norm_weight is not None:
                s = s * norm_weight.to(dtype).view(C, p)
            b = x.new_zeros(C, p) if norm_bias is None else norm_bias.to(dtype).view(C, p)
        h, a = attend(x, last, s, b, value.to(dtype), cast(query), cast(key), cast(logit), sampler)
        state, state_mean, state_var = concept_reason(
            h, edge, state_mean, state_var, state_weight, state_bias, state_eps, edges, state_group
        )
        out = modulate(
            x,
            last,
            s,
            b,
            state,
            cast(scale_weight),
            cast(shift_weight),
            scale_bias.to(dtype),
            shift_bias.to(dtype),
            a if modulation == "pixel" else None,
        )
        return merge_concepts(out.to(y.dtype), last, y.shape), norm_mean, norm_var, state_mean, state_var
