"""The reasoner alone on Triton: two launches in each direction."""

from torch import Tensor

from ...triton_common.launch import launch
from ...triton_common.maps import acc_type, dense, power_of_two
from ...triton_common.sizes import rows_at_once
from . import triton_kernels as kernels


def _constants(h: Tensor) -> dict[str, object]:
    _, C, pt = h.shape
    return {"C": C, "C2": power_of_two(C), "PT": pt, "PT2": power_of_two(pt), "ACC": acc_type(h.dtype)}


def _split(saved: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """xhat (N, C, pt), the dynamic edges (N, C, C), and the states' rstd and mean (2 pt)."""
    n, concepts, pt = h.shape
    xhat, edges, rstd = saved.split([n * concepts * pt, n * concepts * concepts, 2 * pt])
    return xhat, edges, rstd


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
    saved = h.new_empty((N * C * pt + N * C * C + 2 * pt,))
    xhat, edges_to, rstd = _split(saved, h)
    state, g, parts = h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty((2 * N * pt,))
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
        xhat,
        rstd,
        new_mean,
        new_var,
        N,
        **constants,
        EPS=eps,
        BATCH=batch,
        ROWS=rows_at_once(power_of_two(pt), N),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``concept_reason_backward``."""
    h, edge, weight = h.contiguous(), dense(edge), dense(weight)
    N, C, pt = h.shape
    xhat, edges_from, rstd = _split(saved, h)
    dh, masked, parts = h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty((2 * N * pt,))
    gradients = [h.new_empty((0,)) if w is None else w.new_empty(w.shape) for w in (edge, weight, bias)]
    to = [None if w is None else x for w, x in zip((edge, weight, bias), gradients, strict=True)]
    constants = _constants(h)
    launch(
        kernels.state_relu_backward,
        (N,),
        h.device,
        dstate.contiguous(),
        xhat,
        weight,
        dense(bias),
        masked,
        parts,
        **constants,
        num_warps=4,
    )
    c2, pt2 = power_of_two(C), power_of_two(pt)
    launch(
        kernels.reason_gradients,
        (C,),
        h.device,
        masked,
        xhat,
        h,
        edge,
        edges_from,
        parts,
        weight,
        rstd,
        dh,
        *to,
        N,
        **constants,
        EDGES=edges,
        BATCH=batch,
        BN=rows_at_once(c2 * pt2, max(N, 1)),
        ROWS=rows_at_once(pt2, max(N, 1)),
        num_warps=4,
    )
    return dh, *gradients
