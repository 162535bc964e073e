"""``python -m benchmarks faster --device cuda``: Triton and CUDA C++ side by side, and the table that "auto" goes by.

Every stage, memory format, dtype and batch, training and evaluation, each as a replayed CUDA graph from a flushed L2,
in turn; in such an order that a run which is cut short has seen the largest and the smallest batch at every stage. A
side whose results aren't the other's but for rounding has no say: the case is reported, and left out of the table.
``--write`` puts the outcome into vcr_ops/faster.json, in the place of the same cases alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vcr_ops import faster
from vcr_ops.maps import acc_dtype

from ..cases import DTYPES, IMAGE_SIZE, LAYOUTS, MODES, STAGES, Case, check_dtypes, expand
from ..correctness import timed_inputs
from ..providers import Workload
from ..report import _number, case_title, layout_text
from .budget import Budget
from .command import DEVICES, Results, _stem, in_time, terminable
from .device import Device
from .providers import product_of
from .steps import GpuRow, Sides, _time

BATCHES = (1, 8, 64, 256)
# Of a tensor's largest element. Gradients of parameters are sums over the whole batch in another order, and small
# beside their terms.
ROUNDING = {"bfloat16": 0.05, "float16": 0.01, "float32": 1e-3}


@dataclass
class FasterRow(GpuRow):
    """One backend of a case. winner: the faster one, or None where they disagree or one has no times."""

    winner: str | None = None


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks faster --device DEVICE",
        description="Time Triton's kernels beside CUDA C++'s, and say which backend is the faster where. The "
        "table that auto goes by is written only with --write.",
    )
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    add("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES), help="default: all")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    add("--dtype", nargs="+", choices=tuple(DTYPES), help="default: bfloat16 float32 float16 (on the CPU not the last)")
    add("--batch", nargs="+", type=int, default=list(BATCHES), metavar="N", help="default: 1 8 64 256")
    add("--image-size", type=int, default=IMAGE_SIZE, metavar="PIXELS", help=f"default: {IMAGE_SIZE}")
    add("--seconds", type=float, default=240.0, metavar="S", help="begin no case after so long (default: 240)")
    add("--case-seconds", type=float, default=0.1, metavar="S", help="of timing per case (default: 0.1)")
    add(
        "--output", type=Path, metavar="STEM", help="write STEM.json and STEM.csv (default: benchmarks/out/faster-DATE)"
    )
    add("--write", action="store_true", help="put what is faster into vcr_ops/faster.json, case by case")
    return parser.parse_args(list(argv))


def in_order(cases: Sequence[Case]) -> list[Case]:
    """The largest batch and the smallest before those between, float16 after all others; else the given order."""
    batches = sorted({case.batch for case in cases})
    ranks = {batch: rank for rank, batch in enumerate([batches[-1], *batches[:-1]])}
    dtypes = list(dict.fromkeys(case.dtype for case in cases))

    def place(case: Case) -> tuple[bool, bool, int, int]:
        rank = ranks[case.batch]
        return case.dtype == "float16", rank > 1, dtypes.index(case.dtype), rank

    return sorted(cases, key=place)


def compare(case: Case, device: Device, seconds: float) -> list[FasterRow]:
    """Rows of one case, one per backend of the device."""
    providers = [product_of(device, backend, name=backend) for backend in device.backends]
    sides = Sides(case, device, providers, {})
    sides.rows = {name: FasterRow(**vars(row)) for name, row in sides.rows.items()}
    inputs = timed_inputs(case, device.name)
    for provider in providers:
        sides.build(provider, inputs)
    rows = [row for row in sides.rows.values() if isinstance(row, FasterRow)]
    worst = disagreement([sides.workloads[provider.name] for provider in sides.running()], case)
    if worst is not None:
        for row in rows:
            row.reason = row.reason or f"the backends disagree: {worst}"
    _time(sides, seconds)
    if all(row.graph_ms is not None and row.reason is None for row in rows):
        winner = min(rows, key=lambda row: row.graph_ms or 0.0).provider
        for row in rows:
            row.winner = winner
    sides.workloads.clear()
    device.free()
    return rows


def disagreement(workloads: list[Workload], case: Case) -> str | None:
    """The tensor in which two sides differ by more than rounding, or None."""
    if len(workloads) < 2:
        return None
    first, second = (workload.tensors() for workload in workloads)
    for name, x in first.items():
        acc = acc_dtype(x.dtype)
        scale = x.to(acc).abs().amax().clamp_min(1e-30)
        difference = float(((x.to(acc) - second[name].to(acc)).abs().amax() / scale).nan_to_num(float("inf")))
        if difference > ROUNDING[case.dtype]:
            return f"{name} by {difference:.2g} of its largest element"
    return None


def entries(rows: Sequence[FasterRow], arch: str) -> list[dict[str, object]]:
    """Rows of the table: what won, and the other's time over its."""
    found: list[dict[str, object]] = []
    for row in rows:
        if row.winner != row.provider or row.graph_ms is None:
            continue
        others = [r.graph_ms for r in rows if case_title(r) == case_title(row) and r is not row and r.graph_ms]
        size = faster.Size(
            "training" if row.mode == "train" else "evaluation",
            row.dtype,
            row.layout,
            row.batch,
            32 * row.p,
            row.height * row.height,
        )
        found.append(
            {"arch": arch, **size._asdict(), "backend": row.provider, "ratio": round(min(others) / row.graph_ms, 3)}
        )
    return found


