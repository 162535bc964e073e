"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMMANDS = ("run", "tables", "passes", "overhead", "readme", "picture", "headlines", "tune", "faster", "train")
# What the defaults compile: about 20 s a stage, in training and evaluation. Fewer where that is too long.
COMPILED_STAGES = (1, 2, 3, 4)
LEFT_OUT = "left out by default, --all (of the middle also --compiled) runs it"

# ruff: noqa: E501
SAMPLE = """\
Sample of the output of `python -m benchmarks --levels middle --modes train --stages 1 --layouts contiguous`:

                     ms, median (quartiles)  × best other  × plain    GFLOP  GFLOP/s   GB/s  copy GB/s    error  PyTorch's  peak MB  faults
-------------------------------------------------------------------------------------------------------------------------------------------
middle, training step: stage 1, p=4, 56×56, N=16, float32, contiguous
vcr_ops C++                88.2 (88.2–88.2)         4.71×    0.66×    0.258     2.92   2.62       5.82  1.6e-07    1.2e-07     51.6       0
python_ref                    436 (434–440)             –    0.13×    0.232    0.533  0.530       5.82  1.7e-06    1.7e-06      161       0
python_ref compiled           428 (424–432)             –    0.14×    0.232    0.542  0.540       5.82  3.7e-07    1.3e-07      122       1
composite                     416 (416–418)             –    0.14×  1.0e-03  2.5e-03  0.556       5.82  1.4e-07    1.2e-07      180       0
composite compiled         1984 (1977–1992)             –    0.03×  1.0e-03  5.2e-04  0.117       5.82  4.8e-07    1.3e-07     70.7       1
plain ResNeXt              58.5 (57.2–58.8)             –        –        –        –      –       5.82        –          –      103       0
plain compiled                156 (152–157)             –        –        –        –      –       5.82        –          –     57.8       0

commands (none: run):
  run       time the product beside its alternatives: middle, block and network, training and evaluation
  tables    the paper's Tables 1 to 5 beside ours: parameters, GFLOPs; with --measure time and memory
  passes    each pass's bandwidth beside a copy of as many bytes, warm and cold
  overhead  what a step costs outside the kernels
  readme    write the README's table from a results file
  picture   draw a results file: latency beside the bandwidth floor
  headlines the figures that a GPU's results files are looked at for
  train     train small networks with each system on real images; also under torchrun
  tune      time configurations of the Triton kernels on this GPU, and put the fastest into the shipped table
  faster    time the Triton kernels beside the CUDA C++ ones on this GPU; with --write, put what is faster into the table
            that "auto" goes by
`run` and `passes` take --device cuda, which has options of its own.
`python -m benchmarks COMMAND --help` shows a command's options.
"""


def _common(parser: argparse.ArgumentParser, command: str, seconds: float) -> None:
    parser.add_argument(
        "--device", choices=("cpu",), default="cpu", help="cuda: on a GPU, with options of its own (add --help)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="S",
        help=f"seconds of timing per case (default: {seconds:g})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="STEM",
        help="write STEM.json, STEM.csv, STEM.png (default: benchmarks/out/COMMAND-DATE, ignored by git)",
    )
    parser.add_argument("--release", metavar="NAME", help="write to benchmarks/results/NAME.*, which is committed")
    parser.add_argument(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=command == "passes",
        help="keep freed memory in the process: no page faults in steps (default: passes alone)",
    )


