"""Results of a GPU as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import _error, _number, _ratio, case_title, cases_of, layout_text
from .passes import GpuPassRow
from .steps import GpuRow

LEGEND = """\
call: a plain call on an idle GPU, from its begin to its end there; host: until the call came back.
graph: the same step as a CUDA graph, queued, so without the host's part. Every side is captured by the same means.
× best other: the fastest alternative's graph over ours (calls, where there is no graph). × plain: the fastest plain's.
GB/s: bytes that the passes need, over the graph's time. copy: torch's copy of as many bytes in the same run.
The L2 is flushed before every call. error: against the literal equations in float64, beside PyTorch's own."""


def table(rows: Sequence[GpuRow]) -> str:
    """A heading per case, a line per side, and the reasons of those without times."""
    heads = "call ms (quartiles)", "host ms", "graph ms", "× best other", "× plain", "GB/s", "copy", "peak MB", "error"
    cells = [["", *heads]]
    for row in rows:
        if row.reason is not None:
            cells.append([row.title] + [""] * len(heads))
            continue
        error = f"{_error(row.error)} ({_error(row.plain_error)})" if row.error is not None else "–"
        cells.append(
            [
                row.title,
                f"{_number(row.median_ms)} ({_number(row.q1_ms)}–{_number(row.q3_ms)})",
                _number(row.host_ms),
                _number(row.graph_ms),
                _ratio(row.graph_ratio_best or row.ratio_best),
                _ratio(row.graph_ratio_plain_best or row.ratio_plain_best),
                _number(row.gbps),
                _number(row.copy_gbps),
                _number(row.peak_mb),
                error,
            ]
        )
    text = dict(zip(map(id, rows), layout_text(cells)[1:], strict=True))
    head = layout_text(cells)[0]
    shown = [head, "-" * len(head)]
    for case in cases_of(rows):
        shown.append(case_title(case[0]))
        reasons: dict[str, list[str]] = {}
        for row in case:
            if row.reason is not None:
                reasons.setdefault(row.reason, []).append(row.title)
                continue
            shown.append(text[id(row)])
            if row.graph_reason:
                shown.append(f"  no graph: {row.graph_reason}")
        shown += [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    return "\n".join([*shown, "", LEGEND])


def summary(rows: Sequence[GpuRow]) -> str:
    """A finished case in a line, for the progress."""
    ours = next((row for row in rows if row.role == "product"), None)
    if ours is None:
        return f"{sum(row.median_ms is not None for row in rows)} sides"
    if ours.reason is not None:
        return ours.reason
    times = f"call {_number(ours.median_ms)} ms, host {_number(ours.host_ms)}, graph {_number(ours.graph_ms)}"
    return (
        f"{times}, {_ratio(ours.graph_ratio_best or ours.ratio_best)} of {ours.graph_best_alternative or 'none'}, "
        f"{_ratio(ours.graph_ratio_plain_best or ours.ratio_plain_best)} of plain"
    )


def describe_line(results: dict[str, Any]) -> str:
    """Card, versions and commit in a sentence."""
    device, versions = results["device"], results["versions"]
    driver = device.get("nvidia_smi", {}).get("driver_version")
    commit = (results.get("commit") or "unknown")[:12]
    if results.get("uncommitted_changes"):
        commit += " with uncommitted changes"
    parts = [
        str(device["gpu"]),
        f"{device['l2_mib']:.0f} MiB L2",
        *([f"{device['peak_gbps']:.0f} GB/s peak"] if device.get("peak_gbps") else []),
        *([f"driver {driver}"] if driver else []),
        f"torch {versions['torch']}",
        *([f"triton {versions['triton']}"] if versions.get("triton") else []),
        f"commit {commit}",
        results["date"][:10],
    ]
    return ", ".join(parts)


def steps_picture(results: dict[str, Any], rows: Sequence[GpuRow], path: Path) -> None:
    """A panel per level, mode, layout and batch: the graph's time of every side (the call's, where there is no graph)
    beside a copy of the bytes that the passes need.

    ImportError without matplotlib; ValueError when nothing was timed.
    """
    panels: dict[tuple[Any, ...], list[list[GpuRow]]] = {}
    for case in cases_of([row for row in rows if row.median_ms is not None]):
        first = case[0]
        key = (first.level, first.mode, first.batch, first.dtype, first.layout)
        panels.setdefault(key, []).append(case)
    pyplot, figure, axes = _panels(len(panels))
    titles = dict.fromkeys((row.provider, row.title) for row in rows if row.median_ms is not None)
    order = [name for name, _ in titles]
    width = 0.8 / len(order)
    for axis, ((level, mode, batch, dtype, layout), cases) in zip(axes, panels.items(), strict=False):
        for place, case in enumerate(cases):
            for row in case:
                at = place + width * (order.index(row.provider) - (len(order) - 1) / 2)
                axis.bar(at, row.graph_ms or row.median_ms, width, color=_colour(order, row.provider))
                axis.plot(at, row.median_ms, "_", color="black", markersize=4)
            if case[0].copy_ms is not None:
                axis.hlines(case[0].copy_ms, place - 0.42, place + 0.42, color="black", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(cases)), [f"stage {c[0].stage}" if c[0].stage else "vcrnet50" for c in cases])
        if level == "middle":
            axis.set_yscale("log")
        what = "training" if mode == "train" else "evaluation"
        axis.set_title(f"{level}, {what}, N={batch}, {dtype}, {layout}; ms", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_colour(order, name), label=title) for name, title in titles]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--", label="copy of the bytes that the passes need"))
    handles.append(pyplot.Line2D([], [], color="black", marker="_", linestyle="", label="plain call"))
    _save(pyplot, figure, handles, results, path)


