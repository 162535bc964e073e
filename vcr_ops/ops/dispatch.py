"""What the ops share on their way from Python to the kernels."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import library
from ..backend import INTERPRETED, fastest, named, use_backend
from ..faster import size_of
from ..maps import acc_dtype

OpOverload = Any  # torch types its overloads as functions of anything
Function = Callable[..., Any]

# The backends behind a dispatch key. A key holds one function, so where there are several this is where they meet: it
# takes the one that use_backend or the environment names, else the first, or on a GPU the faster. (A compiled call has
# lost its keyword by then.) The interpreter's tensors are on the CPU, where the C++ kernels come first.
_SERVED = {"CUDA": ("triton", "cuda")} | ({"CPU": ("cpp", "triton")} if INTERPRETED else {})
_LIBRARY = torch.library.Library("vcr_ops", "IMPL")
_functions: dict[tuple[OpOverload, str], Function] = {}


def function_of(op: OpOverload, backend: str) -> Function:
    """The Python function that runs an op: forward or backward of ``vcr_ops/ops/<op>/<backend>.py``, or a library's."""
    function = _functions.get((op, backend))
    if function is None:  # the first call imports what the backend needs
        if backend == "cuda":
            raise RuntimeError(f"backend 'cuda' can't run here: {library.cuda_why_not()}")
        name = op._schema.name.removeprefix("vcr_ops::")
        module = importlib.import_module(f".{name.removesuffix('_backward')}.{backend}", __package__)
        function = module.backward if name.endswith("_backward") else module.forward
        _functions[op, backend] = function
    return function


def _serve(op: OpOverload, key: str, backends: tuple[str, ...]) -> Function:
    arguments = [argument.name for argument in op._schema.arguments]
    # What "auto" goes by: the map (concept_reason has none, and no choice), and whether a backward pass follows. Both
    # directions must find the same backend, which alone can read what the other has saved.
    which = next((arguments.index(name) for name in ("y", "z") if name in arguments), None)
    save = arguments.index("save") if "save" in arguments else None

    def kernel(*args: Any) -> Any:
        name = named()
        if name not in backends:
            name = backends[0]
            if key == "CUDA" and which is not None and not torch.version.hip:
                y = args[which]
                name = fastest(y.device.index, size_of(y, save is None or args[save]))[0].name
        return function_of(op, name)(*args)

    return kernel


def _keep_library_s(op: OpOverload, key: str, backend: str) -> None:
    """Remember a library's function for a dispatch key, which the chooser is about to cover."""
    kernel = torch.library.get_kernel(op, key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    _functions[op, backend] = functools.partial(kernel.call_boxed, keys)


def _register_python(op: OpOverload) -> None:
    if INTERPRETED:
        _keep_library_s(op, "CPU", "cpp")
    if library.has_cuda():
        _keep_library_s(op, "CUDA", "cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # it knows that it overrides
        for key, backends in _SERVED.items():
            _LIBRARY.impl(op, _serve(op, key, backends), key, allow_override=True)


def as_run_by(backend: str, op: OpOverload, x: Tensor) -> Function:
    """An op as another backend than "cpp" runs it on ``x``: straight its Python function, past the dispatcher.

    Where something looks on (fake tensors, a FLOP counter), it goes through the dispatcher.
    """
    watched = torch._C._len_torch_dispatch_stack() or (type(x) is not Tensor and type(x) is not Parameter) or x.is_meta
    return functools.partial(_dispatch, backend, op) if watched else function_of(op, backend)


def _dispatch(backend: str, op: OpOverload, *args: Any) -> Any:
    with use_backend(backend):
        return op(*args)


def exporting() -> bool:
    """True while torch.export traces: what is exported is for inference."""
    return torch.compiler._is_exporting_flag  # is_exporting() is True in all that Dynamo traces, in torch 2.10


def needs_grad(*tensors: Tensor | None) -> bool:
    """True where autograd is on and has something to follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def call(backend: str, op: OpOverload, *args: Any) -> Any:
    """Call a registered op past its autograd formula, which the surrounding autograd.Function replaces.

    For "cpp" that is the op itself, whatever its tensors' device.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    run = op if backend == "cpp" else as_run_by(backend, op, args[0])
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


def call_backward(backend: str, op: OpOverload, *args: Any) -> Any:
    """Call a backward op. With ``create_graph=True`` it keeps its formula, which says that it can't go on."""
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled():
        return _dispatch(backend, op, *args)
    run = op if backend == "cpp" else as_run_by(backend, op, args[0])
    with torch._C._AutoDispatchBelowAutograd():
        return run(*args)


def present(grad: Tensor, of: Tensor | None) -> Tensor | None:
    """A gradient, or None where there is nothing that it is of (the ops then return an empty tensor)."""
    return None if of is None else grad


def check_devices(op: str, *tensors: Tensor | None) -> None:
    """ValueError where fake tensors, which have no kernel that would notice, are on several devices."""
    devices = dict.fromkeys(str(tensor.device) for tensor in tensors if tensor is not None)
    if len(devices) > 1:
        raise ValueError(f"{op} takes tensors on one device; these are on {' and '.join(devices)}")


def like_parameter(w: Tensor | None, z: Tensor) -> Tensor:
    """Fake memory for a parameter's gradient; empty where there is no parameter."""
    if w is None:
        return z.new_empty((0,), dtype=acc_dtype(z.dtype))
    return w.new_empty(w.shape)


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    flops: Callable[..., int],
    flops_backward: Callable[..., int],
) -> tuple[OpOverload, OpOverload]:
    """Give the ops ``name`` and ``name_backward`` their fake kernels, autograd formulas and FLOP counts."""
    from torch.utils.flop_counter import register_flop_formula

    qualified = f"vcr_ops::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_fake(f"{qualified}_backward", fake_backward)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)

    def no_double_backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{name}: the fused kernels have no double backward; use backend='composite', which is differentiable twice"
        )

    torch.library.register_autograd(f"{qualified}_backward", no_double_backward)
    forward_op, backward_op = getattr(torch.ops.vcr_ops, name), getattr(torch.ops.vcr_ops, f"{name}_backward")
    register_flop_formula(forward_op)(flops)
    register_flop_formula(backward_op)(flops_backward)
    for op in (forward_op.default, backward_op.default):
        _register_python(op)
    return forward_op.default, backward_op.default


def unsaved(name: str) -> RuntimeError:
    """The error of a gradient asked of an op that was called for inference."""
    return RuntimeError(f"vcr_ops::{name} was called with save=False, which keeps nothing for a backward pass")
