"""The command line on a GPU: ``python -m benchmarks --device cuda --help``."""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..cases import DTYPES, IMAGE_SIZE, LAYOUTS, LEVELS, MODES, STAGES, Case, check_dtypes, expand
from ..machine import describe
from ..photographs import image_batch, images_for
from ..providers import Provider
from ..report import save
from . import report
from .budget import Budget
from .cuda import Cuda
from .device import Device
from .headlines import headlines
from .passes import GpuPassRow, measure, share, table
from .providers import gpu_providers
from .rehearsal import Rehearsal
from .steps import GpuRow, run_case

T = TypeVar("T")
DEVICES: dict[str, type[Cuda] | type[Rehearsal]] = {"cuda": Cuda, "rehearsal": Rehearsal}
OUT = Path(__file__).resolve().parent.parent / "out"
COMPILED_STAGES = (1, 3)
LEFT_OUT = "left out by default, --all runs it"
BEGIN_WITH = 5.0  # seconds of what --compiled-first gives: with less, no compilation is begun
# What a case takes without compiling; a guess, until one has been seen. Compiling has what the cases to come leave.
CASE_SECONDS = {"middle": 2.0, "block": 2.0, "network": 12.0}


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {command} --device DEVICE".replace(" run ", " "),
        description={
            "run": "Time vcr_ops on a GPU beside its alternatives: middle, block and network; each side as a plain "
            "call and as a replayed CUDA graph.",
            "passes": "Each pass's bandwidth on a GPU beside a copy of as many bytes and the card's peak.",
        }[command],
    )
    add = parser.add_argument
    add("--backend", metavar="NAME", help="of vcr_ops: triton (default) or cuda")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES), help="default: all")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    add("--dtype", nargs="+", choices=tuple(DTYPES), default=["bfloat16"], help="default: bfloat16")
    add("--image-size", type=int, default=IMAGE_SIZE, metavar="PIXELS", help=f"default: {IMAGE_SIZE}")
    add(
        "--output",
        type=Path,
        metavar="STEM",
        help="write STEM.json, STEM.csv, STEM.png (default: benchmarks/out/COMMAND-DATE)",
    )
    if command == "passes":
        add("--batch", nargs="+", type=int, default=[256], metavar="N", help="default: 256")
        add("--runs", type=int, default=10, metavar="R", help="steps and copies per case (default: 10)")
        add("--seconds", type=float, default=120.0, metavar="S", help="begin no case after so long (default: 120)")
        return parser
    add("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="default: all")
    add("--batch", nargs="+", type=int, default=[1, 16, 256], metavar="N", help="of the middle (default: 1 16 256)")
    add("--block-batch", nargs="+", type=int, default=[256], metavar="N", help="default: 256")
    add("--network-batch", nargs="+", type=int, default=[128], metavar="N", help="default: 128")
    add("--providers", nargs="+", metavar="NAME", help="sides by name, 'fused' being ours (default: see --all)")
    add(
        "--all",
        action="store_true",
        help="every side in every case (default: compiled ones for middles of the largest batch, stages 1 and 3; "
        "max-autotune, and ours and the plain one compiled, for the first stage and layout; block and network only "
        "beside the plain ResNeXt's)",
    )
    add("--seconds", type=float, default=240.0, metavar="S", help="for everything; what isn't left is left out")
    add(
        "--compiled-first",
        type=float,
        default=0.0,
        metavar="S",
        help="begin with the compiled sides of the first stage and layout, largest batch, and give them S of the "
        "seconds (default: 0, they come last)",
    )
    add("--case-seconds", type=float, default=0.3, metavar="S", help="of timing per case (default: 0.3)")
    return parser


def plan(options: argparse.Namespace, providers: dict[str, Provider]) -> list[tuple[Case, list[Provider], list[str]]]:
    """(case, its sides, the names of those left out): first what compiles nothing, at last what may take all the time
    that is left. With --compiled-first, the cases of :func:`begins` before all of them.
    """
    batches = {"middle": options.batch, "block": options.block_batch, "network": options.network_batch}
    planned = []
    for level in options.levels:
        for batch in sorted(batches[level]):
            for case in expand(
                [level],
                options.modes,
                options.stages,
                [batch],
                [batch],
                options.dtype,
                options.layouts,
                options.image_size,
            ):
                names = set(options.providers or providers)
                if options.providers is None and not options.all:
                    names = {name for name, provider in providers.items() if _by_default(case, provider, options)}
                chosen = [provider for name, provider in providers.items() if name in names]
                left_out = [] if options.providers else [name for name in providers if name not in names]
                planned.append((case, chosen, left_out))

    def slowness(entry: tuple[Case, list[Provider], list[str]]) -> tuple[bool, bool, bool]:
        case, chosen, _ = entry
        compiled = [provider for provider in chosen if provider.eager is not None]
        first = options.compiled_first > 0 and bool(compiled) and begins(case, options)
        return not first, bool(compiled), any(provider.compile_mode is not None for provider in compiled)

    return sorted(planned, key=slowness)


def begins(case: Case, options: argparse.Namespace) -> bool:
    """True for the middles that --compiled-first begins with."""
    place = (case.level, case.batch, case.stage, case.layout, case.dtype)
    return place == ("middle", max(options.batch), options.stages[0], options.layouts[0], options.dtype[0])


def shares(cases: Sequence[Case], options: argparse.Namespace) -> list[float]:
    """Of the time of --compiled-first, what has gone by the end of each of its cases; training has twice as much."""
    weights = [2.0 if case.mode == "train" else 1.0 for case in cases]
    return [options.compiled_first * sum(weights[: i + 1]) / sum(weights) for i in range(len(weights))]


def _by_default(case: Case, provider: Provider, options: argparse.Namespace) -> bool:
    if case.level != "middle":
        return provider.name in ("fused", "plain")
    if provider.eager is None:
        return True
    if case.batch != max(options.batch):
        return False
    if provider.compile_mode is None and provider.role == "alternative":
        return case.stage in COMPILED_STAGES
    return case.stage == options.stages[0] and case.layout == options.layouts[0]


class Results:
    """A results file that is written anew after every case, so that what ends early leaves what it has."""

    def __init__(self, kind: str, device: Device, argv: list[str], stem: Path) -> None:
        self.stem, self.device = stem, device
        self.rows: list[Any] = []
        self.failed = 0
        self.about: dict[str, Any] = {
            "kind": f"gpu-{kind}",
            **({} if kind == "faster" else {"backend": device.backend}),
            **describe(argv),
            "device": device.describe(),
            "images": "photographs" if images_for(device.name) is image_batch else "noise",
        }
        self.about["versions"]["triton"] = _triton()

    def add(self, rows: Sequence[Any]) -> None:
        self.rows += rows
        part = self.stem.with_name(self.stem.name + ".part")
        for path in save(self.about, self.rows, part):
            os.replace(path, path.with_name(path.name.replace(".part", "", 1)))

    def finish(self, seconds: float, draw: Callable[[dict[str, Any], list[Any], Path], None]) -> None:
        """Write the files for good, and the picture; print where they are and the headlines."""
        self.about["seconds"] = round(seconds, 1)
        self.about["device_at_end"] = self.device.describe()  # its clocks and temperature now
        self.add([])
        image = self.stem.with_name(self.stem.name + ".png")
        try:
            draw(self.about, self.rows, image)
        except (ImportError, ValueError) as error:
            print(f"no picture: {error}", flush=True)
        print(f"\n{report.describe_line(self.about)}; took {seconds:.0f} s")
        print(f"wrote {self.stem}.json, .csv{', .png' if image.is_file() else ''}\n")
        for line in headlines([self.stem.with_name(self.stem.name + ".json")]):
            print(line)


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the code within as Ctrl-C does, so that it can write what it has."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_time(cases: Sequence[T], budget: Budget, results: Results) -> Iterator[tuple[int, T]]:
    """The cases with their numbers, until the time is over; how many are left out is noted."""
    for number, case in enumerate(cases):
        if budget.left <= 0:
            results.about["left_out"] = f"{len(cases) - number} of {len(cases)} cases: out of time"
            print(results.about["left_out"], flush=True)
            return
        results.about["left_out"] = f"interrupted in case {number + 1} of {len(cases)}"  # if it ends here
        yield number, case
        del results.about["left_out"]


def _stem(options: argparse.Namespace, command: str) -> Path:
    if options.output is not None:
        return options.output.with_suffix("") if options.output.suffix in (".json", ".csv", ".png") else options.output
    return OUT / f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def run(options: argparse.Namespace, device: Device, results: Results, budget: Budget) -> None:
    providers = gpu_providers(device)
    unknown = set(options.providers or ()) - providers.keys()
    if unknown:
        raise ValueError(f"there is no provider {min(unknown)!r}; there are {', '.join(providers)}")
    planned = plan(options, providers)
    expected = dict(CASE_SECONDS)
    first = [case for case, *_ in planned if options.compiled_first > 0 and begins(case, options)]
    ends = shares(first, options)
    for number, (case, chosen, left_out) in in_time(planned, budget, results):
        left = budget.left
        if number < len(first):
            budget.reserve(budget.seconds - ends[number])
        else:
            budget.reserve(sum(expected[later.level] for later, *_ in planned[number:]))
        budget.begin_with = BEGIN_WITH if number < len(first) else None
        rows = run_case(
            case,
            device,
            chosen,
            left_out={name: (providers[name], LEFT_OUT) for name in left_out},
            budget=budget,
            seconds=options.case_seconds,
            peak_gbps=results.about["device"].get("peak_gbps"),
        )
        results.add(rows)
        expected[case.level] = left - budget.left - sum(row.compile_s or 0.0 for row in rows)
        results.failed += any(row.role == "product" and _failed(row) for row in rows)
        print(f"{_stamp(number, len(planned), budget)} {case.name}: {report.summary(rows)}", flush=True)


def _failed(row: GpuRow) -> bool:
    return row.reason is not None and row.reason != LEFT_OUT and not row.reason.startswith("no time left")


def _stamp(number: int, cases: int, budget: Budget) -> str:
    return f"[{number + 1}/{cases} {budget.seconds - budget.left:.0f} s]"


def passes(options: argparse.Namespace, device: Device, results: Results, budget: Budget) -> None:
    provider = gpu_providers(device)["fused"]
    cases = expand(
        ["middle"], options.modes, options.stages, options.batch, [], options.dtype, options.layouts, options.image_size
    )
    peak = results.about["device"].get("peak_gbps")
    for number, case in in_time(cases, budget, results):
        rows: list[GpuPassRow] = []
        try:
            rows = measure(case, device, provider, runs=options.runs, peak_gbps=peak)
            outcome = ", ".join(f"{row.name} {share(row.gbps, row.copy_gbps)}" for row in rows if row.gbps)
        except Exception as error:
            results.failed += 1
            outcome = f"failed: {type(error).__name__}: {error}"
        results.add(rows)
        print(f"{_stamp(number, len(cases), budget)} {case.name}: of copy: {outcome}", flush=True)


def main(command: str, device_name: str, argv: Sequence[str]) -> int:
    """Run ``run`` or ``passes`` on a device; returns the exit status: 0, or 1 where a product side is wrong or can't
    run, or the run was interrupted.
    """
    options = _parser(command).parse_args(list(argv))
    budget = Budget(options.seconds)
    device: Device = DEVICES[device_name]()
    check_dtypes(options.dtype, device.name)
    if options.backend is not None:
        if options.backend not in device.backends:
            raise ValueError(f"--backend is {options.backend!r}; it takes one of {', '.join(device.backends)}")
        device.backend = options.backend
    words = [] if command == "run" else [command]
    results = Results(command, device, [*words, "--device", device_name, *argv], _stem(options, command))
    with terminable():
        try:
            {"run": run, "passes": passes}[command](options, device, results, budget)
        except KeyboardInterrupt:
            results.failed += 1
            print(results.about["left_out"], flush=True)
        show: Callable[[list[Any]], str] = report.table if command == "run" else table
        print(show(results.rows))
        draw: Callable[..., None] = report.steps_picture if command == "run" else report.passes_picture
        results.finish(budget.seconds - budget.left, draw)
    sys.stdout.flush()
    return 1 if results.failed else 0
