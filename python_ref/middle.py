"""The middle of a block, between the grouped convolution and the merge: batch norm, attend, interact, modulate."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .concept_modulate import ConceptModulator, concept_modulate
from .concept_reason import ConceptReasoner, concept_reason
from .concept_sample import ConceptSampler, concept_sample
from .variants import BATCH_NORMS, check_variants


def attend_interact_modulate(
    z: Tensor, sampler: ConceptSampler, reasoner: ConceptReasoner, modulator: ConceptModulator, modulation: str
) -> Tensor:
    """The three stages on Z, one after the other."""
    if modulation == "pixel":
        h, attention = sampler(z, return_attention=True)
        return modulator(z, reasoner(h), attention)
    return modulator(z, reasoner(sampler(z)))


def visual_concept_reasoning(
    y: Tensor,
    value: Tensor,
    scale_bias: Tensor,
    shift_bias: Tensor,
    *,
    norm: str = "batch",
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    query: Tensor | None = None,
    key: Tensor | None = None,
    logit: Tensor | None = None,
    edge: Tensor | None = None,
    state_mean: Tensor | None = None,
    state_var: Tensor | None = None,
    state_weight: Tensor | None = None,
    state_bias: Tensor | None = None,
    state_eps: float = 1e-5,
    scale_weight: Tensor | None = None,
    shift_weight: Tensor | None = None,
    sampler: str = "dynamic",
    edges: str = "dynamic",
    modulation: str = "channel",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The middle as a function of Y and of every parameter.

    Args:
        y: Y (N, C*p, *spatial).
        norm: "batch" (this batch's statistics), "given" (norm_mean, norm_var) or "none" (Z = Y).
        The others: as in concept_sample, concept_reason (state_*) and concept_modulate.
    Returns:
        (X̃, norm_mean, norm_var, state_mean, state_var): the statistics used, the batch's variances unbiased; None for
        norm="none".
    """
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    w = None if norm_weight is None else norm_weight.to(dtype)
    b = None if norm_bias is None else norm_bias.to(dtype)
    if norm == "batch":
        z = F.batch_norm(y, None, None, w, b, True, 0.0, norm_eps)
        norm_var, norm_mean = torch.var_mean(y.detach().to(dtype), [0, *range(2, y.dim())], correction=1)
    elif norm == "given":
        if norm_mean is None or norm_var is None:
            raise ValueError("norm='given' takes norm_mean and norm_var")
        z = F.batch_norm(y, norm_mean.to(dtype), norm_var.to(dtype), w, b, False, 0.0, norm_eps)
    else:
        z = y
    pixel = modulation == "pixel"
    sampled = concept_sample(z, value, query=query, key=key, logit=logit, sampler=sampler, return_attention=pixel)
    h, attention = sampled if isinstance(sampled, tuple) else (sampled, None)
    state, state_mean, state_var = concept_reason(
        h, edge, mean=state_mean, var=state_var, weight=state_weight, bias=state_bias, eps=state_eps, edges=edges
    )
    out = concept_modulate(
        z, state, scale_bias, shift_bias, scale_weight=scale_weight, shift_weight=shift_weight, attention=attention
    )
    return out, norm_mean, norm_var, state_mean, state_var


class VisualConceptReasoning(nn.Module):
    """Batch norm and the three stages on the output Y (N, channels, *spatial) of any grouped convolution.

    Args:
        channels: C*p.  concepts: C.  sampler, edges, modulation, affine: the variants.
        norm_layer: makes the first norm from the number of channels; default: nn.BatchNorm for ``ndim``.
        ndim: number of spatial dims that the default norm takes.
        zero_init: start as ReLU(BN(Y)).
    """

    def __init__(
        self,
        channels: int,
        concepts: int = 32,
        *,
        sampler: str = "dynamic",
        edges: str = "dynamic",
        modulation: str = "channel",
        affine: str = "both",
        norm_layer: Callable[[int], nn.Module] | None = None,
        ndim: int = 2,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        check_variants(sampler, edges, modulation, affine)
        self.modulation = modulation
        self.bn = (norm_layer or BATCH_NORMS[ndim])(channels)
        self.sampler = ConceptSampler(channels, concepts, sampler=sampler)
        self.reasoner = ConceptReasoner(channels, concepts, edges=edges)
        self.modulator = ConceptModulator(channels, concepts, affine=affine, zero_init=zero_init)

    def forward(self, y: Tensor) -> Tensor:
        return attend_interact_modulate(self.bn(y), self.sampler, self.reasoner, self.modulator, self.modulation)
