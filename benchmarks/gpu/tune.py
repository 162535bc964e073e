"""``python -m benchmarks tune``: times configurations of the Triton kernels on the GPU at hand.

A case is a kernel that walks a map, the map's layout and the stage and batch. Its candidates are the neighbours of the
shipped configuration: first other tiles and warps, then, around the fastest of them, other splits and stages. One that
doesn't compile, spills registers or asks for too much shared memory is dropped, and so is one whose results aren't the
shipped configuration's but for rounding. The fastest three and the shipped one are then timed in turn, and what is
faster beyond noise becomes a rule for this architecture, in front of the table (vcr_ops/triton_common/configs.py).

What is timed is a CUDA graph of the kernel and of what its configuration changes besides it, from a flushed L2: what is
split, for example, has to be merged by the next kernel (``TIMED``). All other kernels have the shipped configurations.

An image's evaluation doesn't depend on its batch: the kernels that give it (``configs.BATCH_FREE``) are tuned for the
largest batch alone, and their rules hold for any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr_ops.triton_common import aot, configs, record
from vcr_ops.triton_common.launch import INTERPRETED, Launch, launch
from vcr_ops.triton_common.record import Problem
from vcr_ops.triton_common.sizes import sizes_of

from ..cases import DTYPES, IMAGE_SIZE, LAYOUTS, STAGES, Case, check_dtypes
from ..timing import Samples, in_turn
from .budget import Budget
from .command import DEVICES, terminable
from .device import Device

Config = dict[str, int]

# By the kernel that is configured: the launches that are timed. The sampler's splits are merged by the reasoner.
TIMED = {
    "channel_stats": ("channel_stats", "concept_sample"),
    "concept_sample": ("concept_sample", "concept_reason"),
    "concept_sample_inference": ("concept_sample",),
    "concept_modulate": ("concept_modulate",),
    "modulate_backward_sums": ("modulate_backward_sums", "small_gradients"),
    "middle_input_grad": ("middle_input_grad",),
}
EVALUATION = ("concept_sample_inference",)
BACKWARD = ("modulate_backward_sums", "middle_input_grad")
WARPS, MOST_STAGES, MOST_SPLITS = (1, 16), 3, 64
SCREENING, FINALISTS, MOST, LEAST = 5, 3, 25, 7  # times per candidate; how many remain, and their times
TOLERANCE = 1e-3  # of a tensor's largest element: far more than another order of its sums, far less than a mistake
ZERO = 1e-6  # of the largest element of all: below it a gradient that is zero in theory


# Candidates


def tiles(found: Config) -> Iterator[Config]:
    """Half and twice the tile, in either direction, each with half and twice the warps."""
    for positions, concepts, warps in itertools.product((1.0, 0.5, 2.0), repeat=3):
        if 0.5 <= positions * concepts <= 2:
            tile = {name: int(found[name] * factor) for name, factor in (("BS", positions), ("CB", concepts))}
            yield {**found, **tile, "num_warps": int(found["num_warps"] * warps)}


def spread(found: Config) -> Iterator[Config]:
    """Other splits and stages."""
    for splits, stages in itertools.product((1.0, 0.5, 2.0, 4.0), (found["num_stages"], 1, 2, 3)):
        yield {**found, "splits": int(found["splits"] * splits), "num_stages": stages}


ROUNDS = (tiles, spread)


def possible(found: Config) -> bool:
    return (
        found["BS"] >= 1
        and found["CB"] >= 1
        and WARPS[0] <= found["num_warps"] <= WARPS[1]
        and 1 <= found["num_stages"] <= MOST_STAGES
        and 1 <= found["splits"] <= MOST_SPLITS
    )


# Running


class Step:
    """A step of a middle on the device, whose launches can be taken without running them."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem = problem
        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        self.middle = record.middle_of(problem).to(device)
        form = torch.channels_last if problem.layout == "channels_last" else torch.contiguous_format
        shape = (problem.n, problem.concepts * problem.p, problem.size, problem.size)
        self.y, self.grad = (normal(*shape).to(problem.dtype).contiguous(memory_format=form) for _ in range(2))
        self.saved: Tensor | None = None
        with torch.no_grad():
            for parameter in self.middle.parameters():
                parameter.add_(normal(*parameter.shape), alpha=0.1)
            if self.middle.training:
                self.saved = record.run_forward(self.middle, self.y)[-1]

    def shipped(self, kernel: str) -> Config:
        sizes = sizes_of(self.y, (self.problem.concepts, self.problem.p, max(self.problem.p // 4, 4)))
        return dict(sizes.config(kernel))

    def take(self, kernel: str, found: Config) -> tuple[list[Launch], list[Tensor]]:
        """The launches of the pass that the kernel is in, with a configuration of it; and what they will write."""
        with configs.force(kernel, found), record.holding() as launches, torch.no_grad():
            if kernel in BACKWARD:
                assert self.saved is not None
                return launches, list(record.run_backward(self.middle, self.y, self.grad, self.saved))
            return launches, list(record.run_forward(self.middle, self.y)[:-1])


def run(launches: Iterable[Launch]) -> None:
    for each in launches:
        launch(each.kernel, each.grid, each.device, *each.args, **each.options)


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """How results differ by more than another order of the sums explains; or ""."""
    largest = max((float(x.abs().max()) for x in theirs if x.numel()), default=0.0)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if b.numel():
            off, top = float((a.float() - b.float()).abs().max()), float(b.abs().max())
            if not off <= max(TOLERANCE, torch.finfo(b.dtype).eps) * top + ZERO * largest:  # NaN is a difference
                return f"result {number} is off by {off:.2g} where the largest element is {top:.2g}"
    return ""


def identity(launches: Iterable[Launch]) -> str:
    """Equal where two configurations come to the same launches."""
    return repr([(each.name, each.grid, list(each.options.items())) for each in launches])


class Compiler:
    """Compiles ahead, in several processes: the launch then finds the kernel in Triton's cache."""

    def __init__(self, arch: str, jobs: int) -> None:
        self.arch, self.jobs = arch, jobs
        self.complaints: dict[aot.Kernel, str] = {}

    def kernels(self, problem: Problem, kernel: str, launches: Iterable[Launch]) -> list[aot.Kernel]:
        if self.arch == "interpreter":
            return []
        return [aot.kernel_of(each, self.arch, problem) for each in launches if each.name in TIMED[kernel]]

    def compile(self, wanted: Iterable[aot.Kernel], budget: Budget) -> None:
        new = [kernel for kernel in dict.fromkeys(wanted) if kernel not in self.complaints]
        if not new:
            return
        for kernel, result in aot.results(new, min(self.jobs, len(new)), aot.default_cache()):
            self.complaints[kernel] = result.complaint(self.arch)
            if budget.left <= 0:
                break

    def complaint(self, kernels: Iterable[aot.Kernel]) -> str:
        """What is wrong with one of them; or ""."""
        said = (self.complaints.get(kernel, "not compiled: out of time") for kernel in kernels)
        return next((complaint for complaint in said if complaint), "")


# Searching


@dataclass
class Candidate:
    """A configuration that can be timed. ``kept``: the tensors that the replay writes."""

    config: Config
    replay: Callable[[], object]
    seconds: float
    kept: Any


@dataclass
class Outcome:
    """What came of a case. Seconds: medians, in turn. ``beyond_noise``: the best is faster, and the quartiles agree."""

    kernel: str
    problem: Problem
    shipped: Config
    best: Config
    shipped_s: float
    best_s: float
    beyond_noise: bool
    timed: int
    dropped: dict[str, str]

    @property
    def gain(self) -> float:
        return 1 - self.best_s / self.shipped_s if self.shipped_s else 0.0


def fresh(
    step: Step, kernel: str, candidates: Iterable[Config], compiler: Compiler, seen: set[str]
) -> list[tuple[Config, list[aot.Kernel]]]:
    """The possible candidates that come to launches not seen yet, and the kernels to compile for them."""
    found = []
    for candidate in candidates:
        if possible(candidate):
            launches, _ = step.take(kernel, candidate)
            if (key := identity(launches)) not in seen:
                seen.add(key)
                found.append((candidate, compiler.kernels(step.problem, kernel, launches)))
    return found


def search(
    step: Step, kernel: str, device: Device, compiler: Compiler, budget: Budget, *, gain: float = 0.03
) -> Outcome:
    """Time a case. An exception where the shipped configuration itself can't run."""
    shipped = step.shipped(kernel)
    reference: list[Tensor] = []

    def candidate(found: Config) -> Candidate:
        launches, results = step.take(kernel, found)
        run(launches)
        if not reference:
            reference.extend(results)
        elif problem := difference(results, reference):
            raise ArithmeticError(problem)
        timed = [each for each in launches if each.name in TIMED[kernel]]
        replay = device.capture(lambda: run(timed))
        seconds = statistics.median(device.queued(replay) for _ in range(SCREENING))
        return Candidate(found, replay, seconds, (launches, results))

    first = candidate(shipped)
    leaders, timed, dropped = [first], 1, {}
    seen = {identity(step.take(kernel, shipped)[0])}
    for neighbours in ROUNDS:
        new = fresh(step, kernel, neighbours(leaders[0].config), compiler, seen)
        compiler.compile(itertools.chain.from_iterable(kernels for _, kernels in new), budget)
        for found, kernels in new:
            if budget.left <= 0:
                break
            reason = compiler.complaint(kernels)
            try:
                if not reason:
                    leaders = sorted([*leaders, candidate(found)], key=lambda each: each.seconds)[:FINALISTS]
                    timed += 1
            except Exception as error:  # too much shared memory, what Triton can't compile, wrong results
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if reason:
                dropped[short(found)] = reason
    finalists = [first, *(each for each in leaders if each is not first)]
    sides: dict[str, Callable[[], float]] = {
        str(i): lambda each=each: device.queued(each.replay)  # type: ignore[misc]
        for i, each in enumerate(finalists)
    }
    samples = {
        name: Samples(times) for name, times in in_turn(sides, seconds=0.2, min_rounds=LEAST, max_rounds=MOST).items()
    }
    fastest = min(samples, key=lambda name: samples[name].median)
    ours, best = samples["0"], samples[fastest]
    surely = best.median < (1 - gain) * ours.median and best.quartiles[1] < ours.quartiles[0]
    found = finalists[int(fastest)].config
    return Outcome(kernel, step.problem, shipped, found, ours.median, best.median, surely, timed, dropped)


# Rules


def between(values: Sequence[int], value: int) -> list[int | None]:
    """The range of ``value`` among values that were measured, its ends their geometric means; the outer ones open."""
    ordered = sorted(values)
    i = ordered.index(value)
    low = int((ordered[i - 1] * value) ** 0.5) + 1 if i else None
    high = int((value * ordered[i + 1]) ** 0.5) if i + 1 < len(ordered) else None
    return [low, high]


def new_rules(outcomes: Iterable[Outcome], batches: Sequence[int], arch: str) -> list[configs.Rule]:
    """A rule for each outcome beyond noise; neighbouring batches with the same configuration have one in common.

    It holds for p above half the stage's, up to the stage's; and for maps of half to twice the height and width.
    """
    rules: list[configs.Rule] = []
    latest: Outcome | None = None  # what the last rule ends with
    ordered = sorted(set(batches))
    free = configs.BATCH_FREE
    won = sorted(
        (each for each in outcomes if each.beyond_noise and (each.kernel not in free or each.problem.n == ordered[-1])),
        key=lambda each: (*_where(each), each.problem.n),
    )
    for each in won:
        problem, (low, high) = each.problem, between(ordered, each.problem.n)
        batch = {} if each.kernel in free else {"N": [low, high]}
        if (
            latest is not None
            and _where(latest) == _where(each)
            and latest.best == each.best
            and ordered.index(latest.problem.n) + 1 == ordered.index(problem.n)
        ):
            rules[-1]["N"] = [rules[-1]["N"][0], high]
        else:
            positions = problem.size**2
            rules.append(
                {
                    "arch": arch,
                    "kernel": each.kernel,
                    "layout": problem.layout,
                    "p": [problem.p // 2 + 1 if problem.p > 4 else None, problem.p],
                    "S": [-(-positions // 4), 4 * positions],
                    **batch,
                    "itemsize": problem.dtype.itemsize,
                    "config": {
                        name: each.best[name] for name in (*configs.FIELDS, *configs.OPTIONAL) if name in each.best
                    },
                }
            )
        latest = each
    return rules


def _where(outcome: Outcome) -> tuple[Any, ...]:
    problem = outcome.problem
    return list(TIMED).index(outcome.kernel), problem.layout, problem.p, problem.size, problem.dtype.itemsize


def covers(rule: configs.Rule, other: configs.Rule) -> bool:
    """True where ``rule`` holds wherever ``other`` does."""
    for field in rule.keys() - {"config"}:
        if field not in other:
            return False
        ours, theirs = rule[field], other[field]
        if field in ("p", "S", "N"):
            if ours[0] is not None and (theirs[0] is None or theirs[0] < ours[0]):
                return False
            if ours[1] is not None and (theirs[1] is None or theirs[1] > ours[1]):
                return False
        elif not set(_listed(theirs)) <= set(_listed(ours)):
            return False
    return True


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def in_front(new: list[configs.Rule], table: list[configs.Rule]) -> list[configs.Rule]:
    """The table with new rules in front, without the old ones that one of them covers."""
    return new + [rule for rule in table if not any(covers(each, rule) for each in new)]


# The command


def short(found: Config) -> str:
    return " ".join(f"{name.removeprefix('num_')}={found[name]}" for name in configs.FIELDS)


def line(outcome: Outcome) -> str:
    """An outcome in one line."""
    spills = sum("spills" in reason for reason in outcome.dropped.values())
    wrong = sum("ArithmeticError" in reason for reason in outcome.dropped.values())
    others = len(outcome.dropped) - spills - wrong
    counts = ((f"{outcome.timed} timed", 1), (f"{spills} spill", spills), (f"{wrong} WRONG", wrong))
    words = ", ".join(text for text, count in (*counts, (f"{others} can't run", others)) if count)
    times = f"{outcome.shipped_s * 1e6:.1f} µs"
    if not outcome.beyond_noise:
        return f"{times}, none faster beyond noise; {words}"
    return f"{times} -> {outcome.best_s * 1e6:.1f} µs ({outcome.gain:.1%} less) by {short(outcome.best)}; {words}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks tune",
        description="Time configurations of the Triton kernels on a GPU, and put rules for its architecture in front "
        "of the shipped table where they are faster.",
        epilog="--device rehearsal does so on the CPU, under TRITON_INTERPRET=1, where times mean nothing.",
    )
    add = made.add_argument
    add("--kernels", nargs="+", choices=list(TIMED), default=list(TIMED), help="default: all")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    add("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES), help="default: all")
    add("--batch", nargs="+", type=int, default=[1, 16, 256], metavar="N", help="default: 1 16 256")
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="default: bfloat16; rules hold for types of its size")
    add("--image-size", type=int, default=IMAGE_SIZE, metavar="PIXELS", help=f"default: {IMAGE_SIZE}")
    add("--concepts", type=int, default=32, metavar="C", help="default: 32")
    add("--seconds", type=float, default=600.0, metavar="S", help="begin nothing after so long (default: 600)")
    add("--gain", type=float, default=3.0, metavar="PERCENT", help="that a rule must save at least (default: 3)")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile (default: a core each)")
    add("--dry-run", action="store_true", help="print the rules and write nothing")
    add("--output", type=Path, metavar="PATH", help=f"write the table there (default: {configs.PATH.name} itself)")
    return made


def steps(options: argparse.Namespace) -> list[tuple[Problem, list[str]]]:
    """The steps and the kernels to tune in each; large batches first, for which kernels matter most."""
    found = []
    for batch, stage, layout in itertools.product(sorted(set(options.batch))[::-1], options.stages, options.layouts):
        case = Case("middle", "train", stage, batch, options.dtype, layout, options.image_size)
        for mode in ("training", "evaluation"):
            kernels = [name for name in options.kernels if (name in EVALUATION) == (mode == "evaluation")]
            if kernels:
                size, dtype = case.height, case.torch_dtype
                found.append((Problem(case.p, size, batch, dtype, layout, mode, concepts=options.concepts), kernels))
    return found


def tune(options: argparse.Namespace, device: Device, budget: Budget, outcomes: list[Outcome]) -> int:
    """Tune all cases, as far as there is time; what came of them goes into ``outcomes``. How many failed."""
    compiler = Compiler(configs.arch(torch.device(device.name)), options.jobs)
    planned, done, failed = steps(options), 0, 0
    total = sum(len(kernels) for _, kernels in planned)
    for problem, kernels in planned:
        if budget.left <= 0:
            break
        place = f"{problem.layout}, p={problem.p}, {problem.size}×{problem.size}, N={problem.n}"
        try:
            step = Step(problem, device.name)
            wanted = [
                each for kernel in kernels for each in fresh(step, kernel, tiles(step.shipped(kernel)), compiler, set())
            ]
            compiler.compile(itertools.chain.from_iterable(needed for _, needed in wanted), budget)
        except Exception as error:
            done, failed = done + len(kernels), failed + len(kernels)
            print(f"[{done}/{total}] {place}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        for kernel in kernels:
            if budget.left <= 0:
                break
            done += 1
            try:
                outcomes.append(search(step, kernel, device, compiler, budget, gain=options.gain / 100))
                text = line(outcomes[-1])
            except Exception as error:
                failed += 1
                text = f"failed: {type(error).__name__}: {error}"
            print(f"[{done}/{total} {budget.seconds - budget.left:.0f} s] {kernel}, {place}: {text}", flush=True)
        del step
        device.free()
    if done < total:
        print(f"{total - done} of {total} cases: out of time", flush=True)
    return failed


def main(device_name: str, argv: Sequence[str]) -> int:
    """Tune and write; returns the exit status: 0, or 1 where a case failed or it was interrupted."""
    made = parser()
    options = made.parse_args(list(argv))
    if device_name == "rehearsal":
        if not INTERPRETED:
            made.error("a rehearsal runs the kernels under TRITON_INTERPRET=1")
        if not options.dry_run and options.output is None:
            made.error("times of a rehearsal belong in no table: add --dry-run or --output PATH")
    if min(options.batch) < 1:
        made.error(f"a batch of {min(options.batch)} has no image")
    budget = Budget(options.seconds)
    device: Device = DEVICES[device_name]()
    check_dtypes([options.dtype], device.name)
    arch = configs.arch(torch.device(device.name))
    print(f"{device.describe().get('gpu')}, {arch}, {options.dtype}", flush=True)
    outcomes: list[Outcome] = []
    with terminable():
        try:
            failed = tune(options, device, budget, outcomes)
        except KeyboardInterrupt:
            failed = 1
            print(f"interrupted after {len(outcomes)} cases", flush=True)
    report(outcomes, options, arch)
    return 1 if failed else 0


def report(outcomes: list[Outcome], options: argparse.Namespace, arch: str) -> None:
    """Print the rules, and write them."""
    reasons = [
        f"{each.kernel}, {each.problem.layout}, p={each.problem.p}, N={each.problem.n}, {found}: {reason}"
        for each in outcomes
        for found, reason in each.dropped.items()
        if "ArithmeticError" in reason
    ]
    if reasons:
        print("\nWRONG results, not timed:", *reasons, sep="\n")
    new = new_rules(outcomes, options.batch, arch)
    faster = sum(each.beyond_noise for each in outcomes)
    print(f"\n{len(new)} rules from {faster} of {len(outcomes)} cases that gain more than {options.gain:g}%")
    for rule in new:
        print(json.dumps(rule))
    if not new or options.dry_run:
        return
    path = options.output or configs.PATH
    configs.write(in_front(new, configs.rules()), path)
    print(f"wrote {path}")
    if arch in aot.ARCHS:
        print(f"`python -m vcr_ops.triton_common.aot --arch {arch}` says whether other variants spill with it")
