"""The op libraries ``_ops.so`` (C++) and ``_cuda.so`` (CUDA): loads them, and says what to do where they can't be had.

``import vcr_ops`` works without the libraries (the composite backend needs none). The CUDA kernels are loaded where
PyTorch is built for CUDA; that needs no GPU and no driver.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

PATH = Path(__file__).with_name("_ops.so")
CUDA_PATH = Path(__file__).with_name("_cuda.so")
OPS = tuple(
    op + suffix
    for op in ("concept_sample", "concept_reason", "concept_modulate", "vcr_middle")
    for suffix in ("", "_backward")
)
# The middle's passes one by one, for statistics over several processes; the CPU's alone.
STEPS = tuple(
    f"vcr_middle_{name}"
    for name in ("stats", "states", "modulate", "backward_sums", "backward_states", "backward_input")
)
# The middle with given statistics and nothing but the map returned; the CPU's alone.
INFER = ("vcr_middle_infer",)
# What stands around the middle; the CPU's alone.
AROUND = ("norm_relu", "norm_relu_", "batch_norm_relu", "batch_norm_relu_backward", "move_running_stats")
ISA_VARIABLE = "VCR_OPS_ISA"
_REBUILD = "build it with `pip install --no-build-isolation .` (or `python setup.py build_ext --inplace` in a checkout)"

_registrations: list[Callable[[], None]] = []
_loaded = False
_problem: str | None = None
_cuda_loaded = False
_cuda_problem: str | None = "the C++ ops, which have the schemas, aren't loaded"


def has_library() -> bool:
    """True where the C++ ops are loaded."""
    return _loaded


def why_not() -> str | None:
    """None where the C++ ops are loaded, else what is wrong and what to do. Looks again for a library built since."""
    if _loaded:
        return None
    load()
    return _problem


def has_cuda() -> bool:
    """True where the CUDA kernels are loaded."""
    return _cuda_loaded


def cuda_why_not() -> str | None:
    """None where the CUDA kernels are loaded, else what is wrong and what to do."""
    return why_not() or _cuda_problem


def cuda_archs() -> list[str]:
    """The GPUs that the CUDA kernels were compiled for, as in ``TORCH_CUDA_ARCH_LIST``: ["8.0", "10.0+PTX"]."""
    from . import _C  # type: ignore[attr-defined]

    return list(_C.build_info()["cuda_archs"])


def on_load(register: Callable[[], None]) -> Callable[[], None]:
    """Decorator: call ``register`` once, as soon as the library is loaded (it needs the ops' schemas)."""
    _registrations.append(register)
    if _loaded:
        register()
    return register


def load() -> None:
    """Load the library, if it is there.

    Raises:
        RuntimeError: ``VCR_OPS_ISA`` names a level that is unknown, or that this build or machine doesn't have.
    """
    global _loaded, _problem
    if _loaded:
        return
    if not PATH.is_file():
        _problem = f"the C++ ops aren't built ({PATH} is missing); {_REBUILD}"
        return
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        _problem = f"{PATH} doesn't load under torch {torch.__version__} ({error}); {_REBUILD}"
        return
    missing = [op for op in (*OPS, *STEPS, *INFER, *AROUND) if not hasattr(torch.ops.vcr_ops, op)]
    if missing:
        _problem = f"{PATH} is of another version (it has no {', '.join(missing)}); {_REBUILD}"
        return
    check_isa()
    _loaded, _problem = True, None
    _load_cuda()
    for register in _registrations:
        register()


def _load_cuda() -> None:
    global _cuda_loaded, _cuda_problem
    if not torch.backends.cuda.is_built() or torch.version.hip:
        _cuda_problem = f"this PyTorch ({torch.__version__}) is built without CUDA; install one that has it"
    elif not CUDA_PATH.is_file():
        _cuda_problem = (
            f"its kernels aren't built ({CUDA_PATH} is missing); install nvcc and build with "
            "`VCR_OPS_CUDA=1 pip install --no-build-isolation .`"
        )
    else:
        try:
            torch.ops.load_library(str(CUDA_PATH))
        except OSError as error:
            _cuda_problem = f"{CUDA_PATH} doesn't load ({error}); {_REBUILD}"
        else:
            _cuda_loaded, _cuda_problem = True, None


def isa_levels() -> list[str]:
    """The instruction-set levels that were built in and that this machine can run."""
    return [level for level in torch.ops.vcr_ops.isa_levels().split(",") if level]


def active_isa() -> str:
    """The instruction-set level in use."""
    return torch.ops.vcr_ops.active_isa()


def check_isa() -> None:
    """Raise RuntimeError where ``VCR_OPS_ISA`` asks for a level that can't be had."""
    asked = os.environ.get(ISA_VARIABLE)
    if asked:
        levels = isa_levels()
        if asked not in levels:
            raise RuntimeError(
                f"{ISA_VARIABLE} is {asked!r}; this build on this machine takes one of {', '.join(levels)}"
            )