def _shapes(parser: argparse.ArgumentParser, batches: str) -> None:
    from .cases import DTYPES, IMAGE_SIZE, LAYOUTS, MODES, STAGES

    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=STAGES,
        default=list(STAGES),
        help="(p, H) = (4, 56), (8, 28), (16, 14), (32, 7); default: all",
    )
    parser.add_argument("--batch", nargs="+", type=_positive, default=[16], metavar="N", help=batches)
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        default=["float32"],
        help="default: float32; float16: on a GPU alone",
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: both, the network in contiguous alone")
    parser.add_argument(
        "--image-size", type=_positive, default=IMAGE_SIZE, metavar="PIXELS", help=f"default: {IMAGE_SIZE}"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _parser(command: str) -> argparse.ArgumentParser:
    from .cases import LEVELS
    from .providers import PROVIDERS

    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks{'' if command == 'run' else ' ' + command}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description={
            "run": "Time vcr_ops beside its alternatives on real activations. The defaults take 5 minutes on 2 cores.",
            "tables": "The paper's Tables 1 to 5 beside ours: ResNeXt with each system that it compares with and every VCR "
            "variant. Parameters and GFLOPs are counted without running anything; --measure adds time and memory.",
            "passes": "Each pass's bandwidth beside a copy of as many bytes, warm and cold.",
            "overhead": "What a step of the middle costs outside the kernels: a map of a few numbers.",
            "readme": "Write the README's table from a results file, between its benchmark markers.",
            "picture": "Draw a results file: latency beside the bandwidth floor.",
            "headlines": "The figures that results of a GPU are looked at for, in a few lines.",
        }[command],
        epilog=SAMPLE if command == "run" else None,
    )
    if command == "run":
        parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="default: all")
        _shapes(parser, "batch of the middle and the block (default: 16)")
        parser.add_argument("--network-batch", nargs="+", type=_positive, default=[8], metavar="N", help="default: 8")
        parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), help="default: see --all")
        parser.add_argument(
            "--all",
            action="store_true",
            help="every provider in every case, both layouts for the network (default: compiled ones only for the "
            "contiguous float32 middle, block and network only beside the plain ResNeXt's)",
        )
        parser.add_argument(
            "--compiled",
            action="store_true",
            help="compiled providers for the float32 middle in every layout, as releases have them",
        )
        parser.add_argument(
            "--cold", action="store_true", help="time a second time with the caches flushed before every call"
        )
        parser.add_argument(
            "--min-rounds",
            type=_positive,
            metavar="N",
            help="calls of each side at least (default: 7, block 5, network 3)",
        )
        _common(parser, command, 1.0)
    elif command == "tables":
        from .cases import IMAGE_SIZE, LAYOUTS, MODES
        from .tables import TABLES

        parser.add_argument(
            "--tables", nargs="+", type=int, choices=TABLES, default=list(TABLES), help="in this order; default: all"
        )
        parser.add_argument(
            "--depths", nargs="+", type=int, choices=(50, 101), default=[50, 101], help="layers; default: both"
        )
        parser.add_argument(
            "--measure",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="time the tables' networks for images here, in turn, and see what memory they take (default: no)",
        )
        parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
        parser.add_argument("--batch", type=_positive, default=4, metavar="N", help="default: 4")
        parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
        parser.add_argument("--image-size", type=_positive, default=IMAGE_SIZE, metavar="PIXELS", help="of --measure")
        parser.add_argument("--min-rounds", type=_positive, default=5, metavar="N", help="default: 5")
        _common(parser, command, 20.0)
    elif command == "passes":
        _shapes(parser, "default: 16")
        parser.add_argument(
            "--warmth", nargs="+", choices=("warm", "cold"), default=["warm", "cold"], help="default: both"
        )
        _common(parser, command, 0.5)
    elif command == "overhead":
        from .cases import LAYOUTS, MODES

        parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
        parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
        _common(parser, command, 1.0)
    elif command == "readme":
        parser.add_argument("file", type=Path, help="a JSON file that `run` wrote")
        parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", help="default: the repository's")
    elif command == "headlines":
        parser.add_argument("files", type=Path, nargs="+", help="JSON files that `run` and `passes` wrote on a GPU")
    else:
        parser.add_argument("file", type=Path, help="a JSON file that `run` wrote")
        parser.add_argument("image", type=Path, nargs="?", help="default: the file's name with .png")
    return parser


