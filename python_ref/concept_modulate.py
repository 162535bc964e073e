"""Concept modulator: X̃ = ReLU(α ⊙ Z + β), α and β being affine in the concepts' states (paper, after Equation 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .maps import (
    beside_positions,
    merge_concepts,
    position_dim,
    project_positions,
    project_states,
    split_attention,
    split_concepts,
    spread_states,
)
from .variants import AFFINES, as_type, check_name, state_width, uniform_projection


def concept_modulate(
    z: Tensor,
    state: Tensor,
    scale_bias: Tensor,
    shift_bias: Tensor,
    *,
    scale_weight: Tensor | None = None,
    shift_weight: Tensor | None = None,
    attention: Tensor | None = None,
) -> Tensor:
    """Scale and shift each concept's map by what its updated state says.

    Args:
        z: (N, C*p, *spatial).  state: H̃ (N, C, p̃).
        scale_bias, shift_bias: b (C, p).  scale_weight, shift_weight: W (C, p̃, p), or None: the bias alone.
        attention: M (N, C, *spatial): modulate every position by itself (pixel level), with M̃ = M / max(M).
    Returns:
        X̃, z's shape, dtype and memory format.
    """
    Z, last = split_concepts(z, scale_bias.shape[0])
    h = as_type(state, z)

    if attention is None:

        def parameter(weight: Tensor | None, bias: Tensor) -> Tensor:
            # α_c = h̃_c W_c + b_c, one number per image and channel
            x = as_type(bias, z)
            if weight is not None:
                x = project_states(h, as_type(weight, z)) + x
            return beside_positions(x, last)
    else:
        M = split_attention(as_type(attention, z), last)
        # M̃_c = M_c / max(M_c)
        M_tilde = M / torch.amax(M, position_dim(last), keepdim=True)
        # M̃_c h̃_c, one vector of p̃ numbers per position
        projected = spread_states(M_tilde, h, last)

        def parameter(weight: Tensor | None, bias: Tensor) -> Tensor:
            # α_c = (M̃_c h̃_c) W_c + b_c, one number per position and channel
            x = beside_positions(as_type(bias, z), last)
            if weight is not None:
                x = project_positions(projected, as_type(weight, z), last) + x
            return x

    alpha = parameter(scale_weight, scale_bias)
    beta = parameter(shift_weight, shift_bias)
    # X̃_c = ReLU(α_c ⊙ Z_c + β_c)
    return merge_concepts(F.relu(alpha * Z + beta), last, z.shape)


class ConceptModulator(nn.Module):
    """The modulator with its parameters.

    Args:
        channels: C*p of the map.  concepts: C.  affine: "both", "scale" or "shift": what the state drives; the other
            one is its learned bias.  zero_init: start with W = 0, so that the module computes ReLU(Z).
    """

    scale_weight: nn.Parameter | None
    shift_weight: nn.Parameter | None

    def __init__(self, channels: int, concepts: int = 32, *, affine: str = "both", zero_init: bool = False) -> None:
        super().__init__()
        check_name("affine", affine, AFFINES)
        p = channels // concepts
        width = state_width(p)
        self.concepts, self.affine = concepts, affine

        def weight() -> nn.Parameter:
            if zero_init:
                return nn.Parameter(torch.zeros(concepts, width, p))
            return uniform_projection(concepts, width, p, fan_in=width)

        self.scale_weight = weight() if affine != "shift" else None
        self.shift_weight = weight() if affine != "scale" else None
        self.scale_bias = nn.Parameter(torch.ones(concepts, p))
        self.shift_bias = nn.Parameter(torch.zeros(concepts, p))

    def forward(self, z: Tensor, state: Tensor, attention: Tensor | None = None) -> Tensor:
        return concept_modulate(
            z,
            state,
            self.scale_bias,
            self.shift_bias,
            scale_weight=self.scale_weight,
            shift_weight=self.shift_weight,
            attention=attention,
        )
