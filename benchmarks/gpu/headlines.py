"""The figures that a run is looked at for, in a few lines. It reads results files alone, and imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def headlines(paths: Iterable[Path]) -> list[str]:
    """A line per figure of the results files that are there."""
    lines: list[str] = []
    for path in paths:
        try:
            results = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            lines.append(f"{path.name}: {type(error).__name__}")
            continue
        of_kind = {"gpu-passes": passes_lines, "gpu-run": run_lines, "gpu-faster": faster_lines}
        found = of_kind.get(results.get("kind"), lambda rows: [])(results["rows"])
        backend = results.get("backend")
        lines += [f"{backend}: {line}" if backend else line for line in found]
        if results.get("left_out"):
            lines.append(f"{path.name}: {results['left_out']}")
    return lines


def place(row: Row) -> str:
    stage = f"stage {row['stage']}, " if row["stage"] else ""
    return f"{stage}N={row['batch']}, {row['layout']}"


def passes_lines(rows: list[Row]) -> list[str]:
    lines = []
    timed = [row for row in rows if row["gbps"] and row["copy_gbps"]]
    for mode, what in (("train", "training"), ("eval", "evaluation")):
        found = [row for row in timed if row["mode"] == mode and not row["fits_l2"]]
        for name in dict.fromkeys(row["name"] for row in found):
            worst = min((r for r in found if r["name"] == name), key=lambda r: r["gbps"] / r["copy_gbps"])
            peak = f", {worst['gbps'] / worst['peak_gbps']:.0%} of the peak" if worst["peak_gbps"] else ""
            lines.append(
                f"{what}, {name}: at least {worst['gbps'] / worst['copy_gbps']:.0%} of a copy past the L2 "
                f"({place(worst)}: {worst['gbps']:.0f} GB/s{peak})"
            )
        launches: dict[str, float] = {}
        for row in rows:
            if row["mode"] == mode:
                launches[place(row)] = launches.get(place(row), 0) + row["launches"]
        if launches:
            most = max(launches, key=lambda name: launches[name])
            lines.append(f"{what} step of the middle: at most {launches[most]:g} launches ({most})")
    return lines


def run_lines(rows: list[Row]) -> list[str]:
    lines = []
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("level", "mode", "stage", "batch", "dtype", "layout"))
        cases.setdefault(key, {})[row["provider"]] = row
    groups: dict[tuple[str, str, int], list[dict[str, Row]]] = {}
    for (level, mode, _, batch, *_), case in cases.items():
        groups.setdefault((level, mode, batch), []).append(case)
    for (level, mode, batch), found in groups.items():
        title = f"{level}, {'training' if mode == 'train' else 'evaluation'}, N={batch}"
        wrong = [case["fused"]["reason"] for case in found if case.get("fused", {}).get("reason")]
        if wrong:
            lines.append(f"{title}: no times in {len(wrong)} of {len(found)} cases: {wrong[0]}")
        ours = [case["fused"]["graph_ms"] for case in found if case.get("fused", {}).get("graph_ms")]
        if not ours:
            continue
        parts = [f"graph {_span(ours, 1e3)} µs"]
        calls = [case["fused"]["median_ms"] for case in found if case.get("fused", {}).get("graph_ms")]
        parts.append(f"call {_span(calls, 1e3)} µs")
        rivals = ["plain", "plain_compiled", "plain_max_autotune"]
        if level == "middle":
            parts += _ratios("eager python_ref", found, ["reference"])
            names = [f"{base}_{way}" for base in ("reference", "composite") for way in ("compiled", "max_autotune")]
            parts += _ratios("best torch.compile", found, names)
        parts += _ratios("plain, eager", found, rivals[:1])
        parts += _ratios("plain, compiled", found, rivals[1:])
        lines.append(f"{title}: {', '.join(parts)}")
    return lines


def faster_lines(rows: list[Row]) -> list[str]:
    """How the backends stand to each other, by mode, dtype and batch: the first's time over each other's."""
    lines = []
    groups: dict[tuple[str, str, int], dict[Any, dict[str, Row]]] = {}
    for row in rows:
        case = groups.setdefault((row["mode"], row["dtype"], row["batch"]), {})
        case.setdefault((row["stage"], row["layout"]), {})[row["provider"]] = row
    for (mode, dtype, batch), cases in groups.items():
        title = f"{'training' if mode == 'train' else 'evaluation'}, {dtype}, N={batch}"
        wrong = [row["reason"] for case in cases.values() for row in case.values() if row.get("reason")]
        if wrong:
            lines.append(f"{title}: {len(wrong)} without times or say: {wrong[0]}")
        first, *others = next(iter(cases.values()))
        for other in others:
            timed = [
                case[first]["graph_ms"] / case[other]["graph_ms"]
                for case in cases.values()
                if all(case.get(name, {}).get("graph_ms") for name in (first, other))
            ]
            if timed:
                lines.append(f"{title}: {other} is {_span(timed)}× as fast as {first}, in {len(timed)} cases")
    return lines


def _ratios(title: str, cases: list[dict[str, Row]], names: list[str]) -> list[str]:
    """The lowest and the highest ratio of the fastest of the named sides to ours, both as graphs."""
    ratios = []
    for case in cases:
        others = [case[name]["graph_ms"] for name in names if case.get(name, {}).get("graph_ms")]
        own = case.get("fused", {}).get("graph_ms")
        if others and own:
            ratios.append(min(others) / own)
    return [f"{_span(ratios)}× {title} ({len(ratios)} of {len(cases)})"] if ratios else []


def _span(values: list[float], scale: float = 1.0) -> str:
    low, high = (
        f"{value * scale:.3g}" if value * scale < 100 else f"{value * scale:.0f}"
        for value in (min(values), max(values))
    )
    return low if low == high else f"{low} to {high}"
