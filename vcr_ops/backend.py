"""Which backend runs an op, and why.

A backend is named by the keyword ``backend=`` of a function or module, else by the context manager
:func:`use_backend`, else by the environment variable ``VCR_OPS_BACKEND`` (read when vcr_ops is imported). Where all of
them say "auto" or nothing, the device decides: the C++ ops for CPU tensors; for CUDA tensors Triton's or CUDA C++'s,
whichever was measured to be the faster (:mod:`vcr_ops.faster`), and Triton's before that; Triton's for ROCm tensors;
``composite`` elsewhere. :func:`resolve` is the only place where that happens. A backend that was asked for by name and
can't run raises, and "auto" never falls back because something is missing or fails: on a GPU without Triton it raises,
too, and says what to do. (The CUDA library is optional: where it isn't built for a GPU, there is nothing to choose.)
"""

import importlib.util
import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import library
from .faster import UNMEASURED, Size, arch_of, faster, size_of

ENVIRONMENT = os.environ.get("VCR_OPS_BACKEND", "")
# Triton's own switch, as Triton reads it: kernels run as Python, on tensors of any device.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class Case(NamedTuple):
    """What a backend's ability depends on.

    ``device``: a device type, as "cpu". ``tracing``: "" or what is rewriting the op, as :func:`tracing`
    says. ``number``: which device of its type. ``fake``: the tensors have no memory, so nothing will run. ``size``: of
    the map, where a GPU's backends are to be compared.
    """

    device: str
    tracing: str = ""
    number: int = 0
    fake: bool = False
    size: Size | None = None


@dataclass(frozen=True)
class Backend:
    """One way to run every op.

    ``devices``: device types, empty for any. ``why_not``: why a case can't run and what would help, None if it can.
    """

    name: str
    devices: tuple[str, ...]
    what: str
    why_not: Callable[[Case], str | None]


def _cpp_why_not(case: Case) -> str | None:
    if case.device not in ("cpu", "meta"):
        return f"its kernels are for CPU tensors, and these are on {case.device!r}; use backend='composite'"
    if case.tracing:
        return f"{case.tracing} can't look into the C++ ops; use backend='composite'"
    return library.why_not()


def _composite_why_not(case: Case) -> str | None:
    return None


def _triton_why_not(case: Case) -> str | None:
    if case.tracing:
        return f"{case.tracing} can't look into the Triton kernels; use backend='composite'"
    if case.device not in ("cuda", "meta") and not (INTERPRETED and case.device == "cpu"):
        text = f"its kernels are for CUDA and ROCm tensors, and these are on {case.device!r}; use backend="
        return f"{text}'cpp', or set TRITON_INTERPRET=1 to debug" if case.device == "cpu" else f"{text}'composite'"
    # The op library has the schemas, and the sizes of what the ops return are known without Triton.
    return library.why_not() or (None if case.fake or case.device == "meta" else _no_triton(case.device, case.number))


def _cuda_why_not(case: Case) -> str | None:
    if case.tracing:
        return f"{case.tracing} can't look into the CUDA kernels; use backend='composite'"
    if case.device not in ("cuda", "meta"):
        other = "cpp" if case.device == "cpu" else "composite"
        return f"its kernels are for CUDA tensors, and these are on {case.device!r}; use backend={other!r}"
    if torch.version.hip:
        return "its kernels are for CUDA, and this PyTorch is built for ROCm; use backend='triton'"
    if case.fake or case.device == "meta":
        return library.why_not()
    return library.cuda_why_not() or _not_built_for(case.number)


_built_for: dict[int, str | None] = {}


def _not_built_for(number: int) -> str | None:
    """Why the CUDA kernels don't run on a device: compiled for other architectures."""
    if number not in _built_for:
        _built_for[number] = _look_at_archs(number)
    return _built_for[number]


def _look_at_archs(number: int) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU here; look at what nvidia-smi says, or use backend='composite'"
    major, minor = torch.cuda.get_device_capability(number)
    archs = library.cuda_archs()
    if runs_on(archs, major, minor):
        return None
    return (
        f"its kernels are compiled for {', '.join(archs)}, and cuda:{number} is {major}.{minor}; build it again with "
        f"TORCH_CUDA_ARCH_LIST={major}.{minor}, or use backend='triton'"
    )


