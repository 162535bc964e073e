"""Runs one case: build the sides, check them, time them together, count FLOPs and memory."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from .bandwidth import copy_of, floor_bytes
from .cases import Case
from .correctness import Verdict, check, check_compiled, timed_inputs
from .providers import PROVIDERS, Provider, Workload
from .timing import CacheFlush, Samples, interleave

# A network's step takes seconds: fewer rounds of it.
MIN_ROUNDS = {"middle": 7, "block": 5, "network": 3}


@dataclass
class Row:
    """One side of one case: a line of the table, an object of the JSON file, a line of the CSV file.

    Times in ms, bytes in MB (10^6) or GB (10^9); a multiply-add is two FLOPs. None: not measured, or not meaningful
    there.
    reason: why there are no times. ratio_best: fastest alternative's median over this side's. ratio_plain,
    ratio_plain_best: the plain ResNeXt side's, eager, and its fastest. gbps: bytes that the passes need over the time;
    copy_*: torch's copy of as many bytes.
    error, plain_error: of the tensor nearest to its limit (error_tensor), 2-norm; plain PyTorch's beside it.
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
    provider: str
    title: str
    role: str
    reason: str | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    rounds: int = 0
    faults: float | None = None
    cold_ms: float | None = None
    best_alternative: str | None = None
    ratio_best: float | None = None
    ratio_plain: float | None = None
    ratio_plain_best: float | None = None
    gflop: float | None = None
    gflops: float | None = None
    floor_mb: float | None = None
    gbps: float | None = None
    copy_ms: float | None = None
    copy_gbps: float | None = None
    cold_copy_ms: float | None = None
    correct: bool | None = None
    error: float | None = None
    plain_error: float | None = None
    error_tensor: str | None = None
    output_error: float | None = None
    plain_output_error: float | None = None
    peak_mb: float | None = None


