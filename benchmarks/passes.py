"""``passes``: each pass's bandwidth beside a copy of as many bytes. ``overhead``: what a step costs outside the
kernels.

Both read the op library's own clock, ``torch.ops.vcr_ops.pass_times()``: seconds a pass since the last call, in the
order of ``bandwidth.PASSES``. The library keeps it when VCR_OPS_PROFILE=1 is set before it is loaded; ``__main__`` sees
to that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from .bandwidth import BY_IMAGE, PASSES, copy_of
from .cases import Case, Inputs, inputs_for
from .providers import PROVIDERS, Workload
from .report import _number, case_title, layout_text
from .timing import interleave, last_level_cache_bytes

MODULATE = [one.name for one in PASSES].index("concept_modulate")


@dataclass
class PassRow:
    """One pass of one case. warmth: "warm" (the case's batch) or "cold" (the batch repeated till a map is twice the
    last-level cache).
    """

    level: str
    mode: str
    stage: int
    p: int
    height: int
    batch: int
    dtype: str
    layout: str
    threads: int
    warmth: str
    name: str
    reads: int
    writes: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    gbps: float | None
    copy_ms: float | None
    copy_gbps: float | None


@dataclass
class OverheadRow:
    """One step on a map of few numbers, in µs: in all, in the kernels, and the rest. BatchNorm + ReLU, which has no
    such clock: in all.
    """

    mode: str
    batch: int
    p: int
    height: int
    layout: str
    threads: int
    provider: str
    rounds: int
    total_us: float
    total_q1_us: float
    total_q3_us: float
    kernels_us: float | None
    outside_us: float | None


def pass_times() -> list[float]:
    """Seconds per pass since the last call. RuntimeError if the library keeps no such clock."""
    try:
        times = torch.ops.vcr_ops.pass_times()
    except AttributeError as error:
        raise RuntimeError("the op library has no pass_times: build it anew with `./dev build`") from error
    if times.numel() != len(PASSES):
        raise RuntimeError(f"pass_times has {times.numel()} numbers, expected one for each of {len(PASSES)} passes")
    return times.tolist()


def _workload(case: Case, inputs: Inputs, provider: str = "fused") -> Workload:
    why_not = PROVIDERS[provider].why_not(case)
    if why_not:
        raise RuntimeError(f"{provider} can't run here: {why_not}")
    side = PROVIDERS[provider]
    return Workload(case, side.load(side.module(case), inputs), inputs)


def _repeated(case: Case, inputs: Inputs, times: int) -> tuple[Case, Inputs]:
    def repeat(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.detach()] * times).contiguous(memory_format=case.memory_format)

    grad_out = None if inputs.grad_out is None else repeat(inputs.grad_out)
    return replace(case, batch=case.batch * times), replace(inputs, x=repeat(inputs.x), grad_out=grad_out)


def run_passes(
    cases: Iterable[Case], *, seconds: float, warmths: Iterable[str], say: Callable[[str], None]
) -> list[PassRow]:
    """Rows of every pass of the given middles that took any time."""
    rows = []
    for case in cases:
        for warmth in warmths:
            say(f"{case.name}, {warmth}")
            inputs = inputs_for(case)
            run = case
            if warmth == "cold":
                run, inputs = _repeated(case, inputs, -(-2 * last_level_cache_bytes() // case.map_bytes))
            rows += _passes_of(run, inputs, warmth, seconds)
    return rows


def _passes_of(case: Case, inputs: Inputs, warmth: str, seconds: float) -> list[PassRow]:
    workload = _workload(case, inputs)
    kept: list[list[float]] = []

    def step() -> None:
        workload.step()
        kept.append(pass_times())

    workload.step()
    if not sum(pass_times()):
        raise RuntimeError("pass_times stays 0: VCR_OPS_PROFILE=1 must be set before vcr_ops is imported")
    maps = [t for t in (workload.x, workload.grad_out) if t is not None]
    sides: dict[str, Callable[[], object]] = {"step": step}
    for traffic in sorted({p.reads + p.writes for p in PASSES} - {0}):
        sides[str(traffic)] = copy_of(maps, traffic * case.map_bytes)
    samples = interleave(sides, seconds=seconds, warm_up=0)
    rows = []
    by_image = case.mode == "eval" and not any(times[MODULATE] for times in kept)
    for index, one in enumerate(PASSES):
        if by_image and one.name == "concept_sample":
            one = BY_IMAGE
        taken = [times[index] for times in kept]
        median = statistics.median(taken)
        if median == 0:
            continue
        first, _, third = statistics.quantiles(taken, n=4, method="inclusive")
        moved = (one.reads + one.writes) * case.map_bytes
        copy = samples[str(one.reads + one.writes)].median if moved else None
        rows.append(
            PassRow(
                case.level,
                case.mode,
                case.stage,
                case.p,
                case.height,
                case.batch,
                case.dtype,
                case.layout,
                torch.get_num_threads(),
                warmth,
                one.name,
                one.reads,
                one.writes,
                median * 1e3,
                first * 1e3,
                third * 1e3,
                moved / median / 1e9 if moved else None,
                copy * 1e3 if copy else None,
                moved / copy / 1e9 if copy else None,
            )
        )
    return rows


def passes_table(rows: list[PassRow]) -> str:
    """A heading per case, a line per pass."""
    cells = [["pass", "reads+writes", "ms, median (quartiles)", "GB/s", "copy GB/s", "of copy"]]
    for row in rows:
        share = f"{row.gbps / row.copy_gbps:.0%}" if row.gbps and row.copy_gbps else "–"
        median = f"{_number(row.median_ms)} ({_number(row.q1_ms)}–{_number(row.q3_ms)})"
        cells.append([row.name, f"{row.reads}+{row.writes}", median, _number(row.gbps), _number(row.copy_gbps), share])
    text = layout_text(cells)
    shown, before = [text[0], "-" * len(text[0])], None
    for row, line in zip(rows, text[1:], strict=True):
        title = f"{case_title(row)}, {row.warmth}"
        if title != before:
            before = title
            shown.append(title)
        shown.append(line)
    shown += [
        "",
        "reads+writes: map-sized tensors that the pass moves. "
        "copy: torch's copy of as many bytes, interleaved with the steps.",
        "warm: the batch as given; what fits the last-level cache may still be there from the pass before. "
        "cold: the batch repeated till one map is twice that cache.",
    ]
    return "\n".join(shown)


def run_overhead(
    modes: Iterable[str], layouts: Iterable[str], *, seconds: float, say: Callable[[str], None]
) -> list[OverheadRow]:
    """The middle and BatchNorm + ReLU on 2 images of 2 x 2 positions: all that is left is what a call costs."""
    rows = []
    for mode in modes:
        for layout in layouts:
            case = Case("middle", mode, 3, 2, "float32", layout, image_size=32)
            say(case.name)
            inputs = inputs_for(case)
            fused, plain = _workload(case, inputs), _workload(case, inputs, "plain")
            for _ in range(50):
                fused.step()
                plain.step()
            totals: dict[str, list[float]] = {"fused": [], "plain": []}
            kernels: list[float] = []
            pass_times()
            start = time.perf_counter()
            while time.perf_counter() - start < seconds or len(kernels) < 20:
                for name, workload in (("fused", fused), ("plain", plain)):
                    begin = time.perf_counter()
                    workload.step()
                    totals[name].append(time.perf_counter() - begin)
                    if name == "fused":
                        kernels.append(sum(pass_times()))
            for name, taken in totals.items():
                first, median, third = (value * 1e6 for value in statistics.quantiles(taken, n=4, method="inclusive"))
                inside = outside = None
                if name == "fused":
                    inside = statistics.median(kernels) * 1e6
                    outside = statistics.median(t - k for t, k in zip(taken, kernels, strict=True)) * 1e6
                rows.append(
                    OverheadRow(
                        mode,
                        case.batch,
                        case.p,
                        case.height,
                        layout,
                        torch.get_num_threads(),
                        name,
                        len(taken),
                        median,
                        first,
                        third,
                        inside,
                        outside,
                    )
                )
    return rows


def overhead_table(rows: list[OverheadRow]) -> str:
    """A line per mode, layout and side."""
    cells = [["", "step µs, median (quartiles)", "kernels µs", "outside µs"]]
    for row in rows:
        side = "vcr_ops C++" if row.provider == "fused" else "BatchNorm + ReLU"
        median = f"{_number(row.total_us)} ({_number(row.total_q1_us)}–{_number(row.total_q3_us)})"
        what = "training step" if row.mode == "train" else "evaluation"
        place = f"{what}, N={row.batch}, p={row.p}, {row.height}×{row.height}, {row.layout}: {side}"
        cells.append([place, median, _number(row.kernels_us), _number(row.outside_us)])
    return "\n".join(layout_text(cells))
