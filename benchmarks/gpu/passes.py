"""Each pass's bandwidth on a GPU: the profiler's times of its kernels, beside those of a copy of as many bytes.

A kernel belongs to the pass whose name is in its own. The cache is flushed before every step and every copy, not
between the passes of a step: what is smaller than the cache may still be there from the pass before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..bandwidth import PASSES, Pass, copy_of
from ..cases import Case, inputs_for
from ..passes import PassRow
from ..providers import Provider, Workload
from ..report import _number, case_title, layout_text
from .device import Device, Kernel
from .steps import _quartiles


@dataclass
class GpuPassRow(PassRow):
    """One pass of a step, or one kernel that belongs to none. warmth: "flushed", the cache before each step.

    launches: a step. kernels: their names. fits_l2: a map is smaller than the cache. peak_gbps: the card's.
    """

    launches: float = 0.0
    kernels: str = ""
    fits_l2: bool = False
    peak_gbps: float | None = None


@dataclass
class Spent:
    """Seconds of one pass, step by step; and its kernels, with the launches of all steps."""

    seconds: list[float]
    kernels: dict[str, int]


# CUDA C++ has evaluation in one kernel that reads once, where a map fits on chip.
GPU_PASSES = (*PASSES, Pass("middle_evaluate", 1, 1))


def pass_of(kernel: str) -> Pass | None:
    """The pass that a kernel's name names, as concept_sample or (in CUDA C++) as ConceptSample; of two, the longer.

    CUDA C++ has several passes in one kernel where the maps stay in the cache: no bandwidth of memory is theirs.
    """
    if "Together" in kernel:
        return Pass(f"{'forward' if 'ConceptModulate' in kernel else 'backward'}_together", 0, 0)
    named = [one for one in GPU_PASSES if one.name in kernel or one.name.title().replace("_", "") in kernel]
    return max(named, key=lambda one: len(one.name), default=None)


def spent_on(steps: list[list[Kernel]]) -> dict[str, Spent]:
    """By pass, or by kernel where it belongs to none; in the order in which they first ran."""
    spent: dict[str, Spent] = {}
    for number, step in enumerate(steps):
        for kernel in step:
            one = pass_of(kernel.name)
            into = spent.setdefault(kernel.name if one is None else one.name, Spent([0.0] * len(steps), {}))
            into.seconds[number] += kernel.seconds
            into.kernels[kernel.name] = into.kernels.get(kernel.name, 0) + 1
    return spent


def measure(case: Case, device: Device, provider: Provider, *, runs: int, peak_gbps: float | None) -> list[GpuPassRow]:
    """Rows of one middle. RuntimeError where the provider can't run, or the profiler sees nothing."""
    why_not = provider.why_not(case)
    if why_not:
        raise RuntimeError(why_not)
    inputs = inputs_for(case, device=device.name)
    workload = Workload(case, provider.load(provider.module(case), inputs).to(device.name), inputs)
    for _ in range(2):
        workload.step()
    maps = [x for x in (workload.x, workload.grad_out) if x is not None]
    traffics = sorted({one.reads + one.writes for one in GPU_PASSES} - {0})
    copies = {traffic: copy_of(maps, traffic * case.map_bytes) for traffic in traffics}
    for copy in copies.values():
        copy()
    steps: list[list[Kernel]] = []
    copied: dict[int, list[float]] = {traffic: [] for traffic in traffics}
    for _ in range(2):  # A B A B
        steps += device.segments([workload.step] * -(-runs // 2))
        functions: list[tuple[int, Callable[[], None]]] = list(copies.items()) * -(-runs // 2)
        for (traffic, _), kernels in zip(functions, device.segments([copy for _, copy in functions]), strict=True):
            copied[traffic].append(sum(kernel.seconds for kernel in kernels))
    rows = [
        _row(case, name, spent, len(steps), copied, device.l2_bytes, peak_gbps)
        for name, spent in spent_on(steps).items()
    ]
    del workload, inputs, maps, copies
    device.free()
    return rows


def _row(
    case: Case,
    name: str,
    spent: Spent,
    steps: int,
    copied: dict[int, list[float]],
    l2_bytes: int,
    peak_gbps: float | None,
) -> GpuPassRow:
    one = pass_of(name) or Pass(name, 0, 0)
    q1, median, q3 = _quartiles(spent.seconds)
    moved = (one.reads + one.writes) * case.map_bytes
    copy = statistics.median(copied[one.reads + one.writes]) if moved else None
    return GpuPassRow(
        level=case.level,
        mode=case.mode,
        stage=case.stage,
        p=case.p,
        height=case.height,
        batch=case.batch,
        dtype=case.dtype,
        layout=case.layout,
        threads=torch.get_num_threads(),
        warmth="flushed",
        name=name,
        reads=one.reads,
        writes=one.writes,
        median_ms=median * 1e3,
        q1_ms=q1 * 1e3,
        q3_ms=q3 * 1e3,
        gbps=moved / median / 1e9 if moved and median else None,
        copy_ms=copy * 1e3 if copy else None,
        copy_gbps=moved / copy / 1e9 if copy else None,
        launches=sum(spent.kernels.values()) / steps,
        kernels=", ".join(spent.kernels),
        fits_l2=case.map_bytes <= l2_bytes,
        peak_gbps=peak_gbps,
    )


def table(rows: list[GpuPassRow]) -> str:
    """A heading per case with the launches of a step, a line per pass or kernel."""
    cells = [["pass", "launches", "reads+writes", "ms, median (quartiles)", "GB/s", "copy GB/s", "of copy", "of peak"]]
    for row in rows:
        median = f"{_number(row.median_ms)} ({_number(row.q1_ms)}–{_number(row.q3_ms)})"
        cells.append(
            [
                row.name if row.reads + row.writes else row.name[:60],
                f"{row.launches:g}",
                f"{row.reads}+{row.writes}",
                median,
                _number(row.gbps),
                _number(row.copy_gbps),
                share(row.gbps, row.copy_gbps),
                share(row.gbps, row.peak_gbps),
            ]
        )
    text = layout_text(cells)
    shown, before = [text[0], "-" * len(text[0])], None
    launches: dict[str, float] = {}
    for row in rows:
        launches[case_title(row)] = launches.get(case_title(row), 0.0) + row.launches
    for row, line in zip(rows, text[1:], strict=True):
        title = case_title(row)
        if title != before:
            before = title
            shown.append(f"{title}: {launches[title]:g} launches{', maps fit the L2' if row.fits_l2 else ''}")
        shown.append(line)
    shown += [
        "",
        "reads+writes: map-sized tensors that the pass moves. copy: torch's copy of as many bytes in the same run.",
        "The L2 is flushed before each step and each copy, not between the passes of a step.",
    ]
    return "\n".join(shown)


def share(value: float | None, of: float | None) -> str:
    return f"{value / of:.0%}" if value and of else "–"
