"""Which backend runs an op, and why.

A backend is named by the keyword ``backend=`` of a function or module, else by the context manager
:func:`use_backend`, else by the environment variable ``VCR_OPS_BACKEND`` (read when vcr_ops is imported). Where all of
them say "auto" or nothing, the device decides: the C++ ops for CPU tensors, ``composite`` elsewhere.
:func:`resolve` is the only place where that happens. A backend that was asked for by name and can't run raises, and
"auto" never falls back because something is missing or fails.
"""

import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import library

ENVIRONMENT = os.environ.get("VCR_OPS_BACKEND", "")


class Case(NamedTuple):
    """What a backend's ability depends on.

    ``device``: a device type, as "cpu". ``tracing``: "" or what is rewriting the op, as :func:`tracing`
    says.
    """

    device: str
    tracing: str = ""


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


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpp", ("cpu",), "fused C++ kernels, the fewest passes over the map", _cpp_why_not),
        Backend("composite", (), "the folded algebra in PyTorch ops, differentiable twice", _composite_why_not),
    )
}
NAMES = ("auto", *BACKENDS)
_CPP, _COMPOSITE = BACKENDS["cpp"], BACKENDS["composite"]


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
        name: "cpp", "composite", or "auto" for the device's own, also within another ``use_backend``.
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
        return "ONNX export" if torch.onnx.is_in_onnx_export() else ""
    if torch._C._are_functorch_transforms_active():
        return "torch.func"
    return "forward-mode AD" if forward_ad._current_level >= 0 else ""


_CPU = Case("cpu")


def case_of(z: Tensor) -> Case:
    """The case of an op on ``z`` that is called now."""
    rewriting = tracing()
    if z.is_cpu and not rewriting:
        return _CPU  # the hot path makes no objects
    return Case(z.device.type, rewriting)


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
    if case.device != "cpu":
        return _COMPOSITE, f"auto takes it on {case.device!r}, which has no kernels of its own"
    if case.tracing:
        return _COMPOSITE, f"auto takes it under {case.tracing}, which can't look into the C++ ops"
    return _CPP, "auto takes it for CPU tensors"


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
