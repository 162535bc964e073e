"""Compiles the kernels for GPUs that aren't here, and says what registers, spills and shared memory each takes.

    python -m vcr_ops.triton_common.aot [--arch sm_90 ...] [--every] [--jobs N]

What is compiled is what the ops launch at the paper's shapes (record.py), with Triton's own specialisation of the
arguments, so nothing here lists kernels by hand. Exits with 1 where a kernel spills registers or takes more shared
memory than the architecture has. Results are kept (``~/.cache/vcr_ops/triton_aot``) until a kernel, its arguments or
Triton changes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ..variants import AFFINES, EDGES
from . import record
from .launch import Launch
from .record import Problem

# What a program may have of shared memory (LDS), in bytes.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
ARCHS = tuple(SHARED_LIMIT)
STAGES = ((4, 56), (8, 28), (16, 14), (32, 7))  # p, height and width: the paper's, at 224 x 224
# At 640 x 640, as for detection; and what else the rules for evaluation tell apart.
LARGE = ((4, 160), (8, 80), (16, 40), (32, 20))
OTHER = {"contiguous": ((32, 24),), "channels_last": ((4, 16), (4, 28), (8, 40), (16, 28))}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last")
BATCHES = (256, 1, 1024)
LOOKS = (("dynamic", "channel"), ("dynamic", "pixel"), ("static", "pixel"), ("static", "channel"), ("pool", "channel"))


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture."""
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


@dataclasses.dataclass(frozen=True)
class Argument:
    """What Triton's specialisation sees of an argument: of a tensor, its type, its alignment and whether it is small.

    Of an int, the smallest one that is specialised alike.
    """

    dtype: torch.dtype | None
    value: Any = None
    aligned: bool = True
    small: bool = True

    # Triton asks a tensor these.
    def data_ptr(self) -> int:
        return 16 if self.aligned else 4

    def ptr_range(self) -> int:
        return 0 if self.small else 2**31


