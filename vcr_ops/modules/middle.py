"""The middle of a block, from the grouped convolution's output to the merge: batch norm, attend, interact, modulate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import checks
from ..backend import check_backend
from ..ops.vcr_middle.op import vcr_middle
from .batch_norm import (
    BATCH_NORMS,
    check_dims,
    check_rows,
    is_plain,
    is_plain_batch_norm,
    update_running_stats,
    uses_batch_statistics,
)
from .modulator import ConceptModulator
from .reasoner import ConceptReasoner
from .sampler import ConceptSampler


def _parameter(module: nn.Module, name: str) -> Any:
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def fused_path(bn: nn.Module, sampler: nn.Module, reasoner: nn.Module, modulator: nn.Module) -> str:
    """How the middle runs: "whole", "after norm" (bn is called, the rest is fused) or "modules" (each is called).

    A module is fused only where nobody could tell: exactly the classes known here, and no hooks.
    """
    if (
        _has_any_global_hook()
        or type(sampler) is not ConceptSampler
        or type(reasoner) is not ConceptReasoner
        or type(modulator) is not ConceptModulator
        or not (is_plain(sampler) and is_plain(reasoner) and is_plain(modulator))
        or not is_plain_batch_norm(reasoner.bn)
    ):
        return "modules"
    return "whole" if is_plain_batch_norm(bn) else "after norm"


def run_middle(
    y: Tensor,
    bn: nn.Module,
    sampler: ConceptSampler,
    reasoner: ConceptReasoner,
    modulator: ConceptModulator,
    modulation: str,
    backend: str | None,
) -> Tensor:
    """bn, sampler, reasoner, modulator on y (N, C*p, *spatial); in one op where nobody could tell."""
    path = fused_path(bn, sampler, reasoner, modulator)
    if path == "modules":
        return _call_modules(bn(y), sampler, reasoner, modulator, modulation)
    whole = path == "whole"
    if not whole:
        y = bn(y)
    checked = isinstance(y, Tensor) and y.dim() > 2
    norm, norm_mean, norm_var, norm_weight, norm_bias = "none", None, None, None, None
    norm_eps: Any = 0.0
    if whole:
        if checked:
            check_dims("y", y, bn)
            check_rows("y", y.numel() // (y.shape[1] or 1), f"N*S = 1 value per channel, {tuple(y.shape)}", bn)
        norm, norm_eps = "batch", bn.eps
        if not uses_batch_statistics(bn):
            norm, norm_mean, norm_var = "given", bn._buffers["running_mean"], bn._buffers["running_var"]
        norm_weight, norm_bias = _parameter(bn, "weight"), _parameter(bn, "bias")
    state_bn = reasoner.bn
    state_mean = state_var = None
    state_batch = uses_batch_statistics(state_bn)
    if state_batch:
        if checked:
            check_rows("y", y.shape[0] * sampler.concepts, f"one image of C = 1 concept, {tuple(y.shape)}", state_bn)
    else:
        state_mean, state_var = state_bn._buffers["running_mean"], state_bn._buffers["running_var"]
    out, batch_mean, batch_var, batch_state_mean, batch_state_var = vcr_middle(
        backend,
        (
            y,
            norm_mean,
            norm_var,
            norm_weight,
            norm_bias,
            _parameter(sampler, "value"),
            _parameter(sampler, "query"),
            _parameter(sampler, "key"),
            _parameter(sampler, "logit"),
            _parameter(reasoner, "edge"),
            state_mean,
            state_var,
            _parameter(state_bn, "weight"),
            _parameter(state_bn, "bias"),
            _parameter(modulator, "scale_weight"),
            _parameter(modulator, "shift_weight"),
            _parameter(modulator, "scale_bias"),
            _parameter(modulator, "shift_bias"),
            norm,
            norm_eps,
            state_bn.eps,
            sampler.sampler,
            reasoner.edges,
            modulation,
        ),
        checked=checked,
    )
    if norm == "batch":
        update_running_stats(bn, batch_mean, batch_var, y.shape[0] == 0)
    if state_batch:
        update_running_stats(state_bn, batch_state_mean, batch_state_var, y.shape[0] == 0)
    return out


def _call_modules(z: Tensor, sampler: nn.Module, reasoner: nn.Module, modulator: nn.Module, modulation: str) -> Tensor:
    if modulation == "pixel":
        h, attention = sampler(z, return_attention=True)
        return modulator(z, reasoner(h), attention)
    return modulator(z, reasoner(sampler(z)))


def default_norm(ndim: int) -> type[nn.Module]:
    """nn.BatchNorm for a number of spatial dims.

    Raises:
        ValueError: ndim isn't 1, 2 or 3.
    """
    if ndim not in BATCH_NORMS:
        raise ValueError(f"ndim is {ndim!r}; it takes 1, 2 or 3")
    return BATCH_NORMS[ndim]


class VisualConceptReasoning(nn.Module):
    """Batch norm and the three stages on any Y (N, channels, *spatial), as a grouped convolution puts it out.

    ``relu(alpha * z + beta)``, ``z = bn(y)``, alpha and beta from the concepts' states: sampler, reasoner, modulator.
    One fused op where bn and reasoner.bn are nn.BatchNorm without hooks; any other norm is called, as are modules that
    have hooks.

    Args:
        channels: C*p. concepts: C, the number of groups of channels.
        sampler: "dynamic", "static" or "pool". edges: "dynamic", "static" or "none".
        modulation: "channel" or "pixel" (not with "pool"). affine: "both", "scale" or "shift".
        norm_layer: makes ``bn`` from the number of channels; default nn.BatchNorm for ``ndim``.
        zero_init: start as relu(bn(y)). backend: "auto", "cpp" or "composite". ndim: spatial dims of the default norm.
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
        norm_layer: Callable[..., nn.Module] | None = None,
        zero_init: bool = False,
        backend: str | None = "auto",
        ndim: int = 2,
    ) -> None:
        super().__init__()
        checks.check_variants(sampler, edges, modulation, affine)
        checks.check_channels(channels, concepts)
        check_backend(backend or "auto")
        self.modulation, self.backend = modulation, backend
        self.bn = (norm_layer or default_norm(ndim))(channels)
        self.sampler = ConceptSampler(channels, concepts, sampler=sampler, backend=backend)
        self.reasoner = ConceptReasoner(channels, concepts, edges=edges, backend=backend)
        self.modulator = ConceptModulator(channels, concepts, affine=affine, zero_init=zero_init, backend=backend)

    def forward(self, y: Tensor) -> Tensor:
        """y (N, channels, *spatial); returns the same shape, dtype and memory format."""
        return run_middle(y, self.bn, self.sampler, self.reasoner, self.modulator, self.modulation, self.backend)

    def extra_repr(self) -> str:
        return f"modulation={self.modulation!r}, backend={self.backend!r}"
