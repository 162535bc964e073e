"""The concept sampler as a module."""

import math

import torch
from torch import Tensor, nn

from .. import checks
from ..backend import check_backend
from ..ops.concept_sample.op import concept_sample
from ..variants import SAMPLERS, state_width


def uniform_projection(*shape: int, fan_in: int) -> nn.Parameter:
    """A projection drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as nn.Linear and nn.Conv2d draw theirs."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class ConceptSampler(nn.Module):
    """One state per concept from the concept's feature map, by attention pooling (paper, Eq. 1 and 2).

    Args:
        channels: C*p of the map. concepts: C.
        sampler: "dynamic" (query and key), "static" (a learned attention vector) or "pool" (the mean).
        backend: "auto", "cpp", "triton", "cuda" or "composite".
    Parameters:
        value (C, p, pt); "dynamic": query, key (C, p, pt); "static": logit (C, p).
    """

    value: nn.Parameter
    query: nn.Parameter | None
    key: nn.Parameter | None
    logit: nn.Parameter | None

    def __init__(
        self, channels: int, concepts: int = 32, *, sampler: str = "dynamic", backend: str | None = "auto"
    ) -> None:
        super().__init__()
        checks.check_channels(channels, concepts)
        checks.check_name("sampler", sampler, SAMPLERS)
        check_backend(backend or "auto")
        p = channels // concepts
        pt = state_width(p)
        self.channels, self.concepts, self.sampler, self.backend = channels, concepts, sampler, backend
        dynamic = sampler == "dynamic"
        self.value = uniform_projection(concepts, p, pt, fan_in=p)
        self.register_parameter("query", uniform_projection(concepts, p, pt, fan_in=p) if dynamic else None)
        self.register_parameter("key", uniform_projection(concepts, p, pt, fan_in=p) if dynamic else None)
        self.register_parameter("logit", uniform_projection(concepts, p, fan_in=p) if sampler == "static" else None)

    def forward(self, z: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """z (N, C*p, *spatial) to h (N, C, pt), or to (h, attention (N, C, *spatial))."""
        return concept_sample(
            z,
            self.value,
            query=self.query,
            key=self.key,
            logit=self.logit,
            sampler=self.sampler,
            return_attention=return_attention,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, concepts={self.concepts}, sampler={self.sampler!r}"
