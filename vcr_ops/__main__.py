"""``python -m vcr_ops``: the environment report that a bug report needs."""

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import torch

from . import __version__, backend, library

VARIABLES = (
    "VCR_OPS_BACKEND",
    "VCR_OPS_ISA",
    "VCR_OPS_PROFILE",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
)


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(("model name", "Model")))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _built() -> Iterator[tuple[str, str]]:
    try:
        _C = importlib.import_module("vcr_ops._C")
    except ImportError as error:
        yield "build", f"vcr_ops._C can't be imported ({error})"
    else:
        info = _C.build_info()
        yield "built with", f"{info['compiler']}, torch {info['torch']}"
        yield "built for", ", ".join(info["isa_levels"]) + f"; CUDA: {', '.join(info['cuda_archs']) or 'none'}"
    why_not = library.why_not()
    if why_not is None:
        yield "instruction set", f"{library.active_isa()} (this machine runs {', '.join(library.isa_levels())})"
    else:
        yield "C++ ops", f"not loaded: {why_not}"


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")  # without importing it
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> Iterator[tuple[str, str]]:
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        arch = gpu.gcnArchName if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"
        size = f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.0f} GiB"
        yield f"GPU {number}", f"{gpu.name}, {arch}, {size}"


def report() -> str:
    """The report, one line each: versions, what was built, machine, environment variables, backends."""
    devices = ["cpu"] + [name for name in ("cuda", "mps", "xpu") if getattr(torch, name).is_available()]
    rows = [
        ("vcr_ops", f"{__version__} in {os.path.dirname(__file__)}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("python", f"{sys.version.split()[0]} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("cpu", f"{_cpu()}, {_cores()} usable cores, torch uses {torch.get_num_threads()} threads"),
        ("torch's vectors", torch.backends.cpu.get_cpu_capability()),
        *_built(),
        ("triton", _triton() + (" (its interpreter is on)" if backend.INTERPRETED else "")),
        *_gpus(),
        ("devices", ", ".join(devices)),
        ("environment", ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "none"),
    ]
    for device in devices:
        case = backend.Case(device)
        rows += [
            (f"{each.name} on {device}", each.why_not(case) or f"can run: {each.what}")
            for each in backend.BACKENDS.values()
        ]
        try:
            rows.append((f"auto on {device}", backend.choose("auto", case)[0].name))
        except ValueError as error:
            rows.append((f"auto on {device}", str(error)))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in rows)


if __name__ == "__main__":
    print(report())