R = TypeVar("R", bound=Row)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler writes notices to file descriptor 2 whatever its log level says."""
    with tempfile.TemporaryFile() as sink:
        kept = os.dup(2)
        try:
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _convolution_backward_flop(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    output_mask: Sequence[bool],
    out_shape: object = None,
) -> int:
    """FLOPs of a convolution's backward; torch 2.13's own formula counts the weight gradient of g groups g times."""
    positions = x_shape if transposed else grad_shape
    forward = 2 * math.prod(w_shape) * grad_shape[0] * math.prod(positions[2:])
    return forward * sum(output_mask[:2])


FORMULAS = {torch.ops.aten.convolution_backward: _convolution_backward_flop}


def count(workload: Workload, flops: bool = True) -> tuple[int | None, int]:
    """FLOPs of one step (None where compiled code hides them) and the most bytes it held at once beyond what was there
    before.

    The bytes are those asked of torch's allocator, outputs and gradients included; kernels' own stack and scratch are
    not.
    """
    peak = most_held(workload.step)
    counted: int | None = None
    if flops:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            workload.accumulate()
        counted = counter.get_total_flops()
    return counted, peak


def most_held(step: Callable[[], object]) -> int:
    """The most bytes of torch's allocator on the CPU that ``step`` held at once beyond what was there before."""
    with warnings.catch_warnings(), _quiet_stderr():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def run_case(
    case: Case,
    providers: list[Provider],
    *,
    left_out: dict[str, str] | None = None,
    seconds: float = 1.0,
    min_rounds: int | None = None,
    cold: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rows of one case, one per provider, and one per provider in ``left_out`` (name -> reason).

    Sides that can't run, fail to build or compute something wrong get a reason instead of times.
    """
    rows: dict[str, Row] = {provider.name: _row(case, provider) for provider in providers}
    for name, reason in (left_out or {}).items():
        rows[name] = _row(case, PROVIDERS[name])
        rows[name].reason = reason
    say("inputs")
    inputs = timed_inputs(case)
    torch._dynamo.reset()  # graphs of the case before would count against the limit of recompilations
    workloads: dict[str, Workload] = {}
    for provider in providers:
        row = rows[provider.name]
        row.reason = provider.why_not(case)
        if row.reason is None:
            with _reason(row):
                workloads[provider.name] = Workload(
                    case, provider.load(provider.module(case), inputs), inputs, compiled=provider.eager is not None
                )

    say("checking against float64")
    verdicts: dict[str, Verdict | Exception] = {}
    judged = [p for p in providers if p.name in workloads and p.role != "plain"]
    if judged:
        verdicts.update(check(case, [p for p in judged if p.eager is None]))
    for provider in judged:
        with _reason(rows[provider.name]):
            if provider.eager is not None:
                say(f"compiling and checking {provider.title}")
                verdicts[provider.name] = check_compiled(case, workloads[provider.name], inputs)
            _judge(rows[provider.name], verdicts[provider.name])

    for provider in providers:
        row = rows[provider.name]
        if row.reason is None:
            say(f"counting {provider.title}")
            with _reason(row):
                flop, peak = count(workloads[provider.name], flops=provider.eager is None)
                row.peak_mb = peak / 1e6
                if provider.eager in rows:
                    row.gflop = rows[provider.eager].gflop
                elif flop:
                    row.gflop = flop / 1e9
    say("timing")
    running = {name: w for name, w in workloads.items() if rows[name].reason is None}
    _time(case, running, rows, seconds, min_rounds or MIN_ROUNDS[case.level], cold)
    _compare(list(rows.values()))
    return list(rows.values())


def _row(case: Case, provider: Provider, kind: type[R] = Row) -> R:  # type: ignore[assignment]
    return kind(
        case.level,
        case.mode,
        case.stage,
        case.p,
        case.height,
        case.batch,
        case.dtype,
        case.layout,
        torch.get_num_threads(),
        provider.name,
        provider.title,
        provider.role,
    )


@contextmanager
def _reason(row: Row) -> Iterator[None]:
    """An error of one side becomes its row's reason; the others go on."""
    try:
        yield
    except Exception as error:
        row.reason = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _judge(row: Row, verdict: Verdict | Exception) -> None:
    """Enter the errors; a wrong product gets no times. A wrong alternative keeps them: it can only make ours look
    worse.
    """
    if isinstance(verdict, Exception):
        raise verdict
    worst, output = verdict.errors[verdict.worst], verdict.errors["output"]
    row.correct, row.error_tensor = verdict.ok, verdict.worst
    row.error, row.plain_error = worst.norm2, worst.plain_norm2
    row.output_error, row.plain_output_error = output.norm2, output.plain_norm2
    if not verdict.ok and row.role == "product":
        row.reason = f"wrong: {verdict}"


def _time(
    case: Case, workloads: dict[str, Workload], rows: dict[str, Row], seconds: float, min_rounds: int, cold: bool
) -> None:
    if not workloads:
        return
    sides: dict[str, Callable[[], object]] = {name: w.step for name, w in workloads.items()}
    moved = floor_bytes(case)
    if moved:
        first = next(iter(workloads.values()))
        sides["copy"] = copy_of([t for t in (first.x, first.grad_out) if t is not None], moved)
    # one round to warm up: checking and counting have run every side already
    samples = interleave(sides, seconds=seconds, min_rounds=min_rounds, warm_up=1)
    cooled: dict[str, Samples] = {}
    if cold:
        cooled = interleave(sides, seconds=seconds, min_rounds=min_rounds, warm_up=0, before=CacheFlush())
    for name in workloads:
        row, taken = rows[name], samples[name]
        row.median_ms = taken.median * 1e3
        row.q1_ms, row.q3_ms = (quartile * 1e3 for quartile in taken.quartiles)
        row.rounds, row.faults = len(taken.seconds), taken.faults_per_call
        if row.gflop is not None:
            row.gflops = row.gflop / taken.median
        if cold:
            row.cold_ms = cooled[name].median * 1e3
        if moved:
            copy = samples["copy"].median
            row.floor_mb = moved / 1e6
            if row.role != "plain":
                row.gbps = moved / taken.median / 1e9
            row.copy_ms, row.copy_gbps = copy * 1e3, moved / copy / 1e9
            if cold:
                row.cold_copy_ms = cooled["copy"].median * 1e3


def _compare(rows: list[Row]) -> None:
    """Ratios of medians: other's over this side's, so more than 1 is faster than the other."""
    timed = {row.provider: row for row in rows if row.median_ms is not None}
    alternatives = [row for row in timed.values() if row.role == "alternative"]
    plain = [row for row in timed.values() if row.role == "plain"]
    eager = [row for row in plain if PROVIDERS[row.provider].eager is None]

    def fastest(of: list[Row]) -> Row | None:
        return min(of, key=lambda row: row.median_ms or 0.0, default=None)

    for row in timed.values():
        if row.role == "plain":
            continue
        best = fastest([other for other in alternatives if other is not row])
        if row.role == "product" and best is not None:
            row.best_alternative, row.ratio_best = best.provider, _ratio(best, row)
        row.ratio_plain, row.ratio_plain_best = _ratio(fastest(eager), row), _ratio(fastest(plain), row)


def _ratio(other: Row | None, row: Row) -> float | None:
    return None if other is None or not other.median_ms or not row.median_ms else other.median_ms / row.median_ms
