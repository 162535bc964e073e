"""Results as a table on the terminal, as JSON and CSV files, as the README's table and as a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .measure import R, Row

FORMAT = 1  # of the JSON file
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


def _number(value: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.01:
        return f"{value:.1e}"
    for limit, places in ((1, 3), (10, 2), (100, 1)):
        if size < limit:
            return f"{value:.{places + digits - 3}f}"
    return f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _median(row: Row) -> str:
    if row.median_ms is None:
        return "–"
    return f"{_number(row.median_ms)} ({_number(row.q1_ms)}–{_number(row.q3_ms)})"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("", lambda row: row.title),
    ("ms, median (quartiles)", _median),
    ("× best other", lambda row: _ratio(row.ratio_best)),
    ("× plain", lambda row: _ratio(row.ratio_plain)),
    ("GFLOP", lambda row: _number(row.gflop)),
    ("GFLOP/s", lambda row: _number(row.gflops)),
    ("GB/s", lambda row: _number(row.gbps)),
    ("copy GB/s", lambda row: _number(row.copy_gbps)),
    ("error", lambda row: _error(row.error)),
    ("PyTorch's", lambda row: _error(row.plain_error)),
    ("peak MB", lambda row: _number(row.peak_mb)),
    ("faults", lambda row: "–" if row.faults is None else f"{row.faults:.0f}"),
)
COLD_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cold ms", lambda row: _number(row.cold_ms)),
    ("cold copy ms", lambda row: _number(row.cold_copy_ms)),
)
LEGEND = """\
× best other: the fastest alternative's median over ours.
× plain: the plain ResNeXt side's median (eager; in a middle, its BatchNorm + ReLU) over this one's.
GB/s: bytes that the passes need, over the time. copy: torch's copy of as many bytes in the same run.
GFLOP: by torch's counter, where a multiply-add is two and elementwise PyTorch ops are none.
peak: torch's allocations of one step, outputs and gradients included.
error: against the literal equations in float64, of the tensor (output or gradient) nearest to its limit.
PyTorch's: the same of the literal equations in the case's own type. faults: minor page faults a call."""


def case_title(row: Any) -> str:
    """The case that a row (of any of the commands) belongs to, as a heading."""
    place = f"stage {row.stage}, p={row.p}, {row.height}×{row.height}" if row.stage else "vcrnet50"
    what = "training step" if row.mode == "train" else "evaluation"
    return f"{row.level}, {what}: {place}, N={row.batch}, {row.dtype}, {row.layout}"


def summary(rows: Iterable[Row]) -> str:
    """A case's outcome in one line, for the progress display."""
    parts = []
    for row in rows:
        if row.role != "product":
            continue
        if row.reason:
            parts.append(row.reason)
            continue
        part = f"{_number(row.median_ms)} ms"
        if row.ratio_best is not None:
            part += f", {_ratio(row.ratio_best)} {row.best_alternative}"
        if row.ratio_plain is not None:
            part += f", {_ratio(row.ratio_plain)} plain"
        parts.append(part)
    return "; ".join(parts) or "done"


