"""Concept reasoner (paper, Equation 3): the concepts' states exchange what they know over a graph."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .variants import EDGES, as_type, check_name, state_width, uniform_projection


class ConceptReasonOutput(NamedTuple):
    """What concept_reason returns: H̃ (N, C, p̃), and the mean and (unbiased) variance that batch norm saw, (p̃)."""

    state: Tensor
    mean: Tensor
    var: Tensor


def interact(h: Tensor, edge: Tensor | None, edges: str) -> Tensor:
    """H + A H for states H (N, C, p̃); H alone where there are no edges."""
    check_name("edges", edges, EDGES)
    if edges == "none":
        return h
    if edge is None:
        raise ValueError(f"edges={edges!r} takes edge")
    A = as_type(edge, h)
    if edges == "dynamic":
        # A[c, :] = tanh(h_c W^edge)
        A = torch.tanh(torch.matmul(h, A))
    return h + torch.matmul(A, h)


def concept_reason(
    h: Tensor,
    edge: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    edges: str = "dynamic",
) -> ConceptReasonOutput:
    """H̃ = ReLU(BN(H + A H)), batch norm over the p̃ columns with statistics over images and concepts.

    Args:
        h: H (N, C, p̃).
        edge: W^edge (p̃, C), "dynamic"; A (C, C), "static"; None, "none".
        mean, var: (p̃) to normalise with; None: those of the batch.
        weight, bias: (p̃), batch norm's own.
    Returns:
        (H̃, mean, var): the statistics given, or the batch's with Bessel's correction.
    """
    n, concepts, width = h.shape
    rows = interact(h, edge, edges).reshape(n * concepts, width)
    # Batch norm takes its parameters in float32 beside low precision input.
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    w = None if weight is None else weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    if mean is None or var is None:
        normed = F.batch_norm(rows, None, None, w, b, True, 0.0, eps)
        var, mean = torch.var_mean(rows.detach().to(dtype), 0, correction=1)
    else:
        normed = F.batch_norm(rows, mean.to(dtype), var.to(dtype), w, b, False, 0.0, eps)
    # h̃_c = ReLU(BN(h_c + sum_c' A[c, c'] h_c'))                                                       (Equation 3)
    return ConceptReasonOutput(F.relu(normed).reshape(n, concepts, width), mean, var)


class ConceptReasoner(nn.Module):
    """Equation 3 with its parameters and its batch norm.

    Args:
        channels: C*p of the map the states come from.  concepts: C.  edges: "dynamic", "static" or "none".
    """

    edge: nn.Parameter | None

    def __init__(self, channels: int, concepts: int = 32, *, edges: str = "dynamic") -> None:
        super().__init__()
        check_name("edges", edges, EDGES)
        width = state_width(channels // concepts)
        self.concepts, self.edges = concepts, edges
        if edges == "dynamic":
            self.edge = uniform_projection(width, concepts, fan_in=width)
        elif edges == "static":
            self.edge = uniform_projection(concepts, concepts, fan_in=concepts)
        else:
            self.edge = None
        self.bn = nn.BatchNorm1d(width)

    def forward(self, h: Tensor) -> Tensor:
        n, concepts, width = h.shape
        rows = interact(h, self.edge, self.edges).reshape(n * concepts, width)
        return F.relu(self.bn(rows)).reshape(n, concepts, width)
