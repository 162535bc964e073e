"""Correctness is checked before timing, a missing side has a reason, and tables are written from results files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import python_ref
from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.bandwidth import PASSES, copy_of, floor_bytes, floor_maps
from benchmarks.cases import CONCEPTS, Case, expand, inputs_for
from benchmarks.correctness import DRAWS, KINK, Error, Verdict, _Arguments, _draw, check
from benchmarks.measure import Row, count, run_case
from benchmarks.passes import pass_times
from benchmarks.photographs import NAMES, image_batch, photographs
from benchmarks.providers import PROVIDERS, Provider, Workload
from benchmarks.timing import Samples, interleave

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
TINY = Case("middle", "train", 1, 2, image_size=32)
TINY_OPTIONS = [
    "--levels",
    "middle",
    "--stages",
    "1",
    "--image-size",
    "32",
    "--batch",
    "2",
    "--seconds",
    "0.01",
    "--providers",
    "fused",
    "reference",
    "plain",
]


class Wrong(nn.Module):
    """The reference, but for one output in a hundred thousandth too large: far more than its type's rounding."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.right = PROVIDERS["reference"].build(case)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.right(y) * (1 + 1e-5)

    def state_dict(self, *args, **kwargs):
        return self.right.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.right.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args, **kwargs):
        return self.right.named_parameters(*args, **kwargs)


def product(build=None, why_not=lambda case: None) -> Provider:
    """A product side that is the reference, so that no test here needs the C++ ops."""
    return Provider("fused", "ours", "product", build or PROVIDERS["reference"].build, why_not)


@pytest.fixture
def ours(monkeypatch):
    """Puts a product side in the place of the real one."""

    def put(provider: Provider) -> Provider:
        monkeypatch.setitem(PROVIDERS, "fused", provider)
        return provider

    put(product())
    return put


def made(name: str, case: Case, inputs, dtype=None) -> nn.Module:
    return PROVIDERS[name].load(PROVIDERS[name].module(case, dtype), inputs)


def run_tiny(case: Case = TINY, names=("fused", "reference", "plain"), **options) -> dict[str, Row]:
    rows = run_case(case, [PROVIDERS[name] for name in names], seconds=0.01, min_rounds=2, **options)
    return {row.provider: row for row in rows}


# Cases


def test_photographs_are_eleven_and_large_enough():
    assert len(NAMES) == len(set(NAMES)) == len(photographs()) == 11
    assert all(min(picture.shape[:2]) >= 224 and picture.shape[2] == 3 for picture in photographs().values())


def test_image_batch_repeats_photographs_with_other_crops():
    images, labels = image_batch(13, 32)
    assert images.shape == (13, 3, 32, 32)
    assert labels.tolist() == [*range(11), 0, 1]
    assert torch.equal(images, image_batch(13, 32)[0])
    assert all(not torch.equal(images[0], other) for other in images[1:])
    with pytest.raises(ValueError, match="larger than chelsea"):
        image_batch(2, 400)


def test_stage_shapes_are_the_papers():
    assert [
        (c.p, c.height) for c in expand(["middle"], ["train"], [1, 2, 3, 4], [16], [], ["float32"], ["contiguous"])
    ] == [
        (4, 56),
        (8, 28),
        (16, 14),
        (32, 7),
    ]
    assert replace(TINY, image_size=224, batch=16).map_bytes == 16 * 128 * 56 * 56 * 4


@pytest.mark.parametrize(
    "change", [{"level": "head"}, {"mode": "test"}, {"layout": "nhwc"}, {"dtype": "int8"}, {"stage": 0}, {"batch": 0}]
)
def test_unknown_choices_are_errors(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TINY, **change)