def layout_text(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def terminal_table(rows: Iterable[Row]) -> str:
    """All rows in one table, a heading before each case's; sides without times say why."""
    rows = list(rows)
    if not rows:
        return "nothing was measured"
    columns = COLUMNS + (COLD_COLUMNS if any(row.cold_ms is not None for row in rows) else ())
    cells = [[title for title, _ in columns]]
    cells += [
        [show(row) for _, show in columns] if row.reason is None else [row.title] + [""] * (len(columns) - 1)
        for row in rows
    ]
    text = layout_text(cells)
    shown, before = [text[0], "-" * len(text[0])], None
    width = max(len(line[0]) for line in cells)
    reasons: dict[str, list[str]] = {}
    for row, line in zip(rows, text[1:], strict=True):
        if case_title(row) != before:
            before = case_title(row)
            shown += [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
            shown.append(before)
            reasons = {}
        if row.reason is None:
            shown.append(line)
        elif row.role == "product":
            shown.append(f"{row.title:{width}}  {row.reason}")
        else:
            reasons.setdefault(row.reason, []).append(row.title)
    shown += [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    return "\n".join([*shown, "", LEGEND])


# Files


def save(results: dict[str, Any], rows: Sequence[Any], stem: Path) -> list[Path]:
    """Write STEM.json (description and rows) and STEM.csv (rows); returns the paths. ``rows`` are dataclass objects of
    one kind.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    objects = [dataclasses.asdict(row) for row in rows]
    json_path, csv_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".csv")
    json_path.write_text(
        json.dumps({"format": FORMAT, **results, "rows": objects}, indent=1, ensure_ascii=False) + "\n"
    )
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in dataclasses.fields(rows[0])] if rows else [])
        writer.writeheader()
        writer.writerows(objects)
    return [json_path, csv_path]


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The description and the rows of a file that ``save`` wrote. ValueError if it is another one's."""
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or results.get("kind") != "run":
        raise ValueError(f"{path} is not a results file of `python -m benchmarks` (format {FORMAT})")
    rows = [Row(**row) for row in results.pop("rows")]
    return results, rows


# README


def cases_of(rows: Iterable[R]) -> list[list[R]]:
    """Rows case by case, in order."""
    cases: dict[tuple[Any, ...], list[R]] = {}
    for row in rows:
        key = (row.level, row.mode, row.stage, row.batch, row.dtype, row.layout, row.threads, row.height)
        cases.setdefault(key, []).append(row)
    return list(cases.values())


def describe_line(results: dict[str, Any]) -> str:
    """Machine, versions and commit in a sentence."""
    machine, versions = results["machine"], results["versions"]
    isa = f", {versions['active_isa']} kernels" if versions.get("active_isa") else ""
    commit = (results.get("commit") or "unknown")[:12]
    if results.get("uncommitted_changes"):
        commit += " with uncommitted changes"
    cache = f"{machine['last_level_cache_mib']:.0f} MiB last-level cache"
    took = f"; took {results['seconds']:.0f} s" if "seconds" in results else ""
    return (
        f"{machine['cpu']}, {results['threads']} threads on {machine['cores']} cores, {cache}{isa}; "
        f"torch {versions['torch']}; commit {commit}; {results['date'][:10]}{took}."
    )


def readme_table(results: dict[str, Any], rows: Sequence[Row]) -> str:
    """Markdown: a line per case and product side, then how it was made."""
    heads = (
        "case",
        "layout",
        "ours, ms",
        "best other, ms",
        "ratio",
        "plain, ms",
        "ratio",
        "GB/s (copy)",
        "error (PyTorch's)",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for case in cases_of(rows):
        timed = {row.provider: row for row in case if row.median_ms is not None}
        plain = min((r for r in timed.values() if r.role == "plain"), key=lambda r: r.median_ms or 0, default=None)
        for row in case:
            if row.role != "product":
                continue
            place = f"stage {row.stage} (p={row.p}, {row.height}²)" if row.stage else "vcrnet50"
            name = f"{row.level}, {'training' if row.mode == 'train' else 'evaluation'}, {place}, N={row.batch}"
            if row.dtype != "float32":
                name += f", {row.dtype}"
            best = timed.get(row.best_alternative or "")
            gbps = "–" if row.gbps is None else f"{_number(row.gbps)} ({_number(row.copy_gbps)})"
            cells = (
                name,
                row.layout,
                _number(row.median_ms) if row.reason is None else row.reason,
                f"{_number(best.median_ms)} ({best.title})" if best else "–",
                _ratio(row.ratio_best),
                f"{_number(plain.median_ms)} ({'compiled' if plain.provider.endswith('compiled') else 'eager'})"
                if plain
                else "–",
                _ratio(row.ratio_plain_best),
                gbps,
                f"{_error(row.error)} ({_error(row.plain_error)})",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += [
        "",
        describe_line(results),
        "Ratios are the other's median time over ours. *Best other*: the fastest of the literal equations and of the "
        "same algebra in PyTorch ops, eager or compiled. *Plain*: BatchNorm + ReLU where the case is a middle, else "
        "the ResNeXt block or network without reasoning; the fastest of those measured. *GB/s*: bytes that the passes "
        "need over the time, beside a copy of as many bytes. *Error*: relative, against float64, of the output or "
        "gradient nearest to its limit, beside that of plain PyTorch in the same type.",
        "",
        f"Reproduce with `{results['command']}`.",
    ]
    return "\n".join(lines)


def write_readme(readme: Path, table: str) -> bool:
    """Replace what stands between the markers; returns whether the file changed. ValueError without exactly one pair of
    markers.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} needs one line {BEGIN} and after it one line {END}")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = f"{head}{BEGIN}\n{table}\n{END}{tail}"
    if new != text:
        readme.write_text(new)
    return new != text


# Picture


def picture(results: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Latency of every side of the middle beside the bandwidth floor: the time of a copy of the bytes that the passes
    need.

    ImportError without matplotlib; ValueError when no middle was timed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[Any, ...], list[list[Row]]] = {}
    for case in cases_of(row for row in rows if row.level == "middle" and row.median_ms is not None):
        first = case[0]
        panels.setdefault((first.mode, first.layout, first.batch, first.dtype), []).append(case)
    if not panels:
        raise ValueError("no middle was timed: there is nothing to draw")
    wide = min(len(panels), 2)
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(6 * wide, 3.8 * high), squeeze=False, layout="constrained")
    providers = list(dict.fromkeys((row.provider, row.title) for row in rows if row.level == "middle"))
    colours = {name: f"C{i}" for i, (name, _) in enumerate(providers)}
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((mode, layout, batch, dtype), cases) in zip(axes.flat, panels.items(), strict=False):
        for place, case in enumerate(cases):
            width = 0.8 / len(providers)
            for row in case:
                if row.median_ms is None or row.q1_ms is None or row.q3_ms is None:
                    continue
                at = place + width * ([name for name, _ in providers].index(row.provider) - (len(providers) - 1) / 2)
                axis.bar(at, row.median_ms, width, color=colours[row.provider])
                axis.vlines(at, row.q1_ms, row.q3_ms, color="black", linewidth=0.8)
            if case[0].copy_ms is not None:
                axis.hlines(case[0].copy_ms, place - 0.42, place + 0.42, color="black", linestyle="--", linewidth=1.2)
        axis.set_xticks(
            range(len(cases)), [f"stage {case[0].stage}\np={case[0].p}, {case[0].height}²" for case in cases]
        )
        axis.set_yscale("log")
        axis.set_ylabel("ms, median and quartiles")
        axis.set_title(
            f"middle, {'training step' if mode == 'train' else 'evaluation'}, N={batch}, {dtype}, {layout}", fontsize=10
        )
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[name], label=title) for name, title in providers]
    handles.append(pyplot.Line2D([], [], color="black", linestyle="--", label="copy of the bytes that the passes need"))  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), fontsize=8)
    figure.suptitle(describe_line(results), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