def passes_picture(results: dict[str, Any], rows: Sequence[GpuPassRow], path: Path) -> None:
    """A panel per mode, layout and batch: GB/s of every pass, stage by stage, with the copy's and the card's.

    ImportError without matplotlib; ValueError when no pass was timed.
    """
    panels: dict[tuple[Any, ...], list[GpuPassRow]] = {}
    for row in rows:
        if row.gbps is not None:
            panels.setdefault((row.mode, row.batch, row.dtype, row.layout), []).append(row)
    pyplot, figure, axes = _panels(len(panels))
    order = list(dict.fromkeys(row.name for row in rows if row.gbps is not None))
    width = 0.8 / max(len(order), 1)
    for axis, ((mode, batch, dtype, layout), found) in zip(axes, panels.items(), strict=False):
        stages = list(dict.fromkeys(row.stage for row in found))
        for row in found:
            at = stages.index(row.stage) + width * (order.index(row.name) - (len(order) - 1) / 2)
            axis.bar(at, row.gbps, width, color=_colour(order, row.name))
            if row.copy_gbps is not None:
                axis.hlines(row.copy_gbps, at - width / 2, at + width / 2, color="black", linewidth=1)
        if found[0].peak_gbps is not None:
            axis.axhline(found[0].peak_gbps, color="grey", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(stages)), [f"stage {stage}" for stage in stages])
        what = "training" if mode == "train" else "evaluation"
        axis.set_title(f"{what}, N={batch}, {dtype}, {layout}; GB/s", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_colour(order, name), label=name) for name in order]
    handles.append(pyplot.Line2D([], [], color="black", label="copy of as many bytes"))
    handles.append(pyplot.Line2D([], [], color="grey", linestyle=":", label="the card's peak"))
    _save(pyplot, figure, handles, results, path)


def _colour(order: list[str], name: str) -> str:
    colours = (*(f"C{i}" for i in range(10)), "black", "gold", "navy", "lime")
    return colours[order.index(name) % len(colours)]


def _panels(count: int) -> tuple[Any, Any, list[Any]]:
    if not count:
        raise ValueError("nothing was timed: there is nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = min(count, 4)
    high = -(-count // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(4 * wide, 2.8 * high + 1), squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.remove()
    return pyplot, figure, list(axes.flat)


def _save(pyplot: Any, figure: Any, handles: list[Any], results: dict[str, Any], path: Path) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), fontsize=8)
    figure.suptitle(describe_line(results), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
