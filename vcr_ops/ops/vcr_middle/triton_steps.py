"""The steps of a synchronised middle (``synced.py``) on Triton: the op's own launches one by one, so that the
processes can tell each other in between what they found.

``saved`` is what the whole op keeps; ``late`` is a copy of it that ``vcr_middle_modulate`` completes. Where the kernels
expect the sums of their own batch, they get one row that stands for everybody's; and what is handed on of the parts of
an image is merged, so that its size doesn't depend on how many there are. Maps that fit no tile are read once
more than in the whole op, for their images' means.
"""

from typing import Any

import torch
from torch import Tensor

from ...maps import acc_dtype, empty_map_like, positions
from ...triton_common.sizes import Sizes, cdiv, sizes_of
from ..dispatch import like_parameter
from .arguments import Learned, Variant, grouped
from .kept import kept_by_triton, saved_states, sums_size
from .triton_backward_launches import (
    Attended,
    Sums,
    Tops,
    backward_sums,
    gradient_numbers,
    input_gradient,
    merge_splits,
    small_gradients,
)
from .triton_forward_launches import Stats, channel_statistics, modulate, reason, sample, sampling_of, state_rows


def _moments(parts: Tensor, counts: Tensor) -> Tensor:
    """(2, k): mean and centred sum of squares of rows of them (rows, 2, k), of so many values each (rows)."""
    means, squares = parts.unbind(1)
    counts = counts.double().unsqueeze(1)
    mean = (means * counts).sum(0) / counts.sum().clamp_min(1)
    return torch.stack((mean, (squares + counts * (means - mean).square()).sum(0)))


