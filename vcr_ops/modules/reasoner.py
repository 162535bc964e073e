"""The concept reasoner as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..backend import check_backend
from ..maps import acc_dtype, without_autocast
from ..ops.concept_reason.composite import concept_reason as composed
from ..ops.concept_reason.composite import interact
from ..ops.concept_reason.op import concept_reason
from ..variants import EDGES, state_width
from .batch_norm import has_global_hook, is_plain_batch_norm, sync_group, uses_batch_statistics
from .running_stats import by_triton, update_running_stats
from .sampler import uniform_projection


class ConceptReasoner(nn.Module):
    """The states exchange what they know over a graph of concepts: relu(BN(H + A H)) (paper, Eq. 3).

    Args:
        channels: C*p of the map that the states come from. concepts: C.
        edges: "dynamic" (A from the states), "static" (A learned) or "none".
        backend: "auto", "cpp", "triton", "cuda" or "composite".
    Parameters:
        edge: "dynamic" (pt, C), "static" (C, C). bn: nn.BatchNorm1d over the pt columns, rows being images and
            concepts. Another norm of (rows, pt) may stand in its place, and hooks on it run.
    """

    edge: nn.Parameter | None

    def __init__(
        self, channels: int, concepts: int = 32, *, edges: str = "dynamic", backend: str | None = "auto"
    ) -> None:
        super().__init__()
        checks.check_channels(channels, concepts)
        checks.check_name("edges", edges, EDGES)
        check_backend(backend or "auto")
        pt = state_width(channels // concepts)
        self.concepts, self.width, self.edges, self.backend = concepts, pt, edges, backend
        rows = {"dynamic": pt, "static": concepts, "none": 0}[edges]
        self.register_parameter("edge", uniform_projection(rows, concepts, fan_in=rows) if rows else None)
        self.bn: nn.Module = nn.BatchNorm1d(pt)

    def forward(self, h: Tensor) -> Tensor:
        """h (N, C, pt) to the updated states, of the same shape."""
        bn: Any = self.bn
        if not is_plain_batch_norm(bn) or has_global_hook():
            return self._with_module(h)
        batch, group = uses_batch_statistics(bn), sync_group(bn)
        if group is not None:  # the map isn't touched, so PyTorch's ops will do
            checks.check_concept_reason(h, self.edge, None, None, bn.weight, bn.bias, bn.eps, self.edges, synced=True)
            state, mean, var = composed(h, self.edge, None, None, bn.weight, bn.bias, bn.eps, self.edges, group)
        else:
            state, mean, var = concept_reason(
                h,
                self.edge,
                mean=None if batch else bn.running_mean,
                var=None if batch else bn.running_var,
                weight=bn.weight,
                bias=bn.bias,
                eps=bn.eps,
                edges=self.edges,
                backend=self.backend,
            )
        if batch:
            triton = group is None and by_triton(self.backend, h)
            update_running_stats([(bn, mean, var)], h.shape[0] == 0 and group is None, triton)
        return state

    def _with_module(self, h: Tensor) -> Tensor:
        """With a norm that has to be called."""
        checks.check_tensor("h", h)
        n, concepts, pt = h.shape
        with without_autocast(h):
            dtype = acc_dtype(h.dtype)
            rows = interact(h.to(dtype), None if self.edge is None else self.edge.to(dtype), self.edges)
            weight = getattr(self.bn, "weight", None)
            rows = rows.reshape(n * concepts, pt)
            rows = self.bn(rows if weight is None else rows.to(weight.dtype))
            return torch.relu(rows).reshape(n, concepts, pt)

    def extra_repr(self) -> str:
        return f"concepts={self.concepts}, width={self.width}, edges={self.edges!r}"
