"""The paper's Tables 1 to 5 beside ours: parameters, GFLOPs and, measured here, time and memory of each network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .systems import network, slow_only

TABLES = (1, 2, 3, 4, 5)
TITLES = {
    1: "Table 1, ImageNet: 1000 classes, 224 × 224",
    2: "Table 2, COCO: what each backbone has more than ResNeXt-50's",
    3: "Table 3, Places-365: 365 classes, 224 × 224",
    4: "Table 4, Kinetics-400: 400 classes, slow-only, 3-D; GFLOPs of a clip of 8 frames of 224 × 224",
    5: "Table 5, ablation: VCRNet-50",
}
NAMES = {"se": "SE", "cbam": "CBAM", "gc": "GC", "glore": "GloRe", "vcr": "VCR"}
PLAIN = "resnext"
GFLOPS_TABLES = (1, 3, 4, 5)  # Table 2's are of a detector, whose images have any size
CLIP = 8  # frames: slow-only 8 × 8, every eighth of 64
AT_MOST = 0.01  # M or G: what a difference of two rounded figures, and a rule that the paper doesn't state, may be off


@dataclass(frozen=True)
class Printed:
    """A row of one of the paper's tables: what it is, and the figures printed there (M; G multiply-adds; None: none).

    In Table 2 ``params`` is what the row has more than its first.
    """

    table: int
    system: str
    params: float
    gflops: float | None = None
    depth: int = 50
    options: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def classes(self) -> int:
        return {3: 365, 4: 400}.get(self.table, 1000)

    @property
    def ndim(self) -> int:
        return 3 if self.table == 4 else 2

    @property
    def name(self) -> str:
        if self.title:
            return self.title
        plain = f"ResNeXt-{self.depth}"
        if self.system == PLAIN:
            return plain
        pixel = ", pixel level" if self.options.get("modulation") == "pixel" else ""
        return f"{plain} + {NAMES[self.system]}{pixel}"


PIXEL: dict[str, Any] = {"modulation": "pixel"}
PRINTED = (
    Printed(1, "resnext", 25.03, 4.24),
    Printed(1, "se", 27.56, 4.25),
    Printed(1, "cbam", 27.56, 4.25),
    Printed(1, "gc", 27.58, 4.25),
    Printed(1, "glore", 30.79, 5.86),
    Printed(1, "vcr", 25.26, 4.26),
    Printed(1, "vcr", 25.26, 4.29, options=PIXEL),
    Printed(1, "resnext", 44.18, 7.99, 101),
    Printed(1, "se", 48.96, 8.00, 101),
    Printed(1, "cbam", 48.96, 8.00, 101),
    Printed(1, "gc", 48.99, 8.00, 101),
    Printed(1, "glore", 49.93, 9.61, 101),
    Printed(1, "vcr", 44.60, 8.01, 101),
    Printed(2, "se", 2.53),
    Printed(2, "cbam", 2.53),
    Printed(2, "gc", 2.54),
    Printed(2, "glore", 5.77),
    Printed(2, "vcr", 0.24),
    Printed(2, "vcr", 0.24, options=PIXEL),
    Printed(3, "resnext", 23.73),
    Printed(3, "se", 26.26),
    Printed(3, "cbam", 26.26),
    Printed(3, "gc", 26.28),
    Printed(3, "glore", 29.48),
    Printed(3, "vcr", 23.96),
    Printed(4, "resnext", 40.07),
    Printed(4, "se", 42.58),
    Printed(4, "cbam", 42.59),
    Printed(4, "gc", 42.60),
    Printed(4, "glore", 45.81),
    Printed(4, "vcr", 40.28),
    Printed(5, "vcr", 25.17, options={"sampler": "pool"}, title="sampler: pool"),
    Printed(5, "vcr", 25.17, options={"sampler": "static"}, title="sampler: static attention"),
    Printed(5, "vcr", 25.26, options={"sampler": "dynamic"}, title="sampler: dynamic attention"),
    Printed(5, "vcr", 25.26, options={"edges": "none"}, title="edges: none"),
    Printed(5, "vcr", 25.28, options={"edges": "static"}, title="edges: static"),
    Printed(5, "vcr", 25.26, options={"edges": "dynamic"}, title="edges: dynamic"),
    Printed(5, "vcr", 25.22, options={"affine": "scale"}, title="modulator: scale alone"),
    Printed(5, "vcr", 25.22, options={"affine": "shift"}, title="modulator: shift alone"),
    Printed(5, "vcr", 25.26, options={"affine": "both"}, title="modulator: scale + shift"),
)

GLORE = (
    "GloRe: the paper says where the units are (stages 2 and 3), not how large. Five units as their authors published "
    "them have 5,746,688 parameters. Table 1's two rows leave room for 5,756,096 to 5,757,296 alone, and Tables 3 and "
    "4 agree: about 10 thousand more, of the size of biases or norms. Nothing says which, so none was added."
)
# (table, system, options) -> why ours doesn't round to the printed count of parameters.
REASONS: dict[tuple[int, str, tuple[tuple[str, str], ...]], tuple[str, ...]] = {
    (1, "glore", ()): (GLORE,),
    (2, "glore", ()): (
        GLORE,
        "GloRe in Table 2: the paper's other tables have 5.74 to 5.76 here; Table 2's own difference is larger.",
    ),
    (3, "glore", ()): (GLORE,),
    (4, "glore", ()): (GLORE,),
    (4, "resnext", ()): (
        "ResNeXt-50: 40.07 contradicts the paper's other rows. SE adds 2.53 in Tables 1 to 3, but 2.51 to 40.07; to "
        "40.05, the slow-only network as the SlowFast paper has it, SE, CBAM, GC and VCR add what they add there.",
    ),
    (5, "vcr", (("sampler", "static"),)): (
        "Static attention: its 1 × 1 maps have 7,552 weights more than the pool sampler, which has 25.174 and is "
        "printed as 25.17 as well.",
    ),
    (5, "vcr", (("edges", "static"),)): (
        "Static edges: 16 matrices of 32 × 32 are 16,384 weights more than no edges, which are 25.257.",
    ),
}
# The same for GFLOPs.
GFLOPS_REASONS: dict[tuple[str, int, tuple[tuple[str, str], ...]], str] = {
    ("glore", 101, ()): (
        "GloRe, 101 layers: 9.6043 by the rule. What the units lack in parameters may be here, too: a norm of their "
        "two reduced maps alone would count 0.0011."
    ),
    ("vcr", 50, (("modulation", "pixel"),)): (
        "VCR, pixel level: 4.2800 by the rule. It counts no elementwise products, of which pixel level has more than "
        "channel level; the paper doesn't say whether its tool does."
    ),
}
RULES = """\
params, M: of the whole network; those of Table 2 without the detector, so as differences between backbones.
GFLOPs: 10^9 multiply-adds of one image, in Table 4 of one clip, in evaluation; the paper prints them in Table 1 alone.
As run: torch's FLOP counter, halved: convolutions and matrix products, and for VCR the formulas of our ops, which count
all of the folded algebra. As the paper: what its tool seems to count, found from its two ResNeXt rows and then applied
to all: convolutions and products with learned weights, VCR's by the literal equations, and one for each element of a
norm; no product of two maps. The paper doesn't state its rule.
off: rounded as the paper's, less the paper's. Table 2's are of rounded figures themselves: sure to 0.01."""


