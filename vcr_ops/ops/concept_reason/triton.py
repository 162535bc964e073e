"""The reasoner alone on Triton: two launches forward, three backward."""

import torch
from torch import Tensor

from ...triton_common.launch import launch
from ...triton_common.maps import acc_type, dense, power_of_two
from ...triton_common.sizes import SMALL_TILE, rows_at_once
from . import triton_kernels as kernels

MOST_ROWS = 128


def _constants(h: Tensor) -> dict[str, object]:
    _, C, pt = h.shape
    return {"C": C, "PT": pt, "PT2": power_of_two(pt), "ACC": acc_type(h.dtype)}


def exchange_blocks(concepts: int, pt: int) -> dict[str, int]:
    """How many concepts a program lets hear (RB) and speak (DB) at a time."""
    rows = min(power_of_two(concepts), max(1, min(64, SMALL_TILE // power_of_two(pt))))
    return {"RB": rows, "DB": max(1, min(power_of_two(concepts), SMALL_TILE // (rows * power_of_two(pt))))}


def rows_of_sums(pt: int, rows: int) -> int:
    """How many images' sums, float64, a program loads at a time."""
    return min(MOST_ROWS, rows_at_once(power_of_two(pt), rows))


def _split(saved: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G (N, C, pt), the dynamic edges (N, C, C), and four numbers per column of the states' norm."""
    n, concepts, pt = h.shape
    g, edges, norm = saved.split([n * concepts * pt, n * concepts * concepts, 4 * pt])
    return g, edges, norm


def forward(
    h: Tensor,
    edge: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    edges: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``concept_reason``."""
    h, edge = h.contiguous(), dense(edge)
    N, C, pt = h.shape
    batch = mean is None
    saved = h.new_empty((N * C * pt + N * C * C + 4 * pt,))
    g, edges_to, norm = _split(saved, h)
    state, parts = h.new_empty(h.shape), h.new_empty((2 * N * pt,), dtype=torch.float64)
    new_mean, new_var = (h.new_empty((pt if batch else 0,)) for _ in range(2))
    if N == 0:
        new_mean.zero_(), new_var.fill_(1.0), saved.zero_()
    constants = _constants(h)
    launch(
        kernels.reason,
        (N,),
        h.device,
        h,
        edge,
        g,
        edges_to,
        parts,
        **constants,
        **exchange_blocks(C, pt),
        EDGES=edges,
        SAVE=save,
        num_warps=4,
    )
    launch(
        kernels.normalise_states,
        (N,),
        h.device,
        g,
        parts,
        dense(mean),
        dense(var),
        dense(weight),
        dense(bias),
        state,
        norm,
        new_mean,
        new_var,
        N,
        **constants,
        CB=rows_at_once(power_of_two(pt), C),
        EPS=eps,
        BATCH=batch,
        ROWS=rows_of_sums(pt, N),
        num_warps=4,
    )
    return state, new_mean, new_var, saved if save else h.new_empty((0,))


def backward(
    dstate: Tensor,
    h: Tensor,
    edge: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    edges: str,
    batch: bool,
) -> tuple[Tensor, ...]:
    """The op ``concept_reason_backward``."""
    h, edge, weight = h.contiguous(), dense(edge), dense(weight)
    N, C, pt = h.shape
    g, edges_from, norm = _split(saved, h)
    dh, masked, dg = (h.new_empty(h.shape) for _ in range(3))
    parts = h.new_empty((2 * N * pt,), dtype=torch.float64)
    parameters = (edge, weight, bias)
    gradients = [h.new_empty((0,)) if w is None else w.new_zeros(w.shape) for w in parameters]
    dedge, dweight, dbias = (None if w is None else x for w, x in zip(parameters, gradients, strict=True))
    constants, pt2, c2 = _constants(h), power_of_two(pt), power_of_two(C)
    blocks = {"CB": rows_at_once(pt2, C), "num_warps": 4}
    launch(
        kernels.state_relu_backward,
        (N,),
        h.device,
        dstate.contiguous(),
        g,
        weight,
        dense(bias),
        norm,
        masked,
        parts,
        **constants,
        **blocks,
    )
    launch(
        kernels.state_norm_backward,
        (N,),
        h.device,
        masked,
        g,
        parts,
        weight,
        norm,
        dg,
        dweight,
        dbias,
        N,
        **constants,
        **blocks,
        BATCH=batch,
        ROWS=rows_of_sums(pt, N),
    )
    launch(
        kernels.reason_gradients,
        (C,),
        h.device,
        dg,
        h,
        edge,
        edges_from,
        dh,
        dedge,
        N,
        **constants,
        C2=c2,
        EDGES=edges,
        BN=rows_at_once(c2 * pt2, N, h.element_size()),
        num_warps=8,
    )
    return dh, *gradients
