"""The benchmark on a GPU, as far as a CPU shows it: what it decides, counts and writes; its clock is a stand-in's."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks.cases import Case
from benchmarks.gpu import command, steps
from benchmarks.gpu.budget import Budget, OutOfTime, at_most
from benchmarks.gpu.cards import peak_gbps
from benchmarks.gpu.cuda import Cuda
from benchmarks.gpu.device import Kernel, Times
from benchmarks.gpu.headlines import headlines
from benchmarks.gpu.passes import pass_of, spent_on
from benchmarks.gpu.providers import MAX_AUTOTUNE, gpu_providers
from benchmarks.gpu.rehearsal import Rehearsal
from benchmarks.gpu.steps import run_case
from benchmarks.photographs import images_for, noise_batch
from benchmarks.providers import PROVIDERS

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

CASE = Case("middle", "train", 1, 2, "bfloat16", image_size=32)
TINY = ["--stages", "1", "--image-size", "32", "--batch", "2", "--layouts", "contiguous"]


def run(*names, case=CASE, budget=None, device=None, providers=None):
    device = device or Rehearsal()
    every = providers or gpu_providers(device)
    rows = run_case(
        case, device, [every[name] for name in names], left_out={}, budget=budget or Budget(1000), seconds=0.01
    )
    return {row.provider: row for row in rows}


# Cards and time


@pytest.mark.parametrize(
    "name, gbps",
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3900),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100 80GB PCIe", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
    ],
)
def test_known_cards_have_their_data_sheet_s_peak(name, gbps):
    assert peak_gbps(name, 1, 1) == gbps


def test_unknown_cards_have_the_peak_of_their_clock_or_none():
    assert peak_gbps("NVIDIA RTX 4090", 10_501_000, 384) == pytest.approx(1008, abs=0.2)
    assert peak_gbps("NVIDIA RTX 4090") is None


def test_a_budget_knows_what_is_left_and_what_is_kept_for_later():
    now = [100.0]
    budget = Budget(60, clock=lambda: now[0])
    now[0] += 20
    budget.reserve(30)
    assert (budget.left, budget.spare) == (40, 10)


def test_what_takes_too_long_is_stopped():
    with pytest.raises(OutOfTime, match="more than the 0 s"), at_most(0.01):
        time.sleep(5)
    with at_most(5):
        pass
    time.sleep(0.01)


# Kernels and passes


def test_kernels_belong_to_the_pass_that_they_name():
    names = {
        "channel_stats": "channel_stats",
        "concept_sample_channels_last": "concept_sample",
        "merge_modulate_backward_sums_0d1d": "modulate_backward_sums",
        "concept_reason": "reason",
        "concept_modulate": "concept_modulate",
        "middle_input_grad": "middle_input_grad",
        "small_gradients": "small_gradients",
        "run_kernel<vcr::cuda::MiddleInputGrad<vcr::bf16, true>>": "middle_input_grad",
        "run_kernel<vcr::cuda::Together<ChannelStats<float>, ConceptSample<float>, ConceptModulate<float>>>": (
            "forward_together"
        ),
        "run_kernel<vcr::cuda::Together<ModulateBackwardSums<float>, SmallGradients<float>>>": "backward_together",
        "void at::native::vectorized_elementwise_kernel<4>": None,
    }
    assert {name: one and one.name for name, one in ((name, pass_of(name)) for name in names)} == names


def test_a_pass_is_the_sum_of_its_kernels_in_a_step():
    steps = [
        [Kernel("channel_stats", 1.0), Kernel("merge_channel_stats", 0.5), Kernel("cast", 0.1)],
        [Kernel("channel_stats", 2.0), Kernel("merge_channel_stats", 0.25), Kernel("concept_reason", 0.2)],
    ]
    spent = spent_on(steps)
    assert {name: one.seconds for name, one in spent.items()} == {
        "channel_stats": [1.5, 2.25],
        "cast": [0.1, 0.0],
        "reason": [0.0, 0.2],
    }
    assert spent["channel_stats"].kernels == {"channel_stats": 2, "merge_channel_stats": 2}


def profiled(kernels):
    """A Cuda object whose profiler has seen the given kernels; "flush" is the cache's."""
    cuda = object.__new__(Cuda)
    cuda.flush_names = {"flush"}
    cuda._kernels = lambda function: [Kernel(name, 1.0) for name in kernels]
    return cuda