@dataclass
class TableRow:
    """A line of a table: counts (mode None), or what was measured of one network.

    Parameters in M, of Table 2 the difference from ResNeXt-50; 10^9 multiply-adds of an image, in Table 4 of a clip of
    8 frames; times in ms; bytes in MB (10^6).
    gflops: torch's counter with our formulas. gflops_as_paper: by the rule that seems to be the paper's. *_off: rounded
    as printed, less what is printed. reason: why it is off, or why there are no times. ratio_plain: the median of the
    plain ResNeXt of the same depth over this one's.
    """

    table: int | None
    name: str
    system: str
    depth: int
    classes: int
    ndim: int
    options: str
    params: float | None = None
    paper_params: float | None = None
    params_off: float | None = None
    gflops: float | None = None
    gflops_as_paper: float | None = None
    paper_gflops: float | None = None
    gflops_off: float | None = None
    reason: str | None = None
    mode: str | None = None
    layout: str | None = None
    batch: int | None = None
    threads: int | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    rounds: int | None = None
    ratio_plain: float | None = None
    peak_mb: float | None = None


# Counting


def on_meta(printed: Printed) -> nn.Module:
    """The network of a row on the meta device: shapes alone, nothing is allocated."""
    options = dict(printed.options)
    if printed.system == "vcr":
        options["backend"] = "cpp"  # "auto" is the composite there, whose elementwise algebra the counter doesn't see
    with torch.device("meta"):
        made = network(printed.system, printed.depth, printed.classes, ndim=printed.ndim, **options)
        return slow_only(made) if printed.table == 4 else made