@pytest.mark.parametrize("level", ["middle", "block", "network"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inputs_fit_the_reference(level, layout):
    case = Case(level, "train", 0 if level == "network" else 3, 2, layout=layout, image_size=64)
    inputs = inputs_for(case)
    assert inputs.x.is_contiguous(memory_format=case.memory_format)
    assert inputs.state.keys() == PROVIDERS["reference"].build(case).state_dict().keys()
    assert all(value.dtype in (torch.float64, torch.int64) for value in inputs.state.values())
    module = made("reference", case, inputs)
    assert module.training
    assert torch.equal(
        dict(module.named_parameters())[next(iter(dict(module.named_parameters())))].double(),
        inputs.state[next(iter(dict(module.named_parameters())))],
    )
    other = inputs_for(case, draw=1)
    assert not torch.equal(other.x, inputs.x)
    if level == "middle":
        assert inputs.x.shape == (2, CONCEPTS * 16, 4, 4)
        assert inputs.x.std() > 0
        assert not torch.equal(other.state["sampler.value"], inputs.state["sampler.value"])


def test_bfloat16_values_are_the_same_for_every_side():
    inputs = inputs_for(replace(TINY, dtype="bfloat16"))
    assert inputs.x.dtype == torch.bfloat16
    assert all(torch.equal(v, v.bfloat16().double()) for v in inputs.state.values() if v.is_floating_point())
    module = made("reference", replace(TINY, dtype="bfloat16"), inputs)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


# Timing and counting


def test_sides_are_interleaved():
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(sides, seconds=0, min_rounds=3, warm_up=1, before=lambda: calls.append("-"))
    assert "".join(calls) == "abc" + "-a-b-c" + "-b-c-a" + "-c-a-b"
    assert all(len(taken.seconds) == 3 for taken in samples.values())


def test_median_and_quartiles():
    samples = Samples([3.0, 1.0, 2.0, 5.0, 4.0], faults=10)
    assert (samples.median, samples.quartiles, samples.faults_per_call) == (3, (2, 4), 2)
    assert Samples([7.0]).quartiles == (7, 7)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
@pytest.mark.parametrize("maps", [2, 3, 9])
def test_copy_moves_the_given_bytes(maps, memory_format):
    y, d = (torch.randn(2, 4, 3, 3).to(memory_format=memory_format) for _ in range(2))
    moved = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                moved.append(2 * args[0].numel() * args[0].element_size())
            return func(*args, **(kwargs or {}))

    copy = copy_of([y, d], maps * y.numel() * 4)
    with Count():
        copy()
    assert sum(moved) == maps * y.numel() * 4


def test_a_library_without_a_clock_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(torch.ops, "vcr_ops", object())
    with pytest.raises(RuntimeError, match=r"has no pass_times: build it anew with `\./dev build`"):
        pass_times()


def test_passes_are_nine_in_training_and_three_in_evaluation():
    assert (floor_maps("train"), floor_maps("eval")) == (9, 3)
    assert floor_bytes(TINY) == 9 * TINY.map_bytes
    assert floor_bytes(Case("block", "train", 1, 2)) == 0
    assert len({p.name for p in PASSES}) == 7


def test_flops_and_memory_are_counted():
    case = Case("block", "eval", 1, 2, image_size=32)
    inputs = inputs_for(case)
    module = made("plain", case, inputs)
    flops, peak = count(Workload(case, module, inputs))
    positions = 2 * 8 * 8
    assert flops == 2 * positions * (256 * 128 + 128 * 4 * 9 + 128 * 256)
    assert peak >= positions * (128 + 256) * 4
    step = Workload(replace(case, mode="train"), module.train(), inputs_for(replace(case, mode="train")))
    assert count(step)[0] == 3 * flops
    assert all(parameter.grad is None for parameter in module.parameters())


# Correctness


def test_error_beyond_the_limit_fails():
    eps = torch.finfo(torch.float32).eps
    right = Error(2e-6, 1e-6, 1e-6, 1e-6, eps)
    assert Verdict({"output": right}).ok
    for wrong in (
        Error(3e-6, 1e-6, 1e-6, 1e-6, eps),
        Error(1e-6, 3e-6, 1e-6, 1e-6, eps),
        Error(float("nan"), 0, 0, 0, eps),
    ):
        verdict = Verdict({"output": right, "d x": wrong})
        assert not verdict.ok
        assert verdict.worst == "d x"
        assert "d x: error" in str(verdict)


@pytest.mark.parametrize("level", ["middle", "block"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_reference_passes_its_own_check(level, mode):
    case = Case(level, mode, 2, 2, layout="channels_last", image_size=64)
    verdict = check(case, [PROVIDERS["reference"]])["reference"]
    assert isinstance(verdict, Verdict)
    assert verdict.ok
    assert 0 < verdict.errors["output"].norm2 < 1e-5
    assert ("d x" in verdict.errors) == (mode == "train")


@pytest.mark.parametrize("level, stage", [("middle", 1), ("block", 3)])
def test_draws_have_no_gradient_that_hangs_on_rounding(level, stage):
    case = Case(level, "train", stage, 2, image_size=64)
    for draw in range(DRAWS["float32"]):
        inputs, reference = _draw(case, draw)
        exact = inputs.cast(torch.float64)
        with torch.no_grad(), _Arguments(KINK) as arguments:
            made("reference", case, exact, torch.float64)(exact.x)
        *inner, last = arguments.near
        assert len(arguments.near) == {"middle": 2, "block": 4}[level]
        assert not any(near.any() for near in inner)
        assert not inputs.grad_out[last.reshape(inputs.x.shape)].any()
        assert inputs.grad_out.count_nonzero() > 0.99 * inputs.grad_out.numel()
        assert reference["d x"].dtype == torch.float64


def test_a_wrong_result_is_refused(ours):
    ours(product(Wrong))
    rows = run_tiny()
    assert rows["fused"].correct is False
    assert rows["fused"].reason.startswith("wrong: ")
    assert rows["fused"].median_ms is rows["fused"].ratio_best is rows["fused"].ratio_plain is None
    assert rows["reference"].median_ms > 0
    assert "wrong: " in report.terminal_table(rows.values())


def test_a_right_result_is_compared(ours):
    rows = run_tiny()
    ours_, reference, plain = rows["fused"], rows["reference"], rows["plain"]
    assert all(row.reason is None and row.q1_ms <= row.median_ms <= row.q3_ms for row in rows.values())
    assert ours_.correct is True
    assert ours_.best_alternative == "reference"
    assert ours_.ratio_best == pytest.approx(reference.median_ms / ours_.median_ms)
    assert ours_.ratio_plain == pytest.approx(plain.median_ms / ours_.median_ms)
    assert ours_.error == reference.error == ours_.plain_error
    assert ours_.gbps == pytest.approx(9 * TINY.map_bytes / ours_.median_ms / 1e6)
    assert ours_.copy_gbps > 0
    assert ours_.peak_mb > TINY.map_bytes / 1e6
    assert ours_.gflop == reference.gflop > 0
    assert plain.error is plain.gbps is None


def test_cold_times_are_beside_the_warm_ones(ours, monkeypatch):
    monkeypatch.setattr("benchmarks.timing.last_level_cache_bytes", lambda: 1 << 16)
    rows = run_tiny(replace(TINY, mode="eval"), cold=True)
    assert all(row.cold_ms > 0 and row.cold_copy_ms > 0 for row in rows.values())
    assert "cold ms" in report.terminal_table(rows.values())


def test_a_missing_side_has_a_reason(ours):
    def fail(case: Case) -> nn.Module:
        raise MemoryError("no room\nfor it")

    ours(product(why_not=lambda case: "the library isn't built"))
    assert run_tiny(left_out={"composite": "not asked for"})["composite"].reason == "not asked for"
    assert run_tiny()["fused"].reason == "the library isn't built"
    ours(product(fail))
    assert run_tiny()["fused"].reason == "failed: MemoryError: no room"


def test_every_provider_says_whether_it_can_run():
    for provider in PROVIDERS.values():
        reason = provider.why_not(TINY)
        assert reason is None or (reason and "\n" not in reason)
        assert provider.eager is None or PROVIDERS[provider.eager].eager is None


# Reports


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Results of a tiny run, on disk."""
    stem = tmp_path_factory.mktemp("saved") / "result"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROVIDERS, "fused", product())
        assert command.main([*TINY_OPTIONS, "--output", str(stem)]) == 0
    return stem.with_name("result.json")


def test_run_writes_table_and_files(saved, capsys):
    results, rows = report.load(saved)
    assert [row.provider for row in rows] == ["fused", "reference", "plain"] * 4  # two modes, two layouts
    for key in ("date", "command", "commit", "machine", "versions", "threads"):
        assert key in results
    assert results["command"].startswith("python -m benchmarks --levels middle")
    assert results["versions"]["torch"] == torch.__version__
    with saved.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [row.provider for row in rows]
    assert float(lines[0]["median_ms"]) == rows[0].median_ms
    table = report.terminal_table(rows)
    for text in (
        "middle, training step: stage 1, p=4, 8×8, N=2, float32, contiguous",
        "ours",
        "plain ResNeXt",
        "× best other",
    ):
        assert text in table


def test_readme_table_is_written_between_the_markers(saved, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nrest\n")
    assert command.main(["readme", str(saved), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n| case | layout |")
    assert text.endswith(f"{report.END}\n\nrest\n")
    assert "old" not in text
    assert "| middle, training, stage 1 (p=4, 8²), N=2 | channels_last |" in text
    assert "Reproduce with `python -m benchmarks --levels middle" in text
    assert command.main(["readme", str(saved), "--readme", str(readme)]) == 0
    assert readme.read_text() == text
    assert "already says so" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}", f"{report.BEGIN}{report.END}" * 2])
def test_readme_without_one_pair_of_markers_is_an_error(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.write_readme(readme, "table")
    assert readme.read_text() == text


def test_other_files_are_refused(tmp_path, capsys):
    other = tmp_path / "other.json"
    for text in ("[1]", "{", json.dumps({"format": report.FORMAT, "kind": "passes", "rows": []})):
        other.write_text(text)
        assert command.main(["readme", str(other)]) == 1
        assert "other.json is not" in capsys.readouterr().err


def test_picture_is_drawn(saved, tmp_path):
    pytest.importorskip("matplotlib")
    assert command.main(["picture", str(saved), str(tmp_path / "latency.png")]) == 0
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


# Command line


def test_a_wrong_product_fails_the_command(ours, tmp_path, capsys):
    ours(product(Wrong))
    assert command.main([*TINY_OPTIONS, "--modes", "eval", "--output", str(tmp_path / "result")]) == 1
    assert "no times for ours" in capsys.readouterr().err
    assert all(row.ratio_best is None for row in report.load(tmp_path / "result.json")[1])


def test_help_shows_a_sample(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for title, _ in report.COLUMNS:
        assert title in shown
    for name in command.COMMANDS:
        assert name in shown


def test_unknown_names_are_usage_errors(capsys):
    for arguments in (["--providers", "rust"], ["--stages", "5"], ["--batch", "0"], ["passes", "--warmth", "hot"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2


def plan_of(*arguments: str):
    return command.plan(command._parser("run").parse_args(list(arguments)))


def test_default_plan_compiles_only_the_contiguous_middle():
    for case, providers, left_out in plan_of():
        names = {provider.name for provider in providers}
        assert names | left_out.keys() == PROVIDERS.keys()
        assert "fused" in names
        assert ("reference_compiled" in names) == (case.level == "middle" and case.layout == "contiguous")
    assert {case.layout for case, *_ in plan_of() if case.level == "network"} == {"contiguous"}
    assert {case.batch for case, *_ in plan_of() if case.level == "network"} == {8}
    for _, providers, left_out in plan_of("--all"):
        assert len(providers) == len(PROVIDERS)
        assert not left_out
    for case, providers, left_out in plan_of("--providers", "fused", "--layouts", "channels_last"):
        assert [provider.name for provider in providers] == ["fused"]
        assert (case.layout, left_out) == ("channels_last", {})


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.mark.skipif(PROVIDERS["fused"].why_not(TINY) is not None, reason="the C++ ops aren't built")
class TestBuiltOps:
    """The commands that read the op library's own clock."""

    def test_passes_have_a_bandwidth(self, tmp_path):
        done = run_command(
            "passes", "--stages", "1", "--image-size", "64", "--batch", "4", "--warmth", "warm", "--seconds", "0.05",
            "--output", str(tmp_path / "passes"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / "passes.json").read_text())["rows"]
        for layout in ("contiguous", "channels_last"):
            train = [row["name"] for row in rows if (row["mode"], row["layout"]) == ("train", layout)]
            assert train == [one.name for one in PASSES]
        assert all((row["gbps"] is not None) == (row["reads"] + row["writes"] > 0) for row in rows)
        assert "modulate_backward_sums" in done.stdout

    def test_overhead_is_what_the_kernels_leave(self, tmp_path):
        done = run_command("overhead", "--seconds", "0.05", "--output", str(tmp_path / "overhead"))
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / "overhead.json").read_text())["rows"]
        for row in rows:
            if row["provider"] == "fused":
                assert 0 < row["outside_us"] < row["total_us"]
                assert row["kernels_us"] > 0

    def test_the_product_is_right(self):
        for layout in ("contiguous", "channels_last"):
            for mode in ("train", "eval"):
                verdict = check(replace(TINY, mode=mode, layout=layout, image_size=64), [PROVIDERS["fused"]])["fused"]
                assert isinstance(verdict, Verdict), verdict
                assert verdict.ok, str(verdict)


def test_the_reference_has_the_networks_that_are_measured():
    assert isinstance(PROVIDERS["plain"].build(Case("network", "eval", 0, 2)), python_ref.ResNet)
