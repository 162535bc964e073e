"""The middle of a block, from the grouped convolution's output to the merge: batch norm, attend, interact, modulate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..backend import INTERPRETED, check_backend
from ..collectives import Group
from ..ops.vcr_middle.op import vcr_middle
from ..ops.vcr_middle.synced import can_sync, vcr_middle_synced
from .batch_norm import (
    BATCH_NORMS,
    SYNCHRONISED,
    are_plain,
    check_dims,
    has_global_hook,
    is_plain_batch_norm,
    learned,
    sync_group,
    uses_batch_statistics,
)
from .modulator import ConceptModulator
from .reasoner import ConceptReasoner
from .running_stats import is_launched, update_running_stats
from .sampler import ConceptSampler


def fused_path(bn: Any, sampler: Any, reasoner: Any, modulator: Any) -> str:
    """How the middle runs: "whole", "after norm" (bn is called, the rest is fused) or "modules" (each is called).

    A module is fused only where nobody could tell: exactly the classes known here, and no hooks.
    """
    state_bn = reasoner._modules.get("bn")
    if (
        has_global_hook()
        or type(sampler) is not ConceptSampler
        or type(reasoner) is not ConceptReasoner
        or type(modulator) is not ConceptModulator
        or not is_plain_batch_norm(state_bn)
        or not are_plain(sampler, reasoner, modulator)
    ):
        return "modules"
    return "whole" if is_plain_batch_norm(bn) else "after norm"


def sync_groups(path: str, bn: Any, reasoner: Any) -> tuple[Group | None, Group | None]:
    """The processes that the two norms' statistics go over now, where the middle is to compute them."""
    if path == "modules":
        return None, None
    return (sync_group(bn) if path == "whole" else None), sync_group(reasoner._modules["bn"])


def path_without_sync(state_group: Group | None) -> str:
    """The path where a norm is synchronised, and the backend has no passes for that: the norms are called."""
    return "after norm" if state_group is None else "modules"


def _parameters(
    bn: Any, sampler: Any, reasoner: Any, modulator: Any, state_mean: Any, state_var: Any
) -> tuple[Any, ...]:
    """The schema's arguments from norm_weight to shift_bias."""
    weight, bias = (None, None) if bn is None else learned(bn)
    state_weight, state_bias = learned(reasoner._modules["bn"])
    try:  # past nn.Module.__getattr__, which is slow
        s, m = sampler._parameters, modulator._parameters
        return (
            weight,
            bias,
            s["value"],
            s["query"],
            s["key"],
            s["logit"],
            reasoner._parameters["edge"],
            state_mean,
            state_var,
            state_weight,
            state_bias,
            m["scale_weight"],
            m["shift_weight"],
            m["scale_bias"],
            m["shift_bias"],
        )
    except KeyError:  # kept as plain attributes, as replicas of nn.DataParallel are
        s, m = sampler, modulator
        sample, state = (
            (s.value, s.query, s.key, s.logit, reasoner.edge),
            (state_mean, state_var, state_weight, state_bias),
        )
        return weight, bias, *sample, *state, m.scale_weight, m.shift_weight, m.scale_bias, m.shift_bias


def run_middle(
    y: Tensor,
    bn: Any,
    sampler: Any,
    reasoner: Any,
    modulator: Any,
    modulation: str,
    backend: str | None,
) -> Tensor:
    """bn, sampler, reasoner, modulator on y (N, C*p, *spatial); in one op where nobody could tell."""
    path = fused_path(bn, sampler, reasoner, modulator)
    synced = False
    if path != "modules" and (type(bn) in SYNCHRONISED or type(reasoner._modules["bn"]) in SYNCHRONISED):
        norm_group, state_group = sync_groups(path, bn, reasoner)
        synced = norm_group is not None or state_group is not None
        if synced and not can_sync(backend, y):
            path, synced = path_without_sync(state_group), False
    if path == "modules":
        return _call_modules(bn(y), sampler, reasoner, modulator, modulation)
    norm, norm_mean, norm_var, norm_eps = "none", None, None, 0.0
    norm_bn: Any = None
    state_bn: Any = reasoner._modules["bn"]
    state_mean = state_var = None
    if path == "whole":
        norm_bn, norm, norm_eps = bn, "batch", bn.eps
        if not uses_batch_statistics(bn):
            norm, norm_mean, norm_var = "given", bn._buffers["running_mean"], bn._buffers["running_var"]
    else:
        y = bn(y)
    state_batch = uses_batch_statistics(state_bn)
    if not state_batch:
        state_mean, state_var = state_bn._buffers["running_mean"], state_bn._buffers["running_var"]
    # What the fast path of vcr_middle doesn't look at.
    checked = isinstance(y, Tensor) and y.dim() > 2
    if checked:
        if norm_bn is not None:
            check_dims("y", y, norm_bn)
        shape, numel = y.shape, y.numel()
        checked = numel > 0 and (shape[0] > 1 or (numel != shape[1] and sampler.concepts != 1))
        if checked and (INTERPRETED or not y.is_cpu):  # Triton's launchers refuse nothing
            checked = y.dtype in checks.FEATURE_DTYPES and shape[1] == sampler.channels
    arguments = (
        y,
        norm_mean,
        norm_var,
        *_parameters(norm_bn, sampler, reasoner, modulator, state_mean, state_var),
        norm,
        norm_eps,
        state_bn.eps,
        sampler.sampler,
        reasoner.edges,
        modulation,
    )
    if synced:
        found = vcr_middle_synced(backend, arguments, norm_group, state_group)
    else:
        name, found = vcr_middle(backend, arguments, checked=checked)
    out, batch_mean, batch_var, batch_state_mean, batch_state_var = found
    if norm != "batch" and not state_batch:
        return out
    updates = []
    if norm == "batch":
        updates.append((bn, batch_mean, batch_var))
    if state_batch:
        updates.append((state_bn, batch_state_mean, batch_state_var))
    if not synced:
        update_running_stats(updates, y.shape[0] == 0, name == "triton" and is_launched(y))
        return out
    for update in updates:  # what others have counts where this process has no images
        update_running_stats([update], y.shape[0] == 0 and sync_group(update[0]) is None)
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
    if isinstance(ndim, bool) or not isinstance(ndim, int) or ndim not in BATCH_NORMS:
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
        zero_init: start as relu(bn(y)). backend: "auto", "cpp", "triton", "cuda" or "composite".
        ndim: spatial dims of the default norm.
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
        checks.check_norm_layer(norm_layer)
        check_backend(backend or "auto")
        self.modulation, self.backend = modulation, backend
        self.bn = (norm_layer or default_norm(ndim))(channels)
        self.sampler = ConceptSampler(channels, concepts, sampler=sampler, backend=backend)
        self.reasoner = ConceptReasoner(channels, concepts, edges=edges, backend=backend)
        self.modulator = ConceptModulator(channels, concepts, affine=affine, zero_init=zero_init, backend=backend)

    def forward(self, y: Tensor) -> Tensor:
        """y (N, channels, *spatial); returns the same shape, dtype and memory format."""
        m = self._modules  # past nn.Module.__getattr__, which is slow
        return run_middle(y, m["bn"], m["sampler"], m["reasoner"], m["modulator"], self.modulation, self.backend)

    def extra_repr(self) -> str:
        return f"modulation={self.modulation!r}, backend={self.backend!r}"