def literal(printed: Printed) -> nn.Module:
    """A VCR row's network with the equations as the paper prints them, on the meta device."""
    import python_ref

    with torch.device("meta"):
        build = {50: python_ref.vcrnet50, 101: python_ref.vcrnet101}[printed.depth]
        made = build(printed.classes, ndim=printed.ndim, **printed.options)
        return slow_only(made) if printed.table == 4 else made


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _LearnedProducts(TorchDispatchMode):
    """Counts multiply-adds of convolutions and of products with learned weights, and a norm's elements."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.count = 0
        self.learned = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
        self.kept: list[Tensor] = []  # what was made of parameters: an address is good while its memory lives

    def is_learned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.learned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name == "_native_batch_norm_legit_no_training":
            self.count += args[0].numel()
            return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)  # no values are wanted
        out = func(*args, **(kwargs or {}))
        if name == "convolution":
            self.count += out.numel() * args[1][0].numel()
        elif name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            if self.is_learned(left) or self.is_learned(right):
                self.count += out.numel() * left.shape[-1]
        elif "batch_norm" in name or "layer_norm" in name:
            self.count += args[0].numel()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and all(map(self.is_learned, tensors)):
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self.kept.append(made)
                    self.learned.add(made.untyped_storage()._cdata)
        return out


def multiply_adds(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-adds of an evaluation: by torch's FLOP counter with our ops' formulas, and by the rule that the paper's
    figures seem to follow (see RULES).
    """
    with torch.no_grad(), _LearnedProducts(module.eval()) as learned, FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // 2, learned.count


def _off(ours: float, printed: float) -> float:
    return round(round(ours, 2) - printed, 2)


_counted: dict[tuple[Any, ...], tuple[int, int | None, int | None]] = {}


def counts(printed: Printed, flops: bool = True) -> tuple[int, int | None, int | None]:
    """Parameters, multiply-adds as run and as the paper counts; each network is counted once."""
    key = (*_key(printed), printed.classes, printed.ndim, flops)
    if key not in _counted:
        module = on_meta(printed)
        run: int | None = None
        as_paper: int | None = None
        if flops:
            x = torch.empty(1, 3, *((CLIP,) if printed.ndim == 3 else ()), 224, 224, device="meta")
            run, as_paper = multiply_adds(module, x)
            if printed.system == "vcr":
                as_paper = multiply_adds(literal(printed), x)[1]
        _counted[key] = parameters(module), run, as_paper
    return _counted[key]


DEFAULTS = {"sampler": "dynamic", "edges": "dynamic", "modulation": "channel", "affine": "both"}


def _key(printed: Printed) -> tuple[Any, ...]:
    return printed.system, printed.depth, *sorted(printed.options.items() - DEFAULTS.items())