def table(rows: Sequence[FasterRow]) -> str:
    """A line per case: both times, and the other's over the winner's."""
    names = list(dict.fromkeys(row.provider for row in rows))
    cells = [["case", *(f"{name}, graph ms" for name in names), "faster", "by"]]
    cases: dict[str, dict[str, FasterRow]] = {}
    for row in rows:
        cases.setdefault(case_title(row), {})[row.provider] = row
    reasons = []
    for title, case in cases.items():
        times = [case[name].graph_ms if name in case else None for name in names]
        known = sorted(time for time in times if time)
        winner = next(iter(case.values())).winner
        by = f"{known[-1] / known[0]:.2f}×" if winner and len(known) > 1 else "–"
        cells.append([title, *(_number(time) for time in times), winner or "–", by])
        reasons += [
            f"{title}, {name}: {row.reason or row.graph_reason}"
            for name, row in case.items()
            if row.reason or row.graph_reason
        ]
    return "\n".join([*layout_text(cells), *reasons])


def main(device_name: str, argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 1 where a backend can't run or disagrees, or the run was interrupted.

    Raises:
        ValueError: --write on another device than "cuda", whose times mean nothing; float16 on the CPU.
    """
    options = options_of(argv)
    if options.write and device_name != "cuda":
        raise ValueError(f"--write puts a GPU's times into the shipped table; --device {device_name} has none")
    budget = Budget(options.seconds)
    device: Device = DEVICES[device_name]()
    dtypes = options.dtype or ["bfloat16", "float32", *(["float16"] if device.name != "cpu" else [])]
    check_dtypes(dtypes, device.name)
    results = Results("faster", device, ["faster", "--device", device_name, *argv], _stem(options, "faster"))
    cases = in_order(
        expand(
            ["middle"], options.modes, options.stages, options.batch, [], dtypes, options.layouts, options.image_size
        )
    )
    with terminable():
        try:
            for _, case in in_time(cases, budget, results):
                rows = compare(case, device, options.case_seconds)
                results.add(rows)
                results.failed += any(row.reason is not None for row in rows)
                print(f"{case.name}: {', '.join(f'{r.provider} {_number(r.graph_ms)} ms' for r in rows)}", flush=True)
        except KeyboardInterrupt:
            results.failed += 1
            print(results.about["left_out"], flush=True)
    print(table(results.rows))
    results.finish(budget.seconds - budget.left, lambda *_: None)
    about = results.about["device"]
    found = entries(results.rows, f"sm_{str(about.get('capability', '')).replace('.', '')}")
    if options.write and found:
        faster.replace(
            found, {"gpu": about["gpu"], "date": results.about["date"][:10], "commit": results.about["commit"]}
        )
        print(f"wrote {len(found)} cases into {faster.PATH}")
    elif options.write:
        print(f"nothing was compared: {faster.PATH} stays as it is")
    return 1 if results.failed else 0