def test_flushes_part_the_profile_into_steps():
    steps = profiled(["flush", "a", "b", "flush", "c"]).segments([print, print])
    assert [[kernel.name for kernel in step] for step in steps] == [["a", "b"], ["c"]]
    with pytest.raises(RuntimeError, match="saw 1 of 2 steps"):
        profiled(["a", "flush", "c"]).segments([print, print])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so(capsys):
    assert benchmarks.main(["--device", "cuda"]) == 1
    assert "no GPU here; --device rehearsal" in capsys.readouterr().err


# Cases


def test_sides_are_timed_as_call_and_as_graph():
    rows = run("fused", "reference", "plain")
    ours = rows["fused"]
    assert all(row.reason is None for row in rows.values())
    assert ours.correct is True
    assert ours.median_ms > 0
    assert ours.host_ms > 0
    assert ours.best_alternative == ours.graph_best_alternative == "reference"
    assert ours.graph_ratio_best == pytest.approx(rows["reference"].graph_ms / ours.graph_ms)
    assert ours.graph_ratio_plain == ours.graph_ratio_plain_best
    assert ours.gbps == pytest.approx(9 * CASE.map_bytes / ours.graph_ms / 1e6)
    assert ours.copy_gbps > 0
    assert rows["plain"].gbps is None


class Fixed(Rehearsal):
    """Times that are known: calls take 2 s, 1 s of them on the host, graphs 0.5 s."""

    def call(self, function):
        return Times(2.0, 1.0)

    def queued(self, function):
        return 0.5


def test_calls_host_and_graphs_are_kept_apart():
    row = run("fused", device=Fixed())["fused"]
    assert (row.median_ms, row.host_ms, row.graph_ms) == (2000, 1000, 500)


class NoGraphs(Rehearsal):
    def capture(self, function, pool=None):
        if getattr(function, "__name__", "") == "step":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return function


def test_a_side_that_cannot_be_captured_keeps_its_call():
    row = run("fused", "plain", device=NoGraphs())["fused"]
    assert row.reason is None
    assert row.median_ms > 0
    assert row.graph_ms is row.gbps is None
    assert row.graph_reason == "RuntimeError: operation not permitted when stream is capturing"
    assert row.ratio_plain > 0


class Wrong(nn.Module):
    """One output in a hundredth too large."""

    def __init__(self, case):
        super().__init__()
        self.right = PROVIDERS["reference"].build(case)

    def forward(self, y):
        return self.right(y) * 1.1

    def state_dict(self, *args, **kwargs):
        return self.right.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.right.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args, **kwargs):
        return self.right.named_parameters(*args, **kwargs)


def test_a_wrong_product_has_no_times():
    providers = gpu_providers(Rehearsal())
    providers["fused"] = replace(providers["fused"], build=Wrong)
    row = run("fused", "plain", case=replace(CASE, mode="eval"), providers=providers)["fused"]
    assert row.reason.startswith("wrong: ")
    assert row.median_ms is row.graph_ms is None


def test_what_there_is_no_time_to_compile_is_left_out():
    budget = Budget(1000)
    budget.reserve(990)
    rows = run("fused", "reference_compiled", "reference_max_autotune", budget=budget)
    assert rows["fused"].median_ms > 0
    assert rows["reference_compiled"].reason == "no time left to compile it: about 15 s"
    assert rows["reference_max_autotune"].reason == "no time left to compile it: about 40 s"


def test_every_eager_side_has_two_compiled_ones():
    providers = gpu_providers(Rehearsal())
    assert providers["fused"].title == "vcr_ops stand-in"
    for name in ("reference", "composite", "plain"):
        assert providers[f"{name}_compiled"].compile_mode is None
        assert providers[f"{name}_max_autotune"].compile_mode == MAX_AUTOTUNE
        assert providers[f"{name}_compiled"].eager == providers[f"{name}_max_autotune"].eager == name
    assert all(provider.why_not(CASE) is None for provider in providers.values())