def count_row(printed: Printed) -> TableRow:
    """A row's counts beside what the paper prints, and the reason where they differ."""
    key = tuple(sorted(printed.options.items()))
    total, run, as_paper = counts(printed, printed.table in GFLOPS_TABLES)
    if printed.table == 2:
        total -= counts(replace(printed, system=PLAIN, options={}), False)[0]
    row = TableRow(
        printed.table,
        printed.name.replace("ResNeXt-50 ", "") if printed.table == 2 else printed.name,
        printed.system,
        printed.depth,
        printed.classes,
        printed.ndim,
        ", ".join(f"{name}={value}" for name, value in key),
        total / 1e6,
        printed.params,
        _off(total / 1e6, printed.params),
    )
    reasons: list[str] = []
    if abs(row.params_off or 0) > (AT_MOST if printed.table == 2 else 0):
        reasons += REASONS.get((printed.table, printed.system, key), (f"{printed.name}: parameters unexplained.",))
    if run is not None and as_paper is not None:
        row.gflops, row.gflops_as_paper = run / 1e9, as_paper / 1e9
        if printed.gflops is not None:
            row.paper_gflops, row.gflops_off = printed.gflops, _off(row.gflops_as_paper, printed.gflops)
            if row.gflops_off:
                reason = GFLOPS_REASONS.get((printed.system, printed.depth, key))
                reasons.append(reason or f"{printed.name}: GFLOPs unexplained.")
    row.reason = "\n".join(reasons) or None
    return row


def printed_rows(tables: Iterable[int], depths: Iterable[int]) -> list[Printed]:
    wanted = list(tables)
    rows = [row for row in PRINTED if row.table in wanted and row.depth in set(depths)]
    return sorted(rows, key=lambda row: wanted.index(row.table))


# Measuring


def networks(rows: Iterable[Printed]) -> list[Printed]:
    """The different networks for images among the rows, with 1000 classes, those of one depth together."""
    found: dict[tuple[Any, ...], Printed] = {}
    for row in rows:
        if row.ndim == 2:
            options = dict(row.options.items() - DEFAULTS.items())
            title = f"ResNeXt-{row.depth} + VCR, {row.name}" if row.table == 5 and options else ""
            found.setdefault(_key(row), Printed(1, row.system, row.params, None, row.depth, options, title))
    for depth in {row.depth for row in found.values()}:
        found.setdefault((PLAIN, depth), Printed(1, PLAIN, 0.0, None, depth))  # what the others are compared with
    return sorted(found.values(), key=lambda row: (row.depth, row.system != PLAIN))


def measure(
    rows: Sequence[Printed],
    *,
    modes: Iterable[str],
    layouts: Iterable[str],
    batch: int,
    seconds: float,
    min_rounds: int,
    image_size: int = 224,
    say: Callable[[str], None] = lambda text: None,
) -> list[TableRow]:
    """Time of an evaluation or training step and the most memory held by it, of networks of one depth interleaved."""
    measured = []
    chosen = networks(rows)
    for depth in sorted({row.depth for row in chosen}):
        group = [row for row in chosen if row.depth == depth]
        for layout in layouts:
            for mode in modes:
                say(f"{depth} layers, {mode}, {layout}: {len(group)} networks")
                measured += _measure(group, mode, layout, batch, seconds, min_rounds, image_size)
    return measured


