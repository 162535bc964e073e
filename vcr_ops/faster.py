"""Which of a GPU's two backends is the faster: a table of measurements, case by case.

``python -m benchmarks faster --device cuda --write`` measures and writes it; without ``--write`` it stays as it is.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .maps import map_format, positions

PATH = Path(__file__).with_name("faster.json")
UNMEASURED = "triton"


class Size(NamedTuple):
    """What a choice depends on, beside the GPU. mode: "training" or "evaluation"; layout: "contiguous" or
    "channels_last"; batch N, channels C*p and positions S of the map.
    """

    mode: str
    dtype: str
    layout: str
    batch: int
    channels: int
    positions: int


def size_of(y: Tensor, training: bool) -> Size:
    """The size of an op on a map. Other strides are copied to a contiguous map."""
    layout = "channels_last" if map_format(y) == "channels_last" else "contiguous"
    dtype = str(y.dtype).removeprefix("torch.")
    return Size("training" if training else "evaluation", dtype, layout, y.shape[0], y.shape[1], positions(y))


@functools.cache
def _rows() -> tuple[tuple[str, Size, str], ...]:
    rows = json.loads(PATH.read_text())["rows"]
    return tuple((row["arch"], Size(*(row[name] for name in Size._fields)), row["backend"]) for row in rows)


@functools.lru_cache(maxsize=4096)
def faster(arch: str, size: Size) -> str | None:
    """ "triton" or "cuda": what was the faster at the nearest size that was measured on such a GPU, or None where none
    was of this mode, dtype and layout.
    """

    def distance(measured: Size) -> float:
        pairs = zip(measured[3:], size[3:], strict=True)
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)

    alike = [(distance(found), backend) for where, found, backend in _rows() if where == arch and found[:3] == size[:3]]
    return min(alike)[1] if alike else None


@functools.cache
def arch_of(number: int) -> str:
    """The architecture of a CUDA device, as "sm_90"; of a ROCm device "", since the CUDA kernels don't run there."""
    if torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(number)
    return f"sm_{major}{minor}"


def replace(rows: list[dict[str, Any]], measured_by: dict[str, Any]) -> None:
    """Put rows into the table; each takes the place of the one of its case (architecture and size), the others stay.

    rows: arch, the fields of :class:`Size`, backend and ratio (the other's time over its). measured_by: the GPU, the
    date, the commit; what an earlier measurement says of itself goes when none of its architecture's rows is left.
    """

    def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["arch"], *(row[name] for name in Size._fields)

    table = json.loads(PATH.read_text()) if PATH.is_file() else {"about": [], "rows": []}
    measured = {case_of(row): row for row in rows}
    older = [row for row in table["rows"] if case_of(row) not in measured]
    about = {"archs": sorted({row["arch"] for row in rows}), **measured_by}
    left = {row["arch"] for row in older}
    abouts = [each for each in table["about"] if left & set(each["archs"]) and each != about]
    if rows:
        abouts.append(about)
    lines = ",\n".join("    " + json.dumps(row) for row in sorted([*older, *measured.values()], key=case_of))
    text = f'{{\n  "about": {json.dumps(abouts)},\n  "rows": [' + (f"\n{lines}\n  " if lines else "") + "]\n}\n"
    PATH.write_text(text)
    _rows.cache_clear()
    faster.cache_clear()