def plan_of(*arguments):
    options = command._parser("run").parse_args(list(arguments))
    return command.plan(options, gpu_providers(Rehearsal()))


def test_default_plan_compiles_last_and_only_the_largest_middles():
    planned = plan_of()
    assert {case.batch for case, *_ in planned if case.level == "middle"} == {1, 16, 256}
    assert len(planned) == 3 * 16 + 16 + 4
    compiles = [any(provider.eager for provider in chosen) for _, chosen, _ in planned]
    assert compiles == sorted(compiles)
    for case, chosen, left_out in planned:
        names = {provider.name for provider in chosen}
        assert names | set(left_out) == gpu_providers(Rehearsal()).keys()
        large = case.level == "middle" and case.batch == 256
        assert ("composite_compiled" in names) == (large and case.stage in (1, 3))
        assert ("composite_max_autotune" in names) == (large and case.stage == 1 and case.layout == "contiguous")
    assert not any(left_out for *_, left_out in plan_of("--all"))
    assert {p.name for _, chosen, _ in plan_of("--providers", "fused") for p in chosen} == {"fused"}


def test_the_compiled_sides_of_one_stage_can_come_first():
    planned = plan_of("--compiled-first", "60")
    first = planned[:2]
    assert [(case.mode, case.stage, case.batch, case.layout) for case, *_ in first] == [
        ("train", 1, 256, "contiguous"),
        ("eval", 1, 256, "contiguous"),
    ]
    for _, chosen, _ in first:
        names = {provider.name for provider in chosen}
        assert names >= {
            f"{name}_{how}" for name in ("reference", "composite") for how in ("compiled", "max_autotune")
        } | {"fused_compiled"}
    assert sorted(str(case) for case, *_ in planned) == sorted(str(case) for case, *_ in plan_of())
    rest = [case for case, *_ in planned[2:]]
    assert rest == [case for case, *_ in plan_of() if case not in [case for case, *_ in first]]


class Recorder:
    """Notes what spare time each case is given, and takes ten seconds for each."""

    def __init__(self, now):
        self.now, self.spare = now, []

    def __call__(self, case, device, chosen, *, budget, **_):
        self.spare.append((case.mode, case.stage, budget.spare, budget.needed(MAX_AUTOTUNE)))
        self.now[0] += 10
        return []


def test_the_compiled_sides_have_their_share_of_the_time(monkeypatch, tmp_path):
    now = [0.0]
    recorder = Recorder(now)
    monkeypatch.setattr(command, "run_case", recorder)
    arguments = ["--levels", "middle", "--batch", "256", "--stages", "1", "2", "--layouts", "contiguous"]
    options = command._parser("run").parse_args([*arguments, "--seconds", "100", "--compiled-first", "60"])
    results = command.Results("run", Rehearsal(), [], tmp_path / "x")
    command.run(options, Rehearsal(), results, Budget(100, clock=lambda: now[0]))
    # 40 s for training; evaluation has what that leaves, too; then the guess counts, and the cases to come are reserved
    assert recorder.spare[:2] == [("train", 1, 40, 5), ("eval", 1, 50, 5)]
    assert recorder.spare[2] == ("train", 2, 80 - 2 * 10, 40)


def test_a_compilation_that_may_be_too_long_is_begun_where_that_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(steps, "check_compiled", lambda case, workload, inputs: compiled.append(case) or 1 / 0)
    budget = Budget(1000)
    budget.reserve(990)
    budget.begin_with = 5.0
    rows = run("fused", "reference_max_autotune", budget=budget)
    assert len(compiled) == 1
    assert rows["reference_max_autotune"].reason.startswith("failed: ZeroDivisionError")
    budget.reserve(997)
    assert run("fused", "reference_max_autotune", budget=budget)["reference_max_autotune"].median_ms is None
    assert len(compiled) == 1


def test_what_computes_the_same_is_compiled_before_the_plain_block(monkeypatch):
    order = []
    monkeypatch.setattr(steps, "_compile", lambda sides, provider, inputs, budget: order.append(provider.name))
    monkeypatch.setattr(steps, "_time", lambda sides, seconds: None)
    names = [name for name, provider in gpu_providers(Rehearsal()).items() if provider.eager is not None]
    run(*names, "fused", case=replace(CASE, mode="eval"))
    assert [name for name in order if "plain" in name] == order[-2:]
    assert [name.endswith("autotune") for name in order[:-2]] == [False] * 3 + [True] * 2


