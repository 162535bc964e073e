"""What a result must say about where it comes from."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from .timing import last_level_cache_bytes

ROOT = Path(__file__).resolve().parent.parent


def _field(path: str, name: str) -> str | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.split(":")[0].strip() == name:
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _product() -> dict[str, Any]:
    """Version and instruction sets of vcr_ops, as far as it is there."""
    found: dict[str, Any] = {"vcr_ops": None, "active_isa": None, "build": None}
    try:
        import vcr_ops

        found["vcr_ops"] = getattr(vcr_ops, "__version__", None)
        found["active_isa"] = torch.ops.vcr_ops.active_isa()
        built = importlib.import_module("vcr_ops._C").build_info()
        found["build"] = {key: str(value) for key, value in built.items() if key != "variants"}
    except (ImportError, AttributeError, RuntimeError) as error:
        found["missing"] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return found


def describe(argv: list[str]) -> dict[str, Any]:
    """Machine, versions, commit and command, for the results file.

    The load average tells a quiet machine from a busy one: at the start it should be well below the number of cores.
    """
    commit = _git("rev-parse", "HEAD")
    memory = _field("/proc/meminfo", "MemTotal")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "machine": {
            "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "architecture": platform.machine(),
            "cores": cores(),
            "last_level_cache_mib": last_level_cache_bytes() / 2**20,
            "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
            "system": platform.platform(),
            "load_at_start": _load(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            **_product(),
        },
        "threads": torch.get_num_threads(),
        "environment": {
            name: os.environ[name] for name in sorted(os.environ) if name.startswith(("VCR_OPS_", "OMP_", "MKL_NUM"))
        },
    }
