"""The whole middle's folded algebra in PyTorch ops: batch norm goes into v = s * u and into the modulation."""

from typing import Any

import torch
from torch import Tensor

from ...collectives import Group, synced_moments
from ...maps import acc_dtype, merge_concepts, split_concepts, without_autocast
from ..concept_modulate.composite import modulate
from ..concept_reason.composite import concept_reason
from ..concept_sample.composite import attend
from .arguments import by_name


def vcr_middle(
    *arguments: Any, norm_group: Group | None = None, state_group: Group | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """out, and the statistics used: given, or the batch's (variances unbiased, detached), or None for norm="none".

    arguments: those of the op, less ``save``. norm_group, state_group: the batch is all these processes'.
    """
    y, norm_mean, norm_var, state_mean, state_var, learned, norm_eps, state_eps, variant = by_name(arguments)
    norm, sampler, edges, modulation = variant
    dtype = acc_dtype(y.dtype)
    C, p = learned.scale_bias.shape

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
            if learned.norm_weight is not None:
                s = s * learned.norm_weight.to(dtype).view(C, p)
            b = x.new_zeros(C, p) if learned.norm_bias is None else learned.norm_bias.to(dtype).view(C, p)
        query, key, logit = cast(learned.query), cast(learned.key), cast(learned.logit)
        h, a = attend(x, last, s, b, learned.value.to(dtype), query, key, logit, sampler)
        affine = (learned.state_weight, learned.state_bias)
        state, state_mean, state_var = concept_reason(
            h, learned.edge, state_mean, state_var, *affine, state_eps, edges, state_group
        )
        out = modulate(
            x,
            last,
            s,
            b,
            state,
            cast(learned.scale_weight),
            cast(learned.shift_weight),
            learned.scale_bias.to(dtype),
            learned.shift_bias.to(dtype),
            a if modulation == "pixel" else None,
        )
        return merge_concepts(out.to(y.dtype), last, y.shape), norm_mean, norm_var, state_mean, state_var
