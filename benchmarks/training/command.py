"""The command line of ``python -m benchmarks train``, alone or under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..machine import describe
from . import report
from .data import DATASETS
from .loop import Run, run
from .processes import started
from .settings import DTYPES, SYSTEMS, Settings

DEFAULT = Settings("vcr", "digits")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks train",
        description="Train small networks with each system on real images that need no download, with equal "
        "settings, and print accuracy, time and memory. A run that was stopped goes on from its checkpoint, to the "
        "same bits. Under torchrun the batch is divided among the processes: "
        "torchrun --nproc-per-node 2 --max-restarts 3 -m benchmarks train.",
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all, in order")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS), help="default: both")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 (default: 5)")
    parser.add_argument("--steps", type=int, default=DEFAULT.steps, help=f"default: {DEFAULT.steps}")
    parser.add_argument("--batch", type=int, default=DEFAULT.batch, help=f"of all processes (default: {DEFAULT.batch})")
    parser.add_argument("--lr", type=float, default=DEFAULT.lr, help=f"at its peak (default: {DEFAULT.lr})")
    parser.add_argument(
        "--ema", type=float, default=DEFAULT.ema, help=f"decay of averaged weights (default: {DEFAULT.ema})"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DEFAULT.dtype, help=f"default: {DEFAULT.dtype}")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/out/train"), help="of the checkpoints")
    parser.add_argument("--every", type=int, default=50, metavar="STEPS", help="between checkpoints (default: 50)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", type=Path, metavar="STEM", help="STEM.json, STEM.png (default: FOLDER/results)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 2 with a line on standard error."""
    options = _parser().parse_args(argv)
    try:
        for name in ("seeds", "every"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name} is {getattr(options, name)}; it takes 1 or more")
        settings = [
            Settings(
                system, dataset, seed, options.steps, options.batch, options.lr, ema=options.ema, dtype=options.dtype
            )
            for dataset in options.datasets
            for seed in range(options.seeds)
            for system in sorted(options.systems, key=SYSTEMS.index)
        ]
        return _train(options, settings, list(argv))
    except (ValueError, RuntimeError) as error:
        if "WORLD_SIZE" in os.environ:
            raise  # torchrun reports it with the rank
        print(f"benchmarks train: {error}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace, settings: Sequence[Settings], argv: list[str]) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    with started() as processes:

        def say(text: str) -> None:
            if processes.rank == 0:
                print(f"[{len(runs) + 1}/{len(settings)}] {text}", file=sys.stderr, flush=True)

        for each in settings:
            runs.append(run(each, options.folder, processes, options.every, say))  # noqa: PERF401 - say counts them
        if processes.rank != 0:
            return 0
        machine = {**describe(["train", *argv]), "processes": processes.size}
    print(report.table(runs))
    print(report.differences_text(runs))
    written = report.save(runs, machine, options.output or options.folder / "results")
    print(f"wrote {', '.join(map(str, written))}")
    return 0
