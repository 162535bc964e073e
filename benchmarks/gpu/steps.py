"""Runs one case on a GPU: builds the sides, checks them, compiles while there is time, and times them in turn, each
as a plain call and as a replayed CUDA graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..bandwidth import copy_of, floor_bytes
from ..cases import Case, Inputs
from ..correctness import check, check_compiled, timed_inputs
from ..measure import Row, _judge, _reason, _row
from ..providers import Provider, Workload
from ..timing import in_turn
from .budget import Budget, OutOfTime, at_most
from .device import Device, Times

MIN_ROUNDS = {"middle": 9, "block": 7, "network": 5}


@dataclass
class GpuRow(Row):
    """A side of a case on a GPU. ``Row`` says what its fields are; the others:

    median_ms, its quartiles: a plain call on an idle device, the host's part included. host_ms: until the call came
    back. graph_ms: the replay of the same step as a CUDA graph, queued, so the device's part alone; graph_reason: why
    there is none. gbps: of the graph. copy_ms, copy_gbps: likewise. ratio_*: of calls; graph_ratio_*: of graphs.
    """

    host_ms: float | None = None
    graph_ms: float | None = None
    graph_q1_ms: float | None = None
    graph_q3_ms: float | None = None
    graph_reason: str | None = None
    graph_best_alternative: str | None = None
    graph_ratio_best: float | None = None
    graph_ratio_plain: float | None = None
    graph_ratio_plain_best: float | None = None
    compile_s: float | None = None
    peak_gbps: float | None = None


class Sides:
    """The sides of one case while it is measured."""

    def __init__(self, case: Case, device: Device, providers: list[Provider], left_out: Mapping[str, Provider]) -> None:
        self.case, self.device = case, device
        self.providers = providers
        self.rows = {provider.name: _row(case, provider, GpuRow) for provider in providers}
        for name, provider in left_out.items():
            self.rows[name] = _row(case, provider, GpuRow)
        self.workloads: dict[str, Workload] = {}

    def build(self, provider: Provider, inputs: Inputs) -> None:
        row = self.rows[provider.name]
        row.reason = provider.why_not(self.case)
        if row.reason is None:
            with _reason(row):
                module = provider.load(provider.module(self.case), inputs).to(self.device.name)
                self.workloads[provider.name] = Workload(
                    self.case, module, inputs, compiled=provider.eager is not None, mode=provider.compile_mode
                )

    def running(self) -> list[Provider]:
        """The sides that nothing has spoken against."""
        return [p for p in self.providers if p.name in self.workloads and self.rows[p.name].reason is None]


def run_case(
    case: Case,
    device: Device,
    providers: list[Provider],
    *,
    left_out: Mapping[str, tuple[Provider, str]],
    budget: Budget,
    seconds: float,
    peak_gbps: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[GpuRow]:
    """Rows of one case, one per provider, and one per provider in ``left_out``: name -> (provider, reason)."""
    sides = Sides(case, device, providers, {name: provider for name, (provider, _) in left_out.items()})
    for name, (_, reason) in left_out.items():
        sides.rows[name].reason = reason
    say("inputs")
    inputs = timed_inputs(case, device.name)
    torch._dynamo.reset()
    for provider in providers:
        sides.build(provider, inputs)
    say("checking against float64")
    _check(sides)
    device.free()
    # What computes the same comes first, and the long ones after the short: they have what the others leave.
    for provider in sorted(sides.running(), key=lambda p: (p.role == "plain", p.compile_mode is not None)):
        if provider.eager is not None:
            say(f"compiling {provider.title}")
            _compile(sides, provider, inputs, budget)
    say("timing")
    _time(sides, seconds)
    _compare(sides.rows.values(), sides.providers)
    for row in sides.rows.values():
        row.peak_gbps = peak_gbps
    sides.workloads.clear()
    device.free()
    return list(sides.rows.values())


def _check(sides: Sides) -> None:
    judged = [p for p in sides.running() if p.role != "plain" and p.eager is None]
    if judged:
        verdicts = check(sides.case, judged, sides.device.name)
        for provider in judged:
            with _reason(sides.rows[provider.name]):
                _judge(sides.rows[provider.name], verdicts[provider.name])


def _compile(sides: Sides, provider: Provider, inputs: Inputs, budget: Budget) -> None:
    row, expected = sides.rows[provider.name], budget.expected[provider.compile_mode]
    if budget.spare < budget.needed(provider.compile_mode):
        row.reason = f"no time left to compile it: about {expected:.0f} s"
        return
    begin = time.perf_counter()
    with _reason(row), at_most(budget.spare):
        workload = sides.workloads[provider.name]
        if provider.role == "plain":
            workload.step()
        else:
            # One draw tells a broken side, no more: nothing is refused for it.
            verdict = check_compiled(sides.case, workload, inputs)
            worst = verdict.errors[verdict.worst]
            row.correct, row.error_tensor = verdict.ok, verdict.worst
            row.error, row.plain_error = worst.norm2, worst.plain_norm2
    row.compile_s = time.perf_counter() - begin
    if row.reason is not None and OutOfTime.__name__ in row.reason:  # which the compiler may have wrapped
        row.reason = f"no time left to compile it: more than {row.compile_s:.0f} s"
    if row.reason is None:
        budget.expected[provider.compile_mode] = min(expected, row.compile_s)


def _time(sides: Sides, seconds: float) -> None:
    case, device = sides.case, sides.device
    pool = device.new_pool()
    calls: dict[str, Callable[[], Times]] = {}
    graphs: dict[str, Callable[[], Times]] = {}

    def call(step: Callable[[], object]) -> Callable[[], Times]:
        return lambda: device.call(step)

    def queued(replay: Callable[[], object]) -> Callable[[], Times]:
        return lambda: Times(device.queued(replay), 0.0)

    for provider in sides.running():
        row, workload = sides.rows[provider.name], sides.workloads[provider.name]
        with _reason(row):
            workload.step()
            row.peak_mb = device.peak_bytes(workload.step) / 1e6
            calls[provider.name] = call(workload.step)
            try:
                graphs[f"{provider.name} graph"] = queued(device.capture(workload.step, pool))
            except Exception as error:
                row.graph_reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    calls = {name: side for name, side in calls.items() if sides.rows[name].reason is None}
    moved = floor_bytes(case)
    first = next(iter(sides.workloads.values()), None)
    if moved and calls and first is not None:
        maps = [x for x in (first.x, first.grad_out) if x is not None]
        graphs["copy"] = queued(device.capture(copy_of(maps, moved), pool))
    taken = in_turn(calls | graphs, seconds=seconds, min_rounds=MIN_ROUNDS[case.level], max_rounds=200)
    for name in calls:
        _enter(sides.rows[name], taken[name], taken.get(f"{name} graph"), taken.get("copy"), moved)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, third


def _enter(row: GpuRow, calls: list[Times], graphs: list[Times] | None, copies: list[Times] | None, moved: int) -> None:
    row.q1_ms, row.median_ms, row.q3_ms = (1e3 * value for value in _quartiles([times.device for times in calls]))
    row.host_ms = 1e3 * statistics.median(times.host for times in calls)
    row.rounds = len(calls)
    if graphs:
        row.graph_q1_ms, row.graph_ms, row.graph_q3_ms = (
            1e3 * value for value in _quartiles([times.device for times in graphs])
        )
    if copies:
        copy = statistics.median(times.device for times in copies)
        row.floor_mb, row.copy_ms, row.copy_gbps = moved / 1e6, copy * 1e3, moved / copy / 1e9
        if row.role != "plain" and row.graph_ms:
            row.gbps = moved / row.graph_ms / 1e6


def _compare(rows: Iterable[GpuRow], providers: list[Provider]) -> None:
    """Ratios of medians: the other's over this side's, so more than 1 is faster than the other."""
    rows = list(rows)
    eager = {provider.name for provider in providers if provider.eager is None}

    def fastest(way: str, role: str, than: GpuRow, names: set[str] | None = None) -> GpuRow | None:
        others = [r for r in rows if r.role == role and r is not than and getattr(r, way) and r.reason is None]
        others = [r for r in others if names is None or r.provider in names]
        return min(others, key=lambda r: getattr(r, way), default=None)

    def ratio(way: str, other: GpuRow | None, row: GpuRow) -> float | None:
        own = getattr(row, way)
        return getattr(other, way) / own if other is not None and own else None

    for row in rows:
        if row.role == "plain" or row.median_ms is None:
            continue
        for way, prefix in (("median_ms", ""), ("graph_ms", "graph_")):
            best = fastest(way, "alternative", row)
            if row.role == "product" and best is not None:
                setattr(row, f"{prefix}best_alternative", best.provider)
                setattr(row, f"{prefix}ratio_best", ratio(way, best, row))
            setattr(row, f"{prefix}ratio_plain", ratio(way, fastest(way, "plain", row, eager), row))
            setattr(row, f"{prefix}ratio_plain_best", ratio(way, fastest(way, "plain", row), row))
