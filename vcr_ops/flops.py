"""How many floating-point operations the folded algebra takes: a multiply-add counts as two, as in torch's counter.

All of them are counted, also those that are no matrix product: per element of the map (``E = N*C*p*S``) and, for the
small algebra, per state. Exponentials, roots and comparisons are left out.
"""

import math
from collections.abc import Sequence
from typing import Any

Shape = Sequence[int]


def _sample_map(sampler: str, pt: int, save: bool) -> int:
    """Multiply-adds per element: logits and weighted mean (and what spares the backward pass a read), or the mean."""
    if sampler == "pool":
        return 1
    return 2 + (sampler == "dynamic") + (2 * pt if save else 0)


def _sample_small(n: int, channels: int, pt: int, sampler: str) -> int:
    """Query, key, value: N*C matrices (p, pt)."""
    return n * channels * pt * (3 if sampler == "dynamic" else 1)


def _reason_small(n: int, concepts: int, pt: int, edges: str) -> int:
    """Edges, their product with the states, batch norm."""
    products = {"dynamic": 2, "static": 1, "none": 0}[edges]
    return n * concepts * pt * (products * concepts + 3)


def _modulate_small(n: int, channels: int, pt: int, weights: int) -> int:
    return n * channels * (pt * weights + 2)


def concept_sample(
    z: Shape,
    value: Shape,
    query: Shape | None,
    key: Shape | None,
    logit: Shape | None,
    sampler: str,
    need_attention: bool,
    save: bool,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::concept_sample."""
    pt = value[2]
    return 2 * (math.prod(z) * _sample_map(sampler, pt, save) + _sample_small(z[0], z[1], pt, sampler))


def concept_sample_backward(
    dh: Shape,
    dattention: Shape | None,
    z: Shape,
    value: Shape,
    query: Shape | None,
    key: Shape | None,
    logit: Shape | None,
    saved: Shape,
    sampler: str,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::concept_sample_backward: the logits again, dr . z and dz."""
    per_element = 1 if sampler == "pool" else 4 + (dattention is not None)
    return 2 * (math.prod(z) * per_element + 2 * _sample_small(z[0], z[1], value[2], sampler))


def concept_reason(
    h: Shape,
    edge: Shape | None,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    eps: float,
    edges: str,
    *_: Any,
    **__: Any,
) -> int:
    """FLOPs of vcr_ops::concept_reason."""
    return 2 * _reason_small(h[0], h[1], h[2], edges)


def concept_reason_backward(
    dstate: Shape, h: Shape, edge: Any, weight: Any, bias: Any, saved: Any, edges: str, *_: Any, **__: Any
) -> int:
    """FLOPs of vcr_ops::concept_reason_backward."""
    return 4 * _reason_small(h[0], h[1], h[2], edges)


def concept_modulate(
    z: Shape,
    state: Shape,
    scale_weight: Shape | None,
    shift_weight: Shape | None,
    scale_bias: Shape,
    shift_bias: Shape,
    attention: Shape | None,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::concept_modulate."""
    weights = (scale_weight is not None) + (shift_weight is not None)
    per_element = 1 if attention is None else 1 + weights
    return 2 * (math.prod(z) * per_element + _modulate_small(z[0], z[1], state[2], weights))


def concept_modulate_backward(
    grad_out: Shape,
    z: Shape,
    state: Shape,
    scale_weight: Shape | None,
    shift_weight: Shape | None,
    scale_bias: Shape,
    shift_bias: Shape,
    attention: Shape | None,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::concept_modulate_backward: the pre-activation again, two sums (four per pixel), dz."""
    weights = (scale_weight is not None) + (shift_weight is not None)
    per_element = 4 if attention is None else 6 + 3 * weights
    return 2 * (math.prod(z) * per_element + 2 * _modulate_small(z[0], z[1], state[2], weights))


def vcr_middle(
    y: Shape,
    norm_mean: Any,
    norm_var: Any,
    norm_weight: Any,
    norm_bias: Any,
    value: Shape,
    query: Any,
    key: Any,
    logit: Any,
    edge: Any,
    state_mean: Any,
    state_var: Any,
    state_weight: Any,
    state_bias: Any,
    scale_weight: Any,
    shift_weight: Any,
    scale_bias: Shape,
    shift_bias: Shape,
    norm: str,
    norm_eps: float,
    state_eps: float,
    sampler: str,
    edges: str,
    modulation: str,
    save: bool = False,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::vcr_middle, and of vcr_middle_infer, which saves nothing."""
    n, channels = y[:2]
    concepts, _p, pt = value
    weights = (scale_weight is not None) + (shift_weight is not None)
    per_element = _sample_map(sampler, pt, save) + (1 if modulation == "channel" else 1 + weights)
    if norm == "batch":
        per_element += 1 + (sampler == "static")  # squares; and the mean, where the sampler doesn't take it anyway
    small = _sample_small(n, channels, pt, sampler) + _reason_small(n, concepts, pt, edges)
    small += _modulate_small(n, channels, pt, weights)
    return 2 * (math.prod(y) * per_element + small)


def vcr_middle_backward(
    grad_out: Any,
    y: Shape,
    norm_weight: Any,
    norm_bias: Any,
    value: Shape,
    query: Any,
    key: Any,
    logit: Any,
    edge: Any,
    state_weight: Any,
    state_bias: Any,
    scale_weight: Any,
    shift_weight: Any,
    scale_bias: Any,
    shift_bias: Any,
    saved: Any,
    norm: str,
    state_batch: bool,
    sampler: str,
    edges: str,
    modulation: str,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::vcr_middle_backward: two passes, each with the pre-activation again."""
    n, channels = y[:2]
    concepts, _p, pt = value
    weights = (scale_weight is not None) + (shift_weight is not None)
    pixel = modulation == "pixel"
    # Pass 1: pre-activation and two sums (pixel: four, and k with its moment). Pass 2: pre-activation, slope, c1.
    per_element = (3 + (weights + 4 if pixel else 0)) + (2 + (weights if pixel else 0) + (norm == "batch"))
    if sampler != "pool":
        per_element += 3  # the logits again, dr . y, dl v
    small = _sample_small(n, channels, pt, sampler) + _reason_small(n, concepts, pt, edges)
    small += _modulate_small(n, channels, pt, weights)
    return 2 * (math.prod(y) * per_element + 2 * small)


# The steps of the middle where its statistics go over several processes; together what the two ops above take.


def vcr_middle_stats(y: Shape, concepts: int, **_: Any) -> int:
    """FLOPs of vcr_ops::vcr_middle_stats: mean and squares."""
    return 2 * math.prod(y) * 2


def vcr_middle_states(
    y: Shape,
    norm_mean: Any,
    norm_var: Any,
    norm_weight: Any,
    norm_bias: Any,
    value: Shape,
    query: Any,
    key: Any,
    logit: Any,
    edge: Any,
    scale_bias: Any,
    shift_bias: Any,
    norm: str,
    norm_eps: float,
    sampler: str,
    edges: str,
    modulation: str,
    **_: Any,
) -> int:
    """FLOPs of vcr_ops::vcr_middle_states."""
    n, channels = y[:2]
    concepts, _p, pt = value
    small = _sample_small(n, channels, pt, sampler) + _reason_small(n, concepts, pt, edges)
    return 2 * (math.prod(y) * _sample_map(sampler, pt, True) + small)


def _weights_of(learned: Sequence[Any]) -> int:
    return (learned[9] is not None) + (learned[10] is not None)


def vcr_middle_modulate(y: Shape, *arguments: Any, **_: Any) -> int:
    """FLOPs of vcr_ops::vcr_middle_modulate."""
    weights, pt, modulation = _weights_of(arguments), arguments[2][2], arguments[-1]
    per_element = 1 if modulation == "channel" else 1 + weights
    return 2 * (math.prod(y) * per_element + _modulate_small(y[0], y[1], pt, weights))


def vcr_middle_backward_sums(grad_out: Any, y: Shape, *arguments: Any, **_: Any) -> int:
    """FLOPs of vcr_ops::vcr_middle_backward_sums: the pre-activation again, two sums (pixel: four, and k's moment)."""
    weights, pt, modulation = _weights_of(arguments), arguments[2][2], arguments[-1]
    per_element = 3 + (weights + 4 if modulation == "pixel" else 0)
    return 2 * (math.prod(y) * per_element + 2 * _modulate_small(y[0], y[1], pt, weights))


def vcr_middle_backward_states(y: Shape, *arguments: Any, **_: Any) -> int:
    """FLOPs of vcr_ops::vcr_middle_backward_states."""
    (concepts, _p, pt), sampler, edges = arguments[2], arguments[-3], arguments[-2]
    small = _sample_small(y[0], y[1], pt, sampler) + _reason_small(y[0], concepts, pt, edges)
    return 4 * small


def vcr_middle_backward_input(grad_out: Any, y: Shape, *arguments: Any, **_: Any) -> int:
    """FLOPs of vcr_ops::vcr_middle_backward_input: the pre-activation again, slope and c1; logits, dr . y, dl v."""
    weights, norm_shares, sampler, modulation = _weights_of(arguments), arguments[17], arguments[-3], arguments[-1]
    per_element = 2 + (weights if modulation == "pixel" else 0) + (norm_shares is not None)
    return 2 * math.prod(y) * (per_element + (0 if sampler == "pool" else 3))
