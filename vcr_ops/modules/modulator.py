"""The concept modulator as a module."""

import torch
from torch import Tensor, nn

from .. import checks
from ..backend import check_backend
from ..ops.concept_modulate.op import concept_modulate
from ..variants import AFFINES, state_width
from .sampler import uniform_projection


class ConceptModulator(nn.Module):
    """relu(alpha * z + beta), alpha and beta being affine in the concepts' states (paper, after Eq. 3).

    Args:
        channels: C*p of the map. concepts: C.
        affine: "both", "scale" or "shift": what the states drive; the other one is its learned bias alone.
        zero_init: start with W^scale = W^shift = 0, so that the module computes relu(z).
        backend: "auto", "cpp", "triton", "cuda" or "composite".
    Parameters:
        scale_weight, shift_weight (C, pt, p), absent where ``affine`` leaves them out; scale_bias, shift_bias (C, p).
    """

    scale_weight: nn.Parameter | None
    shift_weight: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        concepts: int = 32,
        *,
        affine: str = "both",
        zero_init: bool = False,
        backend: str | None = "auto",
    ) -> None:
        super().__init__()
        checks.check_channels(channels, concepts)
        checks.check_name("affine", affine, AFFINES)
        check_backend(backend or "auto")
        p = channels // concepts
        pt = state_width(p)
        self.channels, self.concepts, self.affine, self.backend = channels, concepts, affine, backend

        def weight() -> nn.Parameter:
            if zero_init:
                return nn.Parameter(torch.zeros(concepts, pt, p))
            return uniform_projection(concepts, pt, p, fan_in=pt)

        self.register_parameter("scale_weight", None if affine == "shift" else weight())
        self.register_parameter("shift_weight", None if affine == "scale" else weight())
        self.scale_bias = nn.Parameter(torch.ones(concepts, p))
        self.shift_bias = nn.Parameter(torch.zeros(concepts, p))

    def forward(self, z: Tensor, state: Tensor, attention: Tensor | None = None) -> Tensor:
        """z (N, C*p, *spatial), state (N, C, pt), attention (N, C, *spatial) for the pixel level; returns z's shape."""
        return concept_modulate(
            z,
            state,
            self.scale_bias,
            self.shift_bias,
            scale_weight=self.scale_weight,
            shift_weight=self.shift_weight,
            attention=attention,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.channels}, concepts={self.concepts}, affine={self.affine!r}"
