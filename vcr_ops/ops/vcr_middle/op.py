"""The whole middle as one op: batch norm, sampler, reasoner and modulator; the public function and the hot path."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks, flops
from ...backend import case_of, resolve, takes_cpp
from ...library import on_load
from ...maps import acc_dtype, empty_map_like
from ..dispatch import (
    OpOverload,
    as_run_by,
    call_backward,
    check_devices,
    exporting,
    like_parameter,
    needs_grad,
    register,
    unsaved,
)
from . import composite
from .arguments import by_name, learned_of
from .kept import saved_size

_forward: OpOverload = None
_infer: OpOverload = None
_backward: OpOverload = None

Statistics = tuple[Tensor | None, Tensor | None, Tensor, Tensor]


class MiddleOutput(NamedTuple):
    """out (y's shape), and the statistics that the two batch norms used: (C*p) and (pt)."""

    out: Tensor
    norm_mean: Tensor | None
    norm_var: Tensor | None
    state_mean: Tensor
    state_var: Tensor


def visual_concept_reasoning(
    y: Tensor,
    value: Tensor,
    scale_bias: Tensor,
    shift_bias: Tensor,
    *,
    norm: str = "batch",
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    query: Tensor | None = None,
    key: Tensor | None = None,
    logit: Tensor | None = None,
    edge: Tensor | None = None,
    state_mean: Tensor | None = None,
    state_var: Tensor | None = None,
    state_weight: Tensor | None = None,
    state_bias: Tensor | None = None,
    state_eps: float = 1e-5,
    scale_weight: Tensor | None = None,
    shift_weight: Tensor | None = None,
    sampler: str = "dynamic",
    edges: str = "dynamic",
    modulation: str = "channel",
    backend: str | None = None,
) -> MiddleOutput:
    """A block's middle in one op: z = BN(y), then attend, interact and modulate (paper, Eq. 1 to 3 and after).

    ``concept_modulate(z, concept_reason(concept_sample(z)).state)``, but z is never written to memory.

    Args:
        y: (N, C*p, *spatial), concept-major channels; float32, float64, bfloat16 (float16 not on the CPU). Contiguous
            and channels_last maps, and slices of them, are read in place; other strides are copied once.
        norm: "batch" normalises with this batch's statistics, "given" with norm_mean and norm_var (C*p), "none": z = y.
        norm_weight, norm_bias: (C*p) or None (1 and 0). value, query, key: (C, p, pt). logit: (C, p).
        edge: (pt, C) or (C, C). state_mean, state_var: (pt), None: the batch's. state_weight, state_bias: (pt) or None.
        scale_weight, shift_weight: (C, pt, p) or None. scale_bias, shift_bias: (C, p). All in y's dtype or float32.
        sampler, edges, modulation: as in the single ops. backend: "auto", "cpp", "triton", "cuda"
            or "composite"; None is "auto".
    Returns:
        (out, norm_mean, norm_var, state_mean, state_var): out in y's shape, dtype and format; the statistics that were
        given, or the batch's with Bessel's correction in float32 (float64 for float64); norm_* are None for "none".
        No gradient flows into or out of the statistics.
    Raises:
        TypeError, ValueError: an argument doesn't fit; says which, what it got and what it takes.
        RuntimeError: the backend can't run here; says why and what to do.
    Cost: training 3 reads and 1 write of y forward, 4 reads and 1 write backward; evaluation 2 reads and 1 write (from
        memory 1 and 1, where the map of a concept or image stays in cache), but on Triton 3 reads where a dynamic
        sampler's concept has more than 16384 numbers an image.
    """
    _, (out, *statistics) = vcr_middle(
        backend,
        (
            y,
            norm_mean,
            norm_var,
            norm_weight,
            norm_bias,
            value,
            query,
            key,
            logit,
            edge,
            state_mean,
            state_var,
            state_weight,
            state_bias,
            scale_weight,
            shift_weight,
            scale_bias,
            shift_bias,
            norm,
            norm_eps,
            state_eps,
            sampler,
            edges,
            modulation,
        ),
        checked=False,
    )
    if norm == "given":
        statistics[:2] = norm_mean, norm_var
    elif norm == "none":
        statistics[:2] = None, None
    if state_mean is not None:
        statistics[2:] = state_mean, state_var
    return MiddleOutput(out, *statistics)


def vcr_middle(backend: str | None, arguments: tuple[Any, ...], *, checked: bool) -> tuple[str, tuple[Any, ...]]:
    """Run the middle on the arguments of the op's schema, less ``save``.

    Returns the name of the backend that ran, and (out, the four statistics of the batch).

    The statistics may be None where they were given.

    checked: the caller has seen to what costs much to look at here: the parameters' shapes, a batch with one value per
        channel, statistics that require grad. The fast path then looks at types only, and explains what the op refuses.
    """
    y = arguments[0]
    compiling = torch.compiler.is_compiling()
    if checked and not compiling and takes_cpp(backend, y):
        return "cpp", _run_cpp(arguments)
    if not checked or compiling:
        checks.check_vcr_middle(*arguments)
    elif not isinstance(y, Tensor):
        checks.check_map("y", y)
    name = resolve(backend, case_of(y)).name
    if name == "composite":
        if checked and not compiling:
            checks.check_vcr_middle(*arguments)
        return name, composite.vcr_middle(*arguments)
    dtype = y.dtype
    for argument in arguments[1:18]:
        if argument is not None and argument.dtype is not dtype and argument.dtype is not torch.float32:
            checks.check_vcr_middle(*arguments)  # only statistics may have any type
            acc = acc_dtype(dtype)
            arguments = tuple(_as(acc, x) if i in (1, 2, 10, 11) else x for i, x in enumerate(arguments))
            break
    training = torch.is_grad_enabled() and (y.requires_grad or needs_grad(*arguments[1:18]))
    if compiling:
        # The op's own autograd formula is traced as it is.
        return name, _forward(*arguments, training and not exporting())[:5]
    try:
        if training:
            statistics: list[Tensor] = []
            return name, (_apply(name, statistics, *arguments), *statistics)
        run = _forward if name == "cpp" else as_run_by(name, _forward, y)
        with torch._C._AutoDispatchBelowAutograd():
            return name, run(*arguments, False)[:5]
    except (RuntimeError, ValueError):
        checks.check_vcr_middle(*arguments)  # the op has refused its arguments: say it in the user's words
        raise


_NO_STATISTICS = (None,) * 4


def _run_cpp(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hot path: what of the arguments' types the other paths look at, the C++ op refuses or converts by itself."""
    try:
        if torch.is_grad_enabled() and (arguments[0].requires_grad or needs_grad(*arguments[1:18])):
            statistics: list[Tensor] = []
            return _apply("cpp", statistics, *arguments), *statistics
        with torch._C._AutoDispatchBelowAutograd():
            if arguments[18] == "batch" or arguments[10] is None:
                return _forward(*arguments, False)[:5]
            return _infer(*arguments), *_NO_STATISTICS
    except (RuntimeError, ValueError):
        checks.check_vcr_middle(*arguments)  # the op has refused its arguments: say it in the user's words
        raise


def _as(dtype: torch.dtype, x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(dtype)


class _Middle(torch.autograd.Function):
    """Puts the batch's statistics into a list, since every further output of a Function costs time."""

    @staticmethod
    def forward(ctx: Any, backend: str, statistics: list[Tensor], *arguments: Any) -> Any:
        run = _forward if backend == "cpp" else as_run_by(backend, _forward, arguments[0])
        with torch._C._AutoDispatchBelowAutograd():
            out, *statistics[:], saved = run(*arguments, True)
        ctx.backend = backend
        _keep(ctx, arguments, saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> Any:
        return None, None, *_gradients(ctx, grad_out)


# Past Function.apply's Python part, which looks for what torch.func leaves behind; the backend switch has seen to that.
_apply: Any = super(torch.autograd.Function, _Middle).apply


def _keep(ctx: Any, arguments: tuple[Any, ...], saved: Tensor) -> None:
    # y and the parameters; no statistics, which saved has.
    ctx.save_for_backward(arguments[0], *learned_of(arguments), saved)
    ctx.variant = (arguments[18], arguments[10] is None, *arguments[21:24])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 24
    tensors = ctx.saved_tensors
    _, norm_weight, norm_bias, _, query, key, logit, edge, weight, bias, scale_weight, shift_weight, _, _, _ = tensors
    (  # by name, which takes a fifth of a loop's time
        dy,
        dnorm_weight,
        dnorm_bias,
        dvalue,
        dquery,
        dkey,
        dlogit,
        dedge,
        dstate_weight,
        dstate_bias,
        dscale_weight,
        dshift_weight,
        dscale_bias,
        dshift_bias,
    ) = call_backward(ctx.backend, _backward, grad_out, *tensors, *ctx.variant)
    return (
        dy,
        None,
        None,
        None if norm_weight is None else dnorm_weight,
        None if norm_bias is None else dnorm_bias,
        dvalue,
        None if query is None else dquery,
        None if key is None else dkey,
        None if logit is None else dlogit,
        None if edge is None else dedge,
        None,
        None,
        None if weight is None else dstate_weight,
        None if bias is None else dstate_bias,
        None if scale_weight is None else dscale_weight,
        None if shift_weight is None else dshift_weight,
        dscale_bias,
        dshift_bias,
        *(None,) * 6,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _keep(ctx, inputs[:24], output[5])
    ctx.backend = "cpp"  # that is, the op, which goes by its tensors' device
    ctx.save = inputs[24]
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad_out: Any, *_: Any) -> Any:
    if not ctx.save:
        raise unsaved("vcr_middle")
    return *_gradients(ctx, grad_out), None


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    check_devices("vcr_middle", *arguments[:18])
    given, save = by_name(arguments), arguments[24]
    y, (concepts, p, pt) = given.y, given.learned.value.shape
    dtype = acc_dtype(y.dtype)
    statistics = concepts * p if given.variant.norm == "batch" else 0
    state_statistics = pt if given.state_mean is None else 0
    saved = saved_size(y.shape[0], concepts, p, pt, True) if save else 0
    sizes = (statistics, statistics, state_statistics, state_statistics, saved)
    return empty_map_like(y), *(y.new_empty((size,), dtype=dtype) for size in sizes)


def _fake_infer(*arguments: Any) -> Tensor:
    check_devices("vcr_middle_infer", *arguments[:18])
    return empty_map_like(arguments[0])


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("vcr_ops::vcr_middle_infer is for inference and has no backward; call vcr_middle")


def _fake_backward(grad_out: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    parameters, saved = rest[:13], rest[13]
    check_devices("vcr_middle_backward", grad_out, y, *parameters, saved)
    return empty_map_like(y), *(like_parameter(w, y) for w in parameters)


@on_load
def _register() -> None:
    global _forward, _backward, _infer
    from torch.utils.flop_counter import register_flop_formula

    _forward, _backward = register(
        "vcr_middle",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_op_backward,
        flops=flops.vcr_middle,
        flops_backward=flops.vcr_middle_backward,
    )
    torch.library.register_fake("vcr_ops::vcr_middle_infer", _fake_infer)
    torch.library.register_autograd("vcr_ops::vcr_middle_infer", _no_backward)
    register_flop_formula(torch.ops.vcr_ops.vcr_middle_infer)(flops.vcr_middle)
    _infer = torch.ops.vcr_ops.vcr_middle_infer.default
