"""What finished runs show: a table, files and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .loop import Run


def _by_system(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.settings.dataset, run.settings.system), []).append(run)
    return found


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(runs: Sequence[Run]) -> str:
    """A Markdown table: a line for each dataset and system."""
    lines = [
        "| dataset | system | seeds | accuracy, % | before training, % | last losses | ms a step | peak MB a step |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (dataset, system), some in _by_system(runs).items():
        ends = [statistics.mean(run.losses[-10:]) for run in some]
        lines.append(
            f"| {dataset} | {system} | {len(some)} | {_spread([run.accuracy for run in some])} "
            f"| {_spread([run.start for run in some])} | {_spread(ends)} "
            f"| {statistics.median(run.step_ms for run in some):.1f} | {some[0].peak_mb:.1f} |"
        )
    return "\n".join(lines)


def differences(runs: Sequence[Run]) -> dict[tuple[str, int], list[float]]:
    """By dataset and seed: |loss of vcr - loss of vcr-reference| at each step, where both have run."""
    by_name = {(run.settings.dataset, run.settings.system, run.settings.seed): run for run in runs}
    found = {}
    for (dataset, system, seed), run in by_name.items():
        other = by_name.get((dataset, "vcr-reference", seed))
        if system == "vcr" and other is not None:
            found[dataset, seed] = [abs(a - b) for a, b in zip(run.losses, other.losses, strict=True)]
    return found


def differences_text(runs: Sequence[Run]) -> str:
    """How far the fused path's loss is from the reference's, in lines; empty where there is nothing to compare."""
    lines = []
    for (dataset, seed), steps in differences(runs).items():
        marks = [n for n in (1, 10, 50, 100, 200, 400) if n < len(steps)] + [len(steps)]
        text = ", ".join(f"{max(steps[:n]):.1e} in the first {n}" for n in marks)
        lines.append(f"{dataset}, seed {seed}: fused and reference losses differ by at most {text} steps")
    return "\n".join(lines)


def save(runs: Sequence[Run], machine: dict[str, Any], stem: Path) -> list[Path]:
    """stem.json and stem.png; returns what was written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    found = {"kind": "train", **machine, "runs": [{**asdict(run), "settings": asdict(run.settings)} for run in runs]}
    written = [stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")]
    written[0].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _picture(runs, written[1])
    return written


def _picture(runs: Sequence[Run], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(run.settings.dataset for run in runs))
    fig = Figure(figsize=(5.5 * len(datasets) + 0.5, 7.5), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(2, len(datasets), squeeze=False)
    for column, dataset in enumerate(datasets):
        top, below = axes[:, column]
        for (of, system), some in _by_system(runs).items():
            if of != dataset:
                continue
            mean = [statistics.mean(steps) for steps in zip(*(run.losses for run in some), strict=True)]
            window = max(1, len(mean) // 40)
            smooth = [statistics.mean(mean[max(0, i - window) : i + 1]) for i in range(len(mean))]
            top.plot(smooth, label=system, linewidth=1, linestyle="--" if system == "vcr-reference" else "-")
        top.set(title=dataset, ylabel="training loss, mean over seeds", yscale="log")
        top.legend(fontsize=8)
        shown = [(seed, steps) for (of, seed), steps in differences(runs).items() if of == dataset]
        for seed, steps in shown:
            below.plot([max(x, 1e-9) for x in steps], linewidth=0.7, label=f"seed {seed}")
        below.set(xlabel="step", ylabel="|fused - reference| of the loss", yscale="log")
        if shown:
            below.legend(fontsize=8)
    fig.savefig(path, dpi=110)