def runs_on(archs: list[str], major: int, minor: int) -> bool:
    """True where code for ``archs`` (as in ``TORCH_CUDA_ARCH_LIST``) runs on a compute capability.

    Machine code runs within its major version from its minor one on (on its own alone where it ends in a or f); PTX on
    all that is later.
    """
    for arch in archs:
        number = arch.removesuffix("+PTX")
        built = tuple(int(part) for part in number.rstrip("af").split("."))
        if number[-1] in "af":
            if built == (major, minor):
                return True
        elif (built[0] == major and built[1] <= minor) or (arch.endswith("+PTX") and built <= (major, minor)):
            return True
    return False


_not_built_for._dynamo_marked_constant = True  # type: ignore[attr-defined]
_checked: dict[tuple[str, int], str | None] = {}


def _no_triton(device: str, number: int) -> str | None:
    """What keeps Triton kernels from running on a device, and what would help."""
    if (device, number) not in _checked:
        _checked[device, number] = _look_for_triton(device, number)
    return _checked[device, number]


# What torch.compiler.assume_constant_result does, without importing the compiler.
_no_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _look_for_triton(device: str, number: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton isn't installed; `pip install 'triton>=3.6'`, or use backend='composite'"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return (
            "PyTorch finds no GPU here; look at what nvidia-smi or rocm-smi says, or use backend='composite'"
            if built
            else f"this PyTorch ({torch.__version__}) is built without CUDA or ROCm; install one that has it"
        )
    if torch.version.hip:
        name = torch.cuda.get_device_properties(number).gcnArchName.split(":")[0]
        supported = name in ("gfx90a", "gfx942", "gfx950")
    else:
        major, minor = torch.cuda.get_device_capability(number)
        name, supported = f"sm_{major}{minor}", major >= 8
    if not supported:
        return (
            "its kernels are for compute capability 8.0 and later (sm_80) and for AMD's gfx90a, gfx942 and gfx950, and "
            f"{device}:{number} is {name}; use backend='composite'"
        )
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpp", ("cpu",), "fused C++ kernels, the fewest passes over the map", _cpp_why_not),
        Backend("triton", ("cuda",), "fused Triton kernels, the fewest passes over the map", _triton_why_not),
        Backend("cuda", ("cuda",), "fused CUDA C++ kernels, the fewest passes over the map", _cuda_why_not),
        Backend("composite", (), "the folded algebra in PyTorch ops, differentiable twice", _composite_why_not),
    )
}
NAMES = ("auto", *BACKENDS)
_CPP, _TRITON, _CUDA, _COMPOSITE = BACKENDS.values()


class _Context(threading.local):
    name = ""


_context = _Context()


def check_backend(name: object, argument: str = "backend") -> None:
    """Raise ValueError unless ``name`` names a backend or is "auto"."""
    if name not in NAMES:
        raise ValueError(f"{argument} is {name!r}; it takes one of {', '.join(map(repr, NAMES))}")