def _measure(
    group: list[Printed], mode: str, layout: str, batch: int, seconds: float, min_rounds: int, image_size: int
) -> list[TableRow]:
    from .cases import Case, Inputs, seeded
    from .measure import count
    from .photographs import images_for
    from .providers import Workload
    from .timing import interleave

    case = Case("network", mode, 0, batch, layout=layout, image_size=image_size)
    images, labels = images_for("cpu")(batch, image_size)
    inputs = Inputs(images.to(memory_format=case.memory_format), None, labels, {})
    rows, running = [], {}
    for index, printed in enumerate(group):
        row = TableRow(
            None,
            printed.name,
            printed.system,
            printed.depth,
            1000,
            2,
            ", ".join(f"{name}={value}" for name, value in printed.options.items()),
        )
        row.mode, row.layout, row.batch, row.threads = mode, layout, batch, torch.get_num_threads()
        rows.append(row)
        with seeded(0):
            module = network(printed.system, printed.depth, 1000, ndim=2, **printed.options)
        row.params = parameters(module) / 1e6
        settle(module.to(memory_format=case.memory_format), inputs.x)  # type: ignore[call-overload]
        workload = Workload(case, module.train(mode == "train"), inputs)
        if not all(tensor.isfinite().all() for tensor in workload.tensors().values()):
            row.reason = "not measured: its results aren't finite"
            continue
        row.peak_mb = count(workload, flops=False)[1] / 1e6
        running[str(index)] = workload.step
    samples = interleave(running, seconds=seconds, min_rounds=min_rounds, warm_up=1)
    for name, taken in samples.items():
        row = rows[int(name)]
        row.median_ms, row.rounds = taken.median * 1e3, len(taken.seconds)
        row.q1_ms, row.q3_ms = (quartile * 1e3 for quartile in taken.quartiles)
    plain = next((row.median_ms for row in rows if row.system == PLAIN), None)
    for row in rows:
        if plain and row.median_ms:
            row.ratio_plain = plain / row.median_ms
    return rows


def settle(module: nn.Module, x: Tensor) -> None:
    """Give every batch norm this batch's statistics, so that an evaluation's maps keep to the size of trained ones."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        module.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# Showing


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:+.2f}"


def counts_table(rows: Iterable[TableRow]) -> str:
    """The counts table by table, under each what explains its differences; then the rules."""
    from .report import layout_text

    heads = ["", "params, M", "paper", "off", "GFLOPs as run", "as the paper", "paper", "off"]
    rows = [row for row in rows if row.mode is None]
    cells = [
        [
            row.name,
            *(_figure(row.params), _figure(row.paper_params), _signed(row.params_off)),
            *(_figure(row.gflops), _figure(row.gflops_as_paper), _figure(row.paper_gflops), _signed(row.gflops_off)),
        ]
        for row in rows
    ]
    text = layout_text([heads, *cells])
    shown = [text[0], "-" * len(text[0])]
    for table in dict.fromkeys(row.table for row in rows):
        lines = [(row, line) for row, line in zip(rows, text[1:], strict=True) if row.table == table]
        shown += [TITLES[table or 1], *(line for _, line in lines)]
        notes = dict.fromkeys(note for row, _ in lines if row.reason for note in row.reason.split("\n"))
        shown += [line for note in notes for line in _wrapped(note)] + [""]
    return "\n".join([*shown, RULES])


def _wrapped(text: str, width: int = 116) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, initial_indent="  * ", subsequent_indent="    ")


def measured_table(rows: Iterable[TableRow]) -> str:
    """What was measured: a heading per depth, mode and layout, a line per network."""
    from .report import _number, layout_text

    rows = [row for row in rows if row.mode is not None]
    cells = [["", "ms, median (quartiles)", "× ResNeXt", "peak MB"]]
    for row in rows:
        median = "–" if row.median_ms is None else f"{row.median_ms:.1f} ({row.q1_ms:.1f}–{row.q3_ms:.1f})"
        ratio = "–" if row.ratio_plain is None else f"{row.ratio_plain:.2f}×"
        cells.append([row.name, row.reason or median, ratio, _number(row.peak_mb)])
    text = layout_text(cells)
    shown, before = [text[0], "-" * len(text[0])], None
    for row, line in zip(rows, text[1:], strict=True):
        what = "training step" if row.mode == "train" else "evaluation"
        title = f"{what}, N={row.batch}, float32, {row.layout}, {row.threads} threads"
        if (title, row.depth) != before:
            before = (title, row.depth)
            shown.append(title)
        shown.append(line)
    return "\n".join(
        [
            *shown,
            "",
            "× ResNeXt: the plain ResNeXt's median over this one's; more than 1 is faster. The networks of a heading "
            "are timed in turn.",
            "peak: torch's allocations of one step, outputs and gradients included, parameters not. VCR runs the fused "
            "C++ ops.",
        ]
    )