def test_noise_stands_in_for_photographs_on_a_gpu_alone(monkeypatch):
    assert images_for("cuda")(2, 32)[0].shape == (2, 3, 32, 32)
    monkeypatch.setattr("benchmarks.photographs.util.find_spec", lambda name: None)
    assert images_for("cuda") is noise_batch
    assert images_for("cpu") is not noise_batch
    images, labels = noise_batch(13, 8)
    assert images.shape == (13, 3, 8, 8)
    assert labels.tolist() == [*range(11), 0, 1]


# The commands


def test_passes_write_a_bandwidth_for_each(tmp_path, capsys):
    stem = tmp_path / "passes"
    assert benchmarks.main(["passes", "--device", "rehearsal", *TINY, "--runs", "2", "--output", str(stem)]) == 0
    results = json.loads((tmp_path / "passes.json").read_text())
    assert results["kind"] == "gpu-passes"
    assert results["command"].startswith("python -m benchmarks passes --device rehearsal --stages 1")
    assert results["device"]["gpu"] == "rehearsal on the CPU"
    train = {row["name"]: row for row in results["rows"] if row["mode"] == "train"}
    assert {"channel_stats", "concept_modulate", "middle_input_grad"} < train.keys()
    for row in train.values():
        assert row["launches"] > 1
        assert (row["gbps"] is not None) == (row["copy_gbps"] is not None) == (row["reads"] + row["writes"] > 0)
    shown = capsys.readouterr().out
    assert "middle, training step: stage 1, p=4, 8×8, N=2, bfloat16, contiguous: " in shown
    assert "training step of the middle: at most " in shown
    with (tmp_path / "passes.csv").open() as file:
        assert [line["name"] for line in csv.DictReader(file)] == [row["name"] for row in results["rows"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Results of a tiny run, on disk."""
    stem = tmp_path_factory.mktemp("saved") / "run"
    arguments = ["--levels", "middle", "--providers", "fused", "reference", "plain", "--case-seconds", "0.01"]
    assert benchmarks.main(["--device", "rehearsal", *TINY, *arguments, "--output", str(stem)]) == 0
    return stem.with_name("run.json")


def test_run_writes_files_and_headlines(saved):
    results = json.loads(saved.read_text())
    assert results["kind"] == "gpu-run"
    assert [row["provider"] for row in results["rows"]] == ["fused", "reference", "plain"] * 2
    assert "left_out" not in results
    lines = headlines([saved])
    assert results["backend"] == "composite"
    assert [line.split(": ")[:2] for line in lines] == [
        ["composite", "middle, training, N=2"],
        ["composite", "middle, evaluation, N=2"],
    ]
    assert "× eager python_ref (1 of 1)" in lines[0]
    assert not list(saved.parent.glob("*.part*"))


def test_pictures_are_drawn(saved):
    pytest.importorskip("matplotlib")
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_headlines_of_what_is_not_there_say_so(tmp_path, capsys):
    (tmp_path / "cut.json").write_text("{")
    assert benchmarks.main(["headlines", str(tmp_path / "none.json"), str(tmp_path / "cut.json")]) == 0
    assert capsys.readouterr().out == "none.json: FileNotFoundError\ncut.json: JSONDecodeError\n"


def pass_row(name, gbps, copy_gbps, **changes):
    row = dict(mode="train", stage=1, batch=256, layout="contiguous", name=name, gbps=gbps, copy_gbps=copy_gbps)
    return row | dict(fits_l2=False, peak_gbps=4000.0, launches=2.0) | changes


def test_headlines_tell_the_worst_pass_past_the_cache(tmp_path):
    rows = [
        pass_row("channel_stats", 2700.0, 3000.0),
        pass_row("channel_stats", 3000.0, 3000.0, layout="channels_last"),
        pass_row("channel_stats", 10.0, 3000.0, stage=4, fits_l2=True),
        pass_row("reason", None, None),
    ]
    (tmp_path / "passes.json").write_text(json.dumps({"kind": "gpu-passes", "rows": rows}))
    first, second = headlines([tmp_path / "passes.json"])
    assert first == (
        "training, channel_stats: at least 90% of a copy past the L2 "
        "(stage 1, N=256, contiguous: 2700 GB/s, 68% of the peak)"
    )
    assert second == "training step of the middle: at most 4 launches (stage 1, N=256, contiguous)"


def test_headlines_tell_how_the_backends_stand(tmp_path):
    base = dict(dtype="bfloat16", layout="contiguous", mode="eval", batch=8, reason=None)
    rows = [
        base | dict(stage=stage, provider=name, graph_ms=ms)
        for stage, times in ((1, {"triton": 3.0, "cuda": 2.0}), (2, {"triton": 1.0, "cuda": 2.0}))
        for name, ms in times.items()
    ]
    rows += [
        base | dict(batch=1, stage=1, provider=name, graph_ms=None, reason="no GPU") for name in ("triton", "cuda")
    ]
    (tmp_path / "faster.json").write_text(json.dumps({"kind": "gpu-faster", "rows": rows}))
    assert headlines([tmp_path / "faster.json"]) == [
        "evaluation, bfloat16, N=8: cuda is 0.5 to 1.5× as fast as triton, in 2 cases",
        "evaluation, bfloat16, N=1: 2 without times or say: no GPU",
    ]


def test_another_backend_is_measured_by_name(tmp_path, capsys):
    arguments = ["--device", "rehearsal", *TINY, "--modes", "eval", "--output", str(tmp_path / "x")]
    assert benchmarks.main(["passes", *arguments, "--backend", "cpp"]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["backend"] == "cpp"
    assert benchmarks.main(["passes", *arguments, "--backend", "rust"]) == 1
    assert "--backend is 'rust'; it takes one of composite, cpp" in capsys.readouterr().err


def test_an_early_end_leaves_what_there_is(tmp_path, monkeypatch, capsys):
    calls = []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_case(*args, **kwargs)

    monkeypatch.setattr(command, "run_case", stopped)
    arguments = [
        "--levels",
        "middle",
        "--providers",
        "fused",
        "--case-seconds",
        "0.01",
        "--output",
        str(tmp_path / "x"),
    ]
    assert benchmarks.main(["--device", "rehearsal", *TINY, *arguments]) == 1
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["left_out"] == "interrupted in case 2 of 2"
    assert len(results["rows"]) == 1
    assert "x.json: interrupted in case 2 of 2" in capsys.readouterr().out


def test_cases_that_there_is_no_time_for_are_counted(tmp_path, capsys):
    arguments = ["--levels", "middle", "--providers", "fused", "--seconds", "0", "--output", str(tmp_path / "x")]
    assert benchmarks.main(["--device", "rehearsal", *TINY, *arguments]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == "2 of 2 cases: out of time"
    assert "no picture: nothing was timed" in capsys.readouterr().out


def test_a_wrong_product_fails_the_command(tmp_path, monkeypatch):
    def with_wrong(device):
        providers = gpu_providers(device)
        return providers | {"fused": replace(providers["fused"], build=Wrong)}

    monkeypatch.setattr(command, "gpu_providers", with_wrong)
    arguments = ["--levels", "middle", "--modes", "eval", "--providers", "fused", "--output", str(tmp_path / "x")]
    assert benchmarks.main(["--device", "rehearsal", *TINY, *arguments]) == 1
    lines = headlines([tmp_path / "x.json"])
    assert lines[0].startswith("composite: middle, evaluation, N=2: no times in 1 of 1 cases: wrong: ")


def test_unknown_names_are_errors(capsys):
    for arguments in (
        ["overhead", "--device", "cuda"],
        ["--device", "tpu"],
        ["--device", "rehearsal", "--stages", "5"],
    ):
        with pytest.raises(SystemExit) as stopped:
            benchmarks.main(arguments)
        assert stopped.value.code == 2
    capsys.readouterr()
    assert benchmarks.main(["--device", "rehearsal", "--providers", "rust"]) == 1
    assert "there is no provider 'rust'" in capsys.readouterr().err