class use_backend(ContextDecorator):
    """Context manager: run the ops of this thread on a backend, where the keyword ``backend`` doesn't name another.

    Args:
        name: "cpp", "triton", "cuda", "composite", or "auto" for the device's own, also within another ``use_backend``.
    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        check_backend(name, "name")
        self.name = name
        self.before: list[str] = []

    def __enter__(self) -> None:
        self.before.append(_context.name)
        _context.name = self.name

    def __exit__(self, *_: object) -> None:
        _context.name = self.before.pop()


def tracing() -> str:
    """What is rewriting the ops that are called now: "", "torch.func", "forward-mode AD" or "ONNX export"."""
    if torch.compiler.is_compiling():
        return "ONNX export" if _in_onnx_export() else ""
    return _tracing_eagerly()


def _tracing_eagerly() -> str:
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode AD"
    # torch.onnx.export(dynamo=False) traces eager mode; its own question costs more than the tracer's.
    return "ONNX export" if torch._C._get_tracing_state() is not None and _in_onnx_export() else ""


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo takes torch's own to be False


_CPU = Case("cpu")


def case_of(z: Tensor, is_map: bool = True) -> Case:
    """The case of an op on ``z`` that is called now. is_map: its size is one that backends were compared at."""
    rewriting = tracing()
    if z.is_cpu and not rewriting:
        return _CPU  # the hot path makes no objects
    fake = _is_fake(z)
    # A compiled call makes the choice when it runs (ops/dispatch.py): sizes may be symbols here.
    known = is_map and z.is_cuda and not fake and not torch.compiler.is_compiling()
    size = size_of(z, torch.is_grad_enabled()) if known else None
    return Case(z.device.type, rewriting, z.device.index or 0, fake, size)


def takes_cpp(requested: str | None, z: Tensor) -> bool:
    """True where :func:`resolve` gives "cpp" for an op on ``z`` that is called now, and nothing looks on.

    The hot path's short cut; not for a compiler to trace.
    """
    if type(z) is not Tensor and type(z) is not Parameter:
        return False
    if requested is None or requested == "auto":
        requested = _context.name or ENVIRONMENT
        if requested and requested != "auto" and requested != "cpp":
            return False
    elif requested != "cpp":
        return False
    return z.is_cpu and library.has_library() and not torch._C._len_torch_dispatch_stack() and not _tracing_eagerly()


def _is_fake(z: Tensor) -> bool:
    # A compiler's own tensors stand for real ones.
    if type(z) is Tensor or type(z) is Parameter or torch.compiler.is_compiling():
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(z, FakeTensor)


def choose(requested: str | None, case: Case) -> tuple[Backend, str]:
    """The backend for a case, able to run it or not, and the reason for the choice."""
    if requested is not None and requested != "auto":
        check_backend(requested)
        return BACKENDS[requested], "the keyword backend names it"
    if _context.name:
        if _context.name != "auto":
            return BACKENDS[_context.name], "use_backend names it"
    elif ENVIRONMENT and ENVIRONMENT != "auto":
        check_backend(ENVIRONMENT, "the environment variable VCR_OPS_BACKEND")
        return BACKENDS[ENVIRONMENT], "the environment variable VCR_OPS_BACKEND names it"
    if case.device not in ("cpu", "cuda"):
        return _COMPOSITE, f"auto takes it on {case.device!r}, which has no kernels of its own"
    if case.tracing:
        return _COMPOSITE, f"auto takes it under {case.tracing}, which can't look into the fused ops"
    if case.device == "cuda":
        if case.size is None or torch.version.hip:
            return _TRITON, "auto takes it for CUDA and ROCm tensors"
        return fastest(case.number, case.size)
    return _CPP, "auto takes it for CPU tensors"


def fastest(number: int, size: Size) -> tuple[Backend, str]:
    """The backend that "auto" takes for CUDA tensors, and why: the faster of those that are there."""
    arch = arch_of(number)
    name = faster(arch, size)
    if name is None:
        why = f"auto takes it for CUDA tensors: on {arch} no other was measured at such sizes"
        return BACKENDS[UNMEASURED], why
    if name == "cuda":
        missing = library.cuda_why_not() or _not_built_for(number)
        if missing is not None:
            why = (
                f"auto takes it: CUDA C++ was measured to be faster at such sizes on {arch}, but isn't there: {missing}"
            )
            return _TRITON, why
    return BACKENDS[name], f"auto takes it: the fastest at the nearest size that was measured on {arch}"


def named() -> str:
    """The backend that the context or the environment names, or ""."""
    name = _context.name or ENVIRONMENT
    return "" if name == "auto" else name


def resolve(requested: str | None, case: Case) -> Backend:
    """The backend that runs a case: the one place where keyword, context, environment and device meet.

    Raises:
        ValueError: an unknown name. RuntimeError: the backend can't run this case; says why and what to do.
    """
    backend, reason = choose(requested, case)
    why_not = backend.why_not(case)
    if why_not is not None:
        raise RuntimeError(f"backend {backend.name!r} can't run here ({reason}): {why_not}")
    return backend