def argument(x: Any) -> Argument:
    """What is seen of ``x``."""
    if isinstance(x, Tensor):
        size = x.element_size()
        offset = x.storage_offset() * size
        return Argument(x.dtype, None, offset % 16 == 0, x.untyped_storage().nbytes() < 2**31)
    if isinstance(x, int) and not isinstance(x, bool) and x != 1:
        wide = abs(x) >= 2**31
        return Argument(None, (2**32 if wide else 0) + (16 if x % 16 == 0 else 3))
    return Argument(None, x)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel to be compiled, and the first problem in which it was met."""

    kernel: Any
    arguments: tuple[Argument, ...]
    options: tuple[tuple[str, Any], ...]
    arch: str
    problem: Problem = dataclasses.field(compare=False)

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> str:
        """Names what the compiler would make: a result may be kept by it."""
        text = repr((triton.__version__, self.kernel.cache_key, self.arguments, self.options, self.arch))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def config(self) -> str:
        """The options that a configuration makes."""
        names = ("BS", "CB", "num_warps", "num_stages", "SPLITS")
        return " ".join(f"{name.removeprefix('num_')}={x}" for name, x in self.options if name in names)


class Result(NamedTuple):
    """What a compiled kernel takes. registers and spills are per thread; spills and shared are in bytes."""

    registers: int
    spills: int
    shared: int
    error: str = ""

    def complaint(self, arch: str) -> str:
        """What is wrong with it, or ""."""
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes"
        limit = SHARED_LIMIT.get(arch)
        over = limit is not None and self.shared > limit
        return f"takes {self.shared} bytes of shared memory of {limit}" if over else ""


class _StandIn:
    """The driver of a GPU that isn't here: enough for Triton to compile for it."""

    def __init__(self, arch: str) -> None:
        self.target = target(arch)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_kernel(kernel: Kernel) -> Result:
    """Compile one kernel, and read what it takes from what the compilers say."""
    said = io.StringIO()
    before = driver._active
    driver.set_active(_StandIn(kernel.arch))
    args = [x if x.dtype is not None else x.value for x in kernel.arguments]
    kernel.kernel.device_caches.clear()
    try:
        with contextlib.redirect_stdout(said), knobs.compilation.scope(), knobs.nvidia.scope():
            # The assembler's words are what the numbers are read from: it must run, and they must be shown.
            knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
            compiled = kernel.kernel.run(*args, grid=(1,), warmup=True, enable_fp_fusion=False, **dict(kernel.options))
    except Exception as error:  # whatever the compiler raises, the table shall have all kernels
        return Result(0, 0, 0, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    finally:
        driver._active = before
    shared = compiled.metadata.shared
    if kernel.arch.startswith("sm_"):
        log = said.getvalue()
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
        return Result(int(re.findall(r"Used (\d+) registers", log)[-1]), spills, shared)
    text = compiled.asm["amdgcn"]

    def count(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    registers = count("vgpr_count")
    return Result(registers, 4 * count("vgpr_spill_count") or count("private_segment_fixed_size"), shared)


def problems() -> list[tuple[str, Problem]]:
    """All that the rules of ``configs.json`` depend on: each architecture with each stage and layout
    in training (the defaults with many images, and something else, in channels_last with one) and in evaluation (with
    larger maps, too); and with each layout op by op and step by step. In float64, for checks of gradients, each of them
    in one mode. And with each architecture a frozen norm of the states.

    What else there is to choose is chosen so that as many threes of choices as can meet.
    """
    places: list[tuple[Any, ...]] = []  # with the batches and types that are to choose from
    for arch, layout in itertools.product(ARCHS, LAYOUTS):
        batches = (1,) if layout == "channels_last" else BATCHES
        places += [(arch, layout, stage, "training", batches, DTYPES) for stage in STAGES]
        sizes = STAGES + LARGE + OTHER[layout]
        places += [(arch, layout, size, "evaluation", BATCHES, DTYPES) for size in sizes]
    for i, (mode, arch, layout) in enumerate(itertools.product(("single ops", "steps"), ARCHS, LAYOUTS)):
        places.append((arch, layout, STAGES[i % len(STAGES)], mode, BATCHES, DTYPES))
    modes = ("training", "evaluation", "evaluation", "single ops", "evaluation", "evaluation", "evaluation")
    for i, (stage, layout, arch) in enumerate(itertools.product(STAGES, LAYOUTS, ARCHS)):
        places.append((arch, layout, stage, modes[i % len(modes)], BATCHES, (torch.float64,)))
    variants = list(itertools.product((*DTYPES, torch.float64), BATCHES, LOOKS, EDGES, AFFINES))
    seen: set[Any] = set()

    def news(choices: tuple[Any, ...]) -> tuple[int, int]:
        """How many pairs of choices haven't met before, and how many threes."""
        numbered = list(enumerate(choices))
        pairs, threes = (sum(each not in seen for each in itertools.combinations(numbered, k)) for k in (2, 3))
        return pairs, threes

    def choices_at_places() -> Iterator[tuple[Any, ...]]:
        defaults = (torch.bfloat16, BATCHES[0], LOOKS[0], EDGES[0], AFFINES[0])
        for arch, layout, stage in itertools.product(ARCHS, LAYOUTS, STAGES):
            yield arch, layout, stage, "training", *defaults
        for *place, batches, dtypes in places:
            free = (variant for variant in variants if variant[0] in dtypes and variant[1] in batches)
            yield max(((*place, *variant) for variant in free), key=news)

    found = [
        (arch, Problem(p, size, BATCHES[0], layout=layout, edges=EDGES[i % len(EDGES)], frozen=True))
        for i, (arch, (p, size), layout) in enumerate(zip(ARCHS, STAGES, itertools.cycle(LAYOUTS), strict=False))
    ]
    for choices in choices_at_places():
        numbered = list(enumerate(choices))
        seen.update(itertools.combinations(numbered, 2), itertools.combinations(numbered, 3))
        arch, layout, (p, size), mode, dtype, n, (sampler, modulation), edges, affine = choices
        found.append((arch, Problem(p, size, n, dtype, layout, mode, sampler, edges, modulation, affine)))
    return found


def every_problem() -> list[tuple[str, Problem]]:
    """All combinations."""
    return [
        (arch, Problem(p, size, n, dtype, layout, mode, sampler, edges, modulation, affine))
        for arch, (p, size), n, dtype, layout, mode, (sampler, modulation), edges, affine in itertools.product(
            ARCHS, STAGES, BATCHES, DTYPES, LAYOUTS, record.MODES, LOOKS, EDGES, AFFINES
        )
    ]


def kernels(problems: Iterable[tuple[str, Problem]]) -> list[Kernel]:
    """The distinct kernels of the problems, ordered by name and architecture."""
    found: dict[Kernel, None] = {}
    for arch, problem in problems:
        for launch in record.launches(problem, arch):
            found.setdefault(kernel_of(launch, arch, problem))
    return sorted(found, key=lambda kernel: (kernel.name, ARCHS.index(kernel.arch)))


def kernel_of(launch: Launch, arch: str, problem: Problem) -> Kernel:
    """What there is to compile for a launch."""
    return Kernel(launch.kernel, tuple(map(argument, launch.args)), tuple(launch.options.items()), arch, problem)


_worker_kernels: list[Kernel] = []


def _compile_number(number: int) -> Result:
    return compile_kernel(_worker_kernels[number])


def results(wanted: list[Kernel], jobs: int, cache: Path | None = None) -> Iterator[tuple[Kernel, Result]]:
    """Compile all of them, in ``jobs`` processes; ``cache``: a file of earlier results."""
    global _worker_kernels
    known = {}
    if cache is not None and cache.is_file():
        known = {key: Result(*values) for key, values in map(json.loads, cache.read_text().splitlines())}
    _worker_kernels = [kernel for kernel in wanted if kernel.key not in known]
    for kernel in wanted:
        if kernel.key in known:
            yield kernel, known[kernel.key]
    # Kernels can't be pickled: the processes are forked, and find them by number.
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        done = pool.map(_compile_number, range(len(_worker_kernels)))
        try:
            for kernel, result in zip(_worker_kernels, done, strict=True):
                if cache is not None and not result.error:
                    cache.parent.mkdir(parents=True, exist_ok=True)
                    with cache.open("a") as file:
                        file.write(json.dumps((kernel.key, result)) + "\n")
                yield kernel, result
        finally:  # whoever asked may want no more
            pool.shutdown(cancel_futures=True)


def default_cache() -> Path:
    """Where results are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vcr_ops" / "triton_aot"


def row(kernel: Kernel, result: Result) -> str:
    """A line of the table."""
    problem = kernel.problem
    dtype = str(problem.dtype).removeprefix("torch.")
    where = f"p={problem.p} {problem.size}² N={problem.n} {dtype} {problem.layout} {problem.mode}"
    look = f"{problem.sampler} {problem.edges} {problem.modulation} {problem.affine}"
    numbers = f"{result.registers:9}{result.spills:7}{result.shared:8}"
    return f"{kernel.name:24}{kernel.arch:8}{numbers}  {kernel.config:44}{where}, {look}"


HEADER = f"{'kernel':24}{'arch':8}{'registers':>9}{'spills':>7}{'shared':>8}  {'configuration':44}first met at"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vcr_ops.triton_common.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this one; may be repeated")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--every", action="store_true", help="all combinations of variants: hours")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--anew", action="store_true", help="compile what has been compiled before, too")
    options = parser.parse_args(arguments)
    cases = every_problem() if options.every else problems()
    wanted = kernels((arch, problem) for arch, problem in cases if options.arch is None or arch in options.arch)
    wanted = [kernel for kernel in wanted if options.kernel is None or options.kernel in kernel.name]
    print(f"Triton {triton.__version__}, {len(wanted)} kernels\n{HEADER}")
    complaints = []
    for kernel, result in results(wanted, options.jobs, None if options.anew else default_cache()):
        print(row(kernel, result), flush=True)
        if complaint := result.complaint(kernel.arch):
            complaints.append(f"{kernel.name} on {kernel.arch} ({kernel.config}): {complaint}")
    print("\n".join(["", *complaints, f"{len(wanted)} kernels, {len(complaints)} of them with something wrong"]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
