"""The modulator alone on Triton: one launch forward, two or three backward."""

from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import cdiv, options, rows_at_once, sizes_of, splits_of
from . import triton_kernels as kernels


def forward(
    z: Tensor,
    state: Tensor,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    attention: Tensor | None,
) -> Tensor:
    """The op ``concept_modulate``."""
    pt = state.shape[2]
    size = sizes_of(z, (*scale_bias.shape, pt))
    out = empty_map_like(z)
    found = size.config("concept_modulate")
    chunks = splits_of(found, size.S)
    launch(
        kernels.concept_modulate,
        (size.N * chunks * cdiv(size.C, found["CB"]),),
        z.device,
        *size.view.strided,
        *map_view_like(out, size.view).strided,
        state.contiguous(),
        dense(scale_weight),
        dense(shift_weight),
        scale_bias.contiguous(),
        shift_bias.contiguous(),
        dense(attention),
        size.S,
        **size.map_constants,
        PT=pt,
        PT2=power_of_two(pt),
        PIXEL=attention is not None,
        CHUNKS=chunks,
        CB=found["CB"],
        BS=found["BS"],
        **options(found),
    )
    return out


def backward(
    grad_out: Tensor,
    z: Tensor,
    state: Tensor,
    scale_weight: Tensor | None,
    shift_weight: Tensor | None,
    scale_bias: Tensor,
    shift_bias: Tensor,
    attention: Tensor | None,
) -> tuple[Tensor, ...]:
    """The op ``concept_modulate_backward``."""
    pt = state.shape[2]
    size = sizes_of(z, (*scale_bias.shape, pt))
    N, C, p, _, S = size[:5]
    dz, acc = empty_map_like(z), acc_dtype(z.dtype)
    inputs = (state, scale_weight, shift_weight, scale_bias, shift_bias, attention)
    gradients = [z.new_empty((0,), dtype=acc) if w is None else w.new_empty(w.shape) for w in inputs]
    state, attention = state.contiguous(), dense(attention)
    scale_weight, shift_weight = dense(scale_weight), dense(shift_weight)
    sums = z.new_empty((4 * N * C * p,), dtype=acc)
    through = None if attention is None else z.new_empty((N * C * S,), dtype=acc)
    found = size.config("modulate_backward_sums")
    launch(
        kernels.concept_modulate_backward,
        (N * cdiv(C, found["CB"]),),
        z.device,
        *size.view.strided,
        *map_view_like(grad_out, size.view).strided,
        *map_view_like(dz, size.view).strided,
        state,
        scale_weight,
        shift_weight,
        scale_bias.contiguous(),
        shift_bias.contiguous(),
        attention,
        through,
        sums,
        N,
        S,
        **size.map_constants,
        PT=pt,
        PT2=power_of_two(pt),
        PIXEL=attention is not None,
        CB=found["CB"],
        BS=found["BS"],
        **options(found),
    )
    small = size.small_constants
    launch(
        kernels.modulate_gradients,
        (C,),
        z.device,
        sums,
        state,
        scale_weight,
        shift_weight,
        *gradients[:5],
        N,
        **small,
        BN=rows_at_once(power_of_two(p) * power_of_two(pt), N, size.itemsize),
        num_warps=4,
    )
    if attention is not None:
        launch(
            kernels.attention_gradient,
            (N, C),
            z.device,
            attention,
            through,
            gradients[5],
            S,
            C=C,
            BS=min(1024, power_of_two(S)),
            ACC=small["ACC"],
            num_warps=4,
        )
    return dz, *gradients
