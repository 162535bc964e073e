"""The shipped configurations of the Triton kernels: tile sizes and warps, by kernel, shape and architecture.

They stand in ``configs.json``, an ordered list of rules. A rule is an object with conditions and a ``config``:

    kernel    the kernel's name, or a list of names
    layout    "contiguous" or "channels_last"
    arch      an architecture, or a list of them: "sm_90", "gfx942", "interpreter"
    p, S, N   [lowest, highest], both included; null is no bound
    itemsize  bytes of a feature, or a list of them
    config    BS: positions per tile. CB: concepts per tile. num_warps, num_stages. splits: how many programs share the
              positions of an image (of a sampler in evaluation: none). maxnreg, for NVIDIA alone, need not be there: as
              many registers as a thread may take. Without it the assembler may spill to let more programs run

A condition that is missing holds for everything, and the first rule whose conditions all hold gives its ``config``. The
last one has no conditions. ``python -m benchmarks tune`` measures on the GPU at hand and puts rules for it in front.

Nothing is measured at run time: a launch never waits for a tuner. A CUDA graph can be captured after one call of the
same shapes, N included, which compiles and loads the kernels.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("configs.json")
# What these give an image in evaluation must not depend on its batch, so rules with an ``N`` don't hold for them.
BATCH_FREE = ("concept_sample_inference", "concept_modulate")
# A100, H100 and H200, B200, MI300X
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 4}
FIELDS, OPTIONAL = ("BS", "CB", "num_warps", "num_stages", "splits"), ("maxnreg",)
Rule = dict[str, Any]

_pretended: list[str] = []
_forced: list[Rule] = []  # the latest first


@functools.cache
def rules() -> list[Rule]:
    """The table."""
    return json.loads(PATH.read_text())


def write(table: list[Rule], path: Path = PATH) -> None:
    """Replace the table, one rule a line, and use it from now on.

    Raises:
        ValueError: a rule has an unknown field or lacks one, or the last rule has a condition.
    """
    check(table)
    path.write_text("[\n" + ",\n".join(json.dumps(rule) for rule in table) + "\n]\n")
    if path == PATH:
        rules.cache_clear()
        config.cache_clear()


def check(table: list[Rule]) -> None:
    """Raise ValueError unless the table is one that :func:`config` can use."""
    known = {"kernel", "layout", "arch", "p", "S", "N", "itemsize", "config"}
    for i, rule in enumerate(table):
        if unknown := rule.keys() - known:
            raise ValueError(f"rule {i} has an unknown field, {min(unknown)!r}; it takes {', '.join(sorted(known))}")
        if missing := set(FIELDS) ^ (rule.get("config", {}).keys() - set(OPTIONAL)):
            raise ValueError(f"rule {i}: config must have exactly {', '.join(FIELDS)}; look at {min(missing)!r}")
    if not table or table[-1].keys() != {"config"}:
        raise ValueError("the last rule must hold for everything: it takes a config and no conditions")


def _holds(rule: Rule, names: dict[str, str | int], sizes: dict[str, int]) -> bool:
    if "N" in rule and names["kernel"] in BATCH_FREE:
        return False
    for field, value in names.items():
        allowed = rule.get(field, value)
        if value not in (allowed if isinstance(allowed, list) else [allowed]):
            return False
    for field, size in sizes.items():
        low, high = rule.get(field, (None, None))
        if (low is not None and size < low) or (high is not None and size > high):
            return False
    return True


@functools.lru_cache(maxsize=4096)
def config(kernel: str, *, layout: str, p: int, S: int, N: int, itemsize: int, arch: str) -> dict[str, int]:
    """The configuration of a kernel: BS, CB, num_warps, num_stages, splits. The caller must not change it.

    Args:
        kernel: its name. layout: "contiguous" or "channels_last". p, S, N: channels of a concept, positions, images.
        itemsize: bytes of a feature. arch: as :func:`arch` gives it.
    """
    names: dict[str, str | int] = {"kernel": kernel, "layout": layout, "arch": arch, "itemsize": itemsize}
    sizes = {"p": p, "S": S, "N": N}
    return next(rule["config"] for rule in (*_forced, *rules()) if _holds(rule, names, sizes))


def arch(device: torch.device) -> str:
    """The architecture that kernels on ``device`` are for: "sm_90", "gfx942", or "interpreter"."""
    return _pretended[-1] if _pretended else _arch(device)


@functools.cache
def _arch(device: torch.device) -> str:
    from .launch import INTERPRETED

    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(device: torch.device) -> int:
    """How many the device has; of a device that isn't here, those of the architecture's largest common GPU."""
    return MULTIPROCESSORS[_pretended[-1]] if _pretended else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    from .launch import INTERPRETED

    return (
        MULTIPROCESSORS["interpreter"]
        if INTERPRETED
        else torch.cuda.get_device_properties(device).multi_processor_count
    )


@contextmanager
def pretend(name: str) -> Iterator[None]:
    """Give this architecture as the device's, for compiling ahead of time."""
    _pretended.append(name)
    try:
        yield
    finally:
        _pretended.pop()


@contextmanager
def force(kernel: str, found: dict[str, int]) -> Iterator[None]:
    """Give this configuration for a kernel, whatever the table says: for timing and comparing them."""
    rule: Rule = {"kernel": kernel, "config": found}
    check([rule, {"config": found}])
    _forced.insert(0, rule)
    config.cache_clear()
    try:
        yield
    finally:
        _forced.remove(rule)
        config.cache_clear()