class Progress:
    """Progress on standard error: one line that changes on a terminal, one line per finished case elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()
        self.live = sys.stderr.isatty()
        self.case = ""

    def _stamp(self) -> str:
        minutes, seconds = divmod(int(time.perf_counter() - self.start), 60)
        return f"[{self.done:>{len(str(self.total))}}/{self.total} {minutes}:{seconds:02d}]"

    def begin(self, case: str) -> None:
        self.case = case
        self.say("")

    def say(self, what: str) -> None:
        if self.live:
            line = f"{self._stamp()} {self.case}{': ' if what else ''}{what}"
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", file=sys.stderr, flush=True)

    def end(self, result: str) -> None:
        self.done += 1
        print(
            f"{chr(13) + chr(27) + '[K' if self.live else ''}{self._stamp()} {self.case}: {result}",
            file=sys.stderr,
            flush=True,
        )


def plan(options: argparse.Namespace) -> list[tuple[Any, list[Any], dict[str, str]]]:
    """(case, its providers, name -> reason of those left out), in the order to run."""
    from .cases import LAYOUTS, expand
    from .providers import PROVIDERS

    planned = []
    for level in options.levels:
        layouts = options.layouts or (["contiguous"] if level == "network" and not options.all else list(LAYOUTS))
        cases = expand(
            [level],
            options.modes,
            options.stages,
            options.batch,
            options.network_batch,
            options.dtype,
            layouts,
            options.image_size,
        )
        for case in cases:
            chosen, left_out = [], {}
            for name, provider in PROVIDERS.items():
                if options.providers is not None:
                    wanted = name in options.providers
                    reason = "not asked for"
                elif level != "middle":
                    wanted = provider.role == "product" or name == "plain"
                    reason = LEFT_OUT
                else:
                    compiled = case.dtype == "float32" and case.stage in COMPILED_STAGES
                    compiled = compiled and (options.compiled or case.layout == "contiguous")
                    wanted = provider.eager is None or compiled
                    reason = LEFT_OUT
                if wanted or (options.all and options.providers is None):
                    chosen.append(provider)
                elif options.providers is None:
                    left_out[name] = reason
            planned.append((case, chosen, left_out))
    return planned


def _stem(options: argparse.Namespace, command: str) -> Path:
    if options.release:
        return HERE / "results" / options.release
    if options.output:
        return options.output.with_suffix("") if options.output.suffix in (".json", ".csv", ".png") else options.output
    return HERE / "out" / f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _prepare(options: argparse.Namespace) -> None:
    import torch

    from .timing import keep_memory, touch_memory

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_memory()
    touch_memory(512 << 20)


def _finish(table: str, results: dict[str, Any], rows: Sequence[Any], stem: Path) -> None:
    """Print the table and where it comes from; write the files."""
    from . import report

    print(table)
    print(f"\n{report.describe_line(results)}")
    load, cores = results["machine"]["load_at_start"], results["machine"]["cores"]
    if load is not None and load > cores / 2 and results.get("timed", True):
        print(f"The machine was busy (load {load} on {cores} cores at the start): don't rely on these times.")
    written = report.save(results, rows, stem)
    if results["kind"] == "run":
        image = stem.with_name(stem.name + ".png")
        try:
            report.picture(results, rows, image)
            written.append(image)
        except (ImportError, ValueError) as error:
            print(f"no picture: {error}", file=sys.stderr)
    print(f"wrote {', '.join(map(str, written))}")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from . import report
    from .machine import describe
    from .measure import Row, run_case

    _prepare(options)
    results: dict[str, Any] = {"kind": "run", **describe(list(argv)), "keep_memory": options.keep_memory}
    planned = plan(options)
    progress = Progress(len(planned))
    rows: list[Row] = []
    try:
        for case, providers, left_out in planned:
            progress.begin(case.name)
            found = run_case(
                case,
                providers,
                left_out=left_out,
                seconds=options.seconds,
                min_rounds=options.min_rounds,
                cold=options.cold,
                say=progress.say,
            )
            rows += found
            progress.end(report.summary(found))
    except KeyboardInterrupt:
        results["interrupted"] = f"after {progress.done} of {len(planned)} cases"
        print(f"\ninterrupted {results['interrupted']}", file=sys.stderr)
    results["seconds"] = round(time.perf_counter() - progress.start, 1)
    _finish(report.terminal_table(rows), results, rows, _stem(options, "run"))
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.role == "product" and row.reason and row.reason != LEFT_OUT:
            failed.setdefault((row.title, row.reason), []).append(report.case_title(row))
    for (title, reason), cases in failed.items():
        print(f"no times for {title} in {len(cases)} cases ({cases[0]}, …): {reason}", file=sys.stderr)
    return 1 if failed or "interrupted" in results else 0


def passes(options: argparse.Namespace, argv: Sequence[str]) -> int:
    os.environ["VCR_OPS_PROFILE"] = "1"  # read when the op library is loaded
    from .cases import LAYOUTS, expand
    from .machine import describe
    from .passes import passes_table, run_passes

    _prepare(options)
    layouts = options.layouts or list(LAYOUTS)
    cases = expand(
        ["middle"], options.modes, options.stages, options.batch, [], options.dtype, layouts, options.image_size
    )
    results = {"kind": "passes", **describe(list(argv)), "keep_memory": options.keep_memory}
    rows = run_passes(
        cases, seconds=options.seconds, warmths=options.warmth, say=lambda text: print(text, file=sys.stderr)
    )
    _finish(passes_table(rows), results, rows, _stem(options, "passes"))
    return 0


def overhead(options: argparse.Namespace, argv: Sequence[str]) -> int:
    os.environ["VCR_OPS_PROFILE"] = "1"
    from .machine import describe
    from .passes import overhead_table, run_overhead

    _prepare(options)
    results = {"kind": "overhead", **describe(list(argv)), "keep_memory": options.keep_memory}
    rows = run_overhead(
        options.modes, options.layouts, seconds=options.seconds, say=lambda text: print(text, file=sys.stderr)
    )
    _finish(overhead_table(rows), results, rows, _stem(options, "overhead"))
    return 0


def tables(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from .machine import describe
    from .tables import count_row, counts_table, measure, measured_table, printed_rows

    if options.measure:
        _prepare(options)
    results = {"kind": "tables", **describe(list(argv)), "timed": options.measure, "keep_memory": options.keep_memory}
    printed = printed_rows(options.tables, options.depths)
    begin = time.perf_counter()
    rows = [count_row(row) for row in printed]
    shown = counts_table(rows)
    if options.measure:
        measured = measure(
            printed,
            modes=options.modes,
            layouts=options.layouts,
            batch=options.batch,
            seconds=options.seconds,
            min_rounds=options.min_rounds,
            image_size=options.image_size,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
        rows += measured
        shown += f"\n\n{measured_table(measured)}"
    results["seconds"] = round(time.perf_counter() - begin, 1)
    _finish(shown, results, rows, _stem(options, "tables"))
    return 0


def readme(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from . import report

    results, rows = report.load(options.file)
    changed = report.write_readme(options.readme, report.readme_table(results, rows))
    print(f"{options.readme}: {'table written' if changed else 'already says so'}")
    return 0


def picture(options: argparse.Namespace, argv: Sequence[str]) -> int:
    from . import report

    results, rows = report.load(options.file)
    image = options.image or options.file.with_suffix(".png")
    report.picture(results, rows, image)
    print(f"wrote {image}")
    return 0


def _device(command: str, argv: list[str]) -> tuple[str, list[str]]:
    """The device that ``--device`` names, and the other arguments."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", add_help=False, allow_abbrev=False)
    devices = {
        "run": ("cpu", "cuda", "rehearsal"),
        "passes": ("cpu", "cuda", "rehearsal"),
        "tune": ("cuda", "rehearsal"),
        "faster": ("cuda", "rehearsal"),
    }
    choices = devices.get(command, ("cpu",))
    parser.add_argument("--device", choices=choices, default=choices[0])
    known, rest = parser.parse_known_args(argv)
    return known.device, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (a product side is wrong or can't run) or 2 (wrong usage)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("run", argv)
    try:
        if command == "train":
            from .training.command import main as train

            return train(rest)
        device, rest = _device(command, rest)
        if command == "tune":
            from .gpu.tune import main as tune

            return tune(device, rest)
        if command == "faster":
            from .gpu.faster import main as compare

            return compare(device, rest)
        if device != "cpu":
            from .gpu.command import main as on_gpu

            return on_gpu(command, device, rest)
        if command == "headlines":
            from .gpu.headlines import headlines

            print(*headlines(_parser(command).parse_args(rest).files), sep="\n")
            return 0
        options = _parser(command).parse_args(rest)
        from .cases import check_dtypes

        check_dtypes(getattr(options, "dtype", ()), device)
        return {
            "run": run,
            "tables": tables,
            "passes": passes,
            "overhead": overhead,
            "readme": readme,
            "picture": picture,
        }[command](options, argv)
    except (RuntimeError, ValueError, ImportError, FileNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