def vcr_middle_stats(y: Tensor, concepts: int) -> Tensor:
    """Mean and centred sum of squares of every channel, (2, C*p) float64; 1R."""
    channels = y.shape[1]
    if y.shape[0] == 0:
        return y.new_zeros((2, channels), dtype=torch.float64)
    size = sizes_of(y, (concepts, channels // concepts, 1))
    stats = channel_statistics(y, size)
    assert stats.partial is not None
    row = torch.arange(stats.rows, device=y.device)
    if stats.splits == 1:
        counts = (size.N - row * stats.per_group).clamp(0, stats.per_group) * size.S
    else:  # whole tiles: see split_range
        tile = size.config("channel_stats")["BS"]
        length = cdiv(cdiv(size.S, tile), stats.splits) * tile
        counts = (size.S - row % stats.splits * length).clamp(0, length)
    return _moments(stats.partial.view(stats.rows, 2, channels), counts)


def vcr_middle_states(
    y: Tensor, norm_mean: Tensor | None, norm_var: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """(saved, moments of G's columns (2, pt) float64); 1R, or 2R. It takes no weights of the states' norm or later."""
    *earlier, scale_bias, shift_bias, norm, norm_eps, sampler, edges, modulation = arguments
    parameters = [*earlier, *[None] * 4, scale_bias, shift_bias]
    learned, variant = Learned(*parameters), Variant(norm, sampler, edges, modulation)
    size = sizes_of(y, learned.value.shape)
    saved = y.new_empty((kept_by_triton(*size[:4], variant.modulation).saved,), dtype=acc_dtype(y.dtype))
    if size.N == 0:
        return saved.zero_(), y.new_zeros((2, size.pt), dtype=torch.float64)
    sampling = sampling_of(y, size, variant, True)
    stats = channel_statistics(y, size) if sampling.needs_means else Stats(None, None, 0, 1, 1)
    sample(y, size, sampling, stats, norm_mean, norm_var, learned, saved, None, None, variant, norm_eps, True)
    parts = reason(y, size, sampling, learned, saved, variant, True)
    rows, per_row = state_rows(size)
    images = (size.N - torch.arange(rows, device=y.device) * per_row).clamp_max(per_row)
    return saved, _moments(parts.view(rows, 2, size.pt), images * size.C)


@grouped
def vcr_middle_modulate(
    y: Tensor,
    learned: Learned,
    saved: Tensor,
    state_norm: Tensor,
    variant: Variant,
) -> tuple[Tensor, Tensor]:
    """(out, late); 1R + 1W. state_norm (2, pt) float64: mean and 1 / sqrt(var + eps)."""
    size = sizes_of(y, learned.value.shape)
    out, late = empty_map_like(y), saved.clone()
    if size.N > 0:
        mean, rstd = state_norm
        parts = y.new_empty((0,), dtype=torch.float64)  # G is there; its statistics are given
        modulate(y, out, size, mean, rstd.pow(-2), learned, late, parts, None, None, variant, 0.0, True)
    return out, late


def _summed(size: Sizes, summed: Tensor, modulation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(merged, dstate, first) in ``summed``; the last are int32."""
    states, concepts = size.N * size.C * size.pt, size.N * size.C
    merged, dstate, first = summed.split((sums_size(*size[:3], modulation), states, concepts))
    return merged, dstate, first.view(torch.int32).narrow(0, 0, concepts)


def _tops(size: Sizes, merged: Tensor, first: Tensor) -> Tops:
    """They are the last numbers of store_sums; anything without pixel modulation, where nobody asks."""
    numbers = 3 * size.N * size.C
    return Tops(merged.narrow(0, max(0, merged.numel() - numbers), min(numbers, merged.numel())), first)


@grouped
def vcr_middle_backward_sums(
    grad_out: Tensor,
    y: Tensor,
    learned: Learned,
    saved: Tensor,
    late: Tensor,
    state_norm: Tensor,
    variant: Variant,
) -> tuple[Tensor, ...]:
    """(summed, the two sums of the states' norm (2, pt) float64, gradients of the modulator's four parameters); 2R."""
    size = sizes_of(y, learned.value.shape)
    N, C, p, pt, _ = size[:5]
    modulators = learned[9:]  # scale_weight to shift_bias
    summed = late.new_empty((kept_by_triton(N, C, p, pt, variant.modulation).summed,))
    if N == 0:
        zeros = (like_parameter(w, y).zero_() for w in modulators)
        return summed, y.new_zeros((2, pt), dtype=torch.float64), *zeros
    merged, dstate, first = _summed(size, summed, variant.modulation)
    parts = backward_sums(grad_out, y, size, learned, late, variant)
    sums = merge_splits(size, parts, late, merged, first, dstate, variant.modulation)
    dbias, product = sums.state_sums.view(-1, 2, pt).sum(0)
    _, rstd = state_norm
    state_sums = torch.stack((dbias, product * rstd))
    # of the modulator's parameters: z = s yhat + b
    maps = 4 if variant.modulation == "pixel" else 2
    E0, E1, *F = merged.narrow(0, 0, maps * N * C * p).view(maps, N, C, p).unbind(0)
    F0, F1 = F or (E0, E1)
    s, b = _norm_of(size, late, variant.norm, learned.norm_bias)
    states = N * C * pt
    state = late.narrow(0, saved_states(N, C, p, pt) + states, states).view(N, C, pt)
    gradients = (
        None if learned.scale_weight is None else torch.einsum("nck,ncj->ckj", state, s * F1 + b * F0),
        None if learned.shift_weight is None else torch.einsum("nck,ncj->ckj", state, F0),
        (s * E1 + b * E0).sum(0),
        E0.sum(0),
    )
    return summed, state_sums, *(_as(g, w, y) for g, w in zip(gradients, modulators, strict=True))


def _as(gradient: Tensor | None, parameter: Tensor | None, y: Tensor) -> Tensor:
    """In the parameter's type; nothing of a parameter that isn't there."""
    if gradient is None or parameter is None:
        return like_parameter(parameter, y)
    return gradient.reshape(parameter.shape).to(parameter.dtype)


def _norm_of(size: Sizes, saved: Tensor, norm: str, norm_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """s and b of z = s yhat + b, (C, p), or each image's own; see norm_view."""
    shape, channels = (size.C, size.p), size.C * size.p
    if norm == "none":
        return saved.new_ones(shape), saved.narrow(0, 3 * channels, size.N * channels).view(size.N, *shape)
    b = saved.new_zeros(shape) if norm_bias is None else norm_bias.to(saved.dtype).view(shape)
    return saved.narrow(0, 2 * channels, channels).view(shape), b


@grouped
def vcr_middle_backward_states(
    y: Tensor,
    learned: Learned,
    saved: Tensor,
    late: Tensor,
    state_norm: Tensor,
    summed: Tensor,
    state_shares: Tensor,
    variant: Variant,
) -> tuple[Tensor, ...]:
    """(attended, the norm's two sums (2, C*p), dnorm_weight, dnorm_bias, dvalue, dquery, dkey, dlogit, dedge).

    state_shares: everybody's sums of the states' norm over their number.
    """
    size = sizes_of(y, learned.value.shape)
    N, C, p, pt, _ = size[:5]
    channels = C * p
    earlier = learned[:7]  # norm_weight to edge
    attended = late.new_empty((2 * N * channels + N * C,))
    if N == 0:
        return attended, late.new_zeros((2, channels)), *(like_parameter(w, y).zero_() for w in earlier)
    merged, dstate, first = _summed(size, summed, variant.modulation)
    _, rstd = state_norm
    sum0, sum1 = state_shares * (N * C)
    everybody = torch.cat((sum0, sum1 / rstd))
    to = Attended(*attended.split((N * channels, N * channels, N * C)))
    tops = _tops(size, merged, first)  # they are there, and an op doesn't write to what it is given
    given = (Sums(1, merged, first, dstate, everybody), to, Tops(*map(torch.empty_like, tops)))
    partial, groups = small_gradients(size, learned, late, *given, variant, True, None, None)
    sums = partial.view(groups, -1).sum(0)
    weight = channels * pt
    edge_numbers = gradient_numbers(size, variant.edges) - 5 * (weight + channels)
    numbers = sums.split([*[weight] * 5, *[channels] * 5, edge_numbers])
    dvalue, dquery, dkey, _, _, dlogit, _, _, ds, db, dedge = numbers
    gradients = (ds * late.narrow(0, channels, channels), db, dvalue, dquery, dkey, dlogit, dedge)
    return attended, torch.stack((ds, db)), *(_as(g, w, y) for g, w in zip(gradients, earlier, strict=True))


@grouped
def vcr_middle_backward_input(
    grad_out: Tensor,
    y: Tensor,
    learned: Learned,
    saved: Tensor,
    late: Tensor,
    summed: Tensor,
    attended: Tensor,
    norm_shares: Tensor | None,
    variant: Variant,
) -> Tensor:
    """dy; 2R + 1W. norm_shares: everybody's sums of the norm over their number; None: its statistics are constants."""
    size = sizes_of(y, learned.value.shape)
    dy = empty_map_like(y)
    if size.N == 0:
        return dy
    merged, _, first = _summed(size, summed, variant.modulation)
    tops = _tops(size, merged, first)
    channels = size.C * size.p
    to = Attended(*attended.split((size.N * channels, size.N * channels, size.N * size.C)))
    partial = late.new_zeros(gradient_numbers(size, variant.edges))
    if norm_shares is not None:  # the last two of the vectors; see small_gradients
        before, edge_numbers = (5 * size.pt + 3) * channels, partial.numel() - 5 * (size.pt + 1) * channels
        sums = norm_shares.reshape(-1) * (size.N * positions(y))
        partial = torch.cat((partial.narrow(0, 0, before), sums, partial.narrow(0, 0, edge_numbers)))
        variant = variant._replace(norm="batch")
    nothing: Any = [None] * len(learned)  # the parameters' gradients are there
    nowhere = Learned(*nothing)
    input_gradient(grad_out, y, dy, size, learned, late, to, tops, partial, 1, nowhere, variant)
    return dy
