"""The sampler alone on Triton: one launch forward, two or three backward."""

from torch import Tensor

from ...maps import acc_dtype, empty_map_like
from ...triton_common.launch import launch
from ...triton_common.maps import dense, map_view_like, power_of_two
from ...triton_common.sizes import Sizes, cdiv, options, rows_at_once, sample_config, sizes_of, splits_of
from . import triton_backward, triton_forward


def _constants(size: Sizes) -> dict[str, object]:
    return {**size.map_constants, "PT": size.pt}


def forward(
    z: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    sampler: str,
    need_attention: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``concept_sample``."""
    size = sizes_of(z, value.shape)
    N, C, p, pt, S = size[:5]
    acc = acc_dtype(z.dtype)
    saved = 3 * N * C * p + N * C * pt + 3 * N * C + N * C * p * pt if save else 0
    h, attention, saved_to = (
        z.new_empty(shape, dtype=acc)
        for shape in ((N, C, pt), (N, C, *z.shape[2:]) if need_attention else (0,), (saved,))
    )
    found = sample_config(size, save)
    launch(
        triton_forward.concept_sample,
        (N * cdiv(C, found["CB"]),),
        z.device,
        *size.view.strided,
        value.contiguous(),
        dense(query),
        dense(key),
        dense(logit),
        h,
        attention if need_attention else None,
        saved_to,
        N,
        S,
        **_constants(size),
        PT2=power_of_two(pt),
        SAMPLER=sampler,
        SAVE=save,
        CB=found["CB"],
        BS=found["BS"],
        ONE_TILE=found["BS"] >= S,
        **options(found),
    )
    return h, attention, saved_to


def backward(
    dh: Tensor,
    dattention: Tensor | None,
    z: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    logit: Tensor | None,
    saved: Tensor,
    sampler: str,
) -> tuple[Tensor, ...]:
    """The op ``concept_sample_backward``."""
    size = sizes_of(z, value.shape)
    N, C, p, pt, S = size[:5]
    acc = acc_dtype(z.dtype)
    dz = empty_map_like(z)
    parameters = (value, query, key, logit)
    gradients = [z.new_empty((0,), dtype=acc) if w is None else w.new_empty(w.shape) for w in parameters]
    to = [None if w is None else x for w, x in zip(parameters, gradients, strict=True)]
    extra = dattention is not None
    dattention = dense(dattention)

    def numbers(count: int) -> Tensor:
        return z.new_empty((count,), dtype=acc)

    K0 = K1 = None
    if extra:
        K0, K1 = numbers(N * C), numbers(N * C * p)
        found = size.config("concept_modulate")
        launch(
            triton_backward.attention_sums,
            (N * cdiv(C, found["CB"]),),
            z.device,
            *size.view.strided,
            dattention,
            saved,
            K0,
            K1,
            N,
            S,
            **_constants(size),
            CB=found["CB"],
            BS=found["BS"],
            **options(found),
        )
    dr, constant, rdr = numbers(N * C * p), numbers(N * C * p), numbers(N * C)
    launch(
        triton_backward.sample_gradients,
        (C,),
        z.device,
        value.contiguous(),
        dense(query),
        dense(key),
        saved,
        dh.to(acc).contiguous(),
        K1,
        dr,
        constant,
        rdr,
        *to,
        N,
        S,
        **size.small_constants,
        SAMPLER=sampler,
        EXTRA=extra,
        BN=rows_at_once(power_of_two(p) * power_of_two(pt), N, size.itemsize),
        num_warps=8,
    )
    found = size.config("middle_input_grad")
    chunks = splits_of(found, S)
    launch(
        triton_backward.sample_input_grad,
        (N * chunks * cdiv(C, found["CB"]),),
        z.device,
        *size.view.strided,
        *map_view_like(dz, size.view).strided,
        dattention,
        saved,
        K0,
        dr,
        constant,
        rdr,
        N,
        S,
        **_constants(size),
        SAMPLER=sampler,
        EXTRA=extra,
        CHUNKS=chunks,
        CB=found["CB"],
        BS=found["BS"],
        **options(found),
    )
    return dz, *gradients
