"""Which of a GPU's backends "auto" takes: the table of measurements, the choice, and the function that makes it when a
compiled call runs. No GPU is needed: what is measured is made up here."""

import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vcr_ops
from benchmarks import __main__ as benchmarks
from benchmarks.cases import Case as Timed
from benchmarks.cases import Inputs, expand
from benchmarks.gpu import command
from benchmarks.gpu import faster as benchmark
from benchmarks.gpu.rehearsal import Rehearsal
from benchmarks.providers import PROVIDERS, Workload
from tests.small import feature_map
from vcr_ops import backend, faster, library
from vcr_ops.backend import Case, choose, runs_on
from vcr_ops.faster import Size, size_of
from vcr_ops.ops import dispatch
from vcr_ops.ops.concept_reason import op as concept_reason


def row(arch="sm_90", **changes):
    size = Size("training", "bfloat16", "contiguous", 64, 128, 3136)._asdict() | changes
    backend = size.pop("backend", "cuda")
    return {"arch": arch, **size, "backend": backend, "ratio": 1.2}


@pytest.fixture
def with_cuda(monkeypatch):
    """A GPU of sm_90 that the CUDA library is built for. ``with_cuda(problem, archs)`` says what is wrong with the
    library, and with what it was compiled for."""
    monkeypatch.setattr(backend, "arch_of", lambda number: "sm_90")

    def put(problem=None, archs=None):
        monkeypatch.setattr(library, "_cuda_problem", problem)
        monkeypatch.setattr(backend, "_built_for", {0: archs, None: archs})  # the tensors' device is the CPU

    put()
    return put


@pytest.fixture
def table(tmp_path, monkeypatch):
    """``table(rows)`` puts rows where the shipped table was."""
    path = tmp_path / "faster.json"
    monkeypatch.setattr(faster, "PATH", path)

    def put(*rows):
        faster.replace(list(rows), {"gpu": "made up"})

    put()
    yield put
    monkeypatch.undo()
    faster._rows.cache_clear()
    faster.faster.cache_clear()


def test_shipped_table_is_well_formed() -> None:
    table = json.loads(faster.PATH.read_text())
    archs = {arch for each in table["about"] for arch in each["archs"]}
    assert {row["arch"] for row in table["rows"]} == archs
    for row in table["rows"]:
        assert row["backend"] in ("triton", "cuda")
        assert Size(*(row[name] for name in Size._fields)).mode in ("training", "evaluation")


def test_size_of_a_map() -> None:
    y = torch.zeros(3, 8, 5, 7, dtype=torch.bfloat16)
    assert size_of(y, True) == Size("training", "bfloat16", "contiguous", 3, 8, 35)
    last = y.float().to(memory_format=torch.channels_last)
    assert size_of(last, False) == Size("evaluation", "float32", "channels_last", 3, 8, 35)
    assert size_of(y.expand(3, 8, 5, 7).transpose(2, 3), True).layout == "contiguous"


def test_nearest_measurement_of_the_same_kind_decides(table) -> None:
    table(row(batch=1, backend="cuda"), row(batch=256, backend="triton"), row(mode="evaluation", backend="cuda"))
    size = Size("training", "bfloat16", "contiguous", 4, 128, 3136)
    assert faster.faster("sm_90", size) == "cuda"
    assert faster.faster("sm_90", size._replace(batch=100)) == "triton"
    assert faster.faster("sm_90", size._replace(batch=0)) == "cuda"
    assert faster.faster("sm_90", size._replace(batch=100, mode="evaluation")) == "cuda"
    for other in (size._replace(dtype="float32"), size._replace(layout="channels_last")):
        assert faster.faster("sm_90", other) is None
    assert faster.faster("sm_80", size) is None


def test_measuring_again_replaces_the_cases_that_were_measured_again(table) -> None:
    table(row(), row("sm_80"))
    table(row(backend="triton"))
    found = json.loads(faster.PATH.read_text())
    assert [(r["arch"], r["backend"]) for r in found["rows"]] == [("sm_80", "cuda"), ("sm_90", "triton")]
    assert [each["archs"] for each in found["about"]] == [["sm_80", "sm_90"], ["sm_90"]]


def test_a_measurement_that_was_cut_short_leaves_the_other_cases_as_they_were(table) -> None:
    batches = (1, 8, 64, 256)
    table(*(row(batch=batch, backend="triton") for batch in batches))
    faster.replace([row(batch=1)], {"gpu": "another day"})
    found = json.loads(faster.PATH.read_text())
    assert [(r["batch"], r["backend"]) for r in found["rows"]] == [
        (batch, "cuda" if batch == 1 else "triton") for batch in batches
    ]
    assert faster.faster("sm_90", Size("training", "bfloat16", "contiguous", 256, 128, 3136)) == "triton"
    assert [each["gpu"] for each in found["about"]] == ["made up", "another day"]
    table(*(row(batch=batch, backend="triton") for batch in batches))
    assert [each["gpu"] for each in json.loads(faster.PATH.read_text())["about"]] == ["made up"]


def test_auto_takes_the_faster_and_says_why(table, with_cuda) -> None:
    size = Size("training", "bfloat16", "contiguous", 64, 128, 3136)
    case = Case("cuda", size=size)
    chosen, reason = choose("auto", case)
    assert (chosen.name, reason) == (
        "triton",
        "auto takes it for CUDA tensors: on sm_90 no other was measured at such sizes",
    )
    table(row())
    chosen, reason = choose(None, case)
    assert (chosen.name, reason) == (
        "cuda",
        "auto takes it: the fastest at the nearest size that was measured on sm_90",
    )
    assert choose("triton", case)[0].name == "triton"
    assert choose(None, case._replace(tracing="torch.func"))[0].name == "composite"


@pytest.fixture
def run(monkeypatch):
    """``run(op, *args)`` calls what is behind the key CUDA; ``run.calls`` has the backends that were taken."""
    ops = {name: getattr(torch.ops.vcr_ops, name).default for name in library.OPS}

    def call(name, *args):
        dispatch._serve(ops[name], "CUDA", ("triton", "cuda"))(*args)

    call.calls = []
    for name, op in ops.items():
        for each in ("triton", "cuda"):
            taken = functools.partial(lambda *args, taken: call.calls.append(taken), taken=(name, each))
            monkeypatch.setitem(dispatch._functions, (op, each), taken)
    return call


def test_the_dispatch_key_s_function_chooses_as_auto_does(table, with_cuda, run) -> None:
    """Forward and backward alike, for only the one that has saved something can read it."""
    table(
        row(dtype="float32", batch=2, channels=12, positions=20),
        row(mode="evaluation", dtype="float32", backend="triton"),
    )
    y, none = feature_map(2, 12, 4, 5), [None] * 23

    run("vcr_middle", y, *none, True)
    run("vcr_middle_backward", y, y, *none)
    run("vcr_middle", y, *none, False)
    run("concept_modulate", y, *none)
    run("concept_reason", y)
    with backend.use_backend("triton"):
        run("vcr_middle", y, *none, True)
    with backend.use_backend("cuda"):
        run("concept_reason", y)
    assert run.calls == [
        ("vcr_middle", "cuda"),
        ("vcr_middle_backward", "cuda"),
        ("vcr_middle", "triton"),
        ("concept_modulate", "cuda"),
        ("concept_reason", "triton"),
        ("vcr_middle", "triton"),
        ("concept_reason", "cuda"),
    ]


NOT_THERE = "CUDA C\\+\\+ was measured to be faster at such sizes on sm_90, but isn't there: "


def test_auto_takes_triton_where_the_faster_library_is_not_there(table, with_cuda, run, monkeypatch) -> None:
    table(row(dtype="float32", batch=2, channels=12, positions=20))
    y, none = feature_map(2, 12, 4, 5), [None] * 23
    case = Case("cuda", size=size_of(y, True))
    monkeypatch.setattr(backend, "_checked", {("cuda", 0): None})
    assert backend.resolve("auto", case).name == "cuda"
    run("vcr_middle", y, *none, True)
    assert run.calls == [("vcr_middle", "cuda")]
    for why, problem, archs in (
        ("its kernels aren't built", "its kernels aren't built", None),
        ("its kernels are compiled for 8.0", None, "its kernels are compiled for 8.0"),
    ):
        with_cuda(problem, archs)
        chosen, reason = choose("auto", case)
        assert chosen.name == backend.resolve("auto", case).name == "triton"
        assert re.fullmatch(f"auto takes it: {NOT_THERE}{why}", reason)
        run.calls.clear()
        run("vcr_middle", y, *none, True)
        run("vcr_middle_backward", y, y, *none)
        assert run.calls == [("vcr_middle", "triton"), ("vcr_middle_backward", "triton")]
        with pytest.raises(RuntimeError, match=rf"'cuda' can't run here \(the keyword backend names it\): {why}"):
            backend.resolve("cuda", case)
    # and where Triton isn't there either, that is said, with both reasons
    monkeypatch.setattr(backend, "_checked", {("cuda", 0): "Triton isn't installed"})
    with pytest.raises(RuntimeError, match=f"'triton' can't run here .*{NOT_THERE}.*: Triton isn't installed"):
        backend.resolve("auto", case)


def test_only_a_map_s_size_is_one_that_backends_were_compared_at(monkeypatch) -> None:
    """States have none, in eager mode as behind the dispatch key: else a compiled call would choose otherwise."""
    monkeypatch.setattr(backend, "_is_fake", lambda z: False)
    with FakeTensorMode():
        h, edge = torch.empty(2, 3, 4, device="cuda"), torch.empty(4, 3, device="cuda")
    assert backend.case_of(h).size == size_of(h, True)
    assert backend.case_of(h, is_map=False).size is None
    monkeypatch.setattr(concept_reason, "resolve", lambda requested, case: asked.append(case) or backend._COMPOSITE)
    asked = []
    vcr_ops.concept_reason(h, edge)
    assert [case.size for case in asked] == [None]


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["8.0", "9.0"], (8, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 0), True),
        (["10.0+PTX"], (9, 0), False),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        ([], (9, 0), False),
    ],
)
def test_what_code_runs_on(archs, capability, runs) -> None:
    assert runs_on(archs, *capability) == runs


def test_a_gpu_that_the_kernels_were_not_built_for(monkeypatch) -> None:
    monkeypatch.setattr(library, "_cuda_problem", None)
    monkeypatch.setattr(backend, "_built_for", {})
    monkeypatch.setattr(library, "cuda_archs", lambda: ["8.0", "9.0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (12, 0))
    with pytest.raises(
        RuntimeError, match=r"compiled for 8.0, 9.0, and cuda:1 is 12.0; build it again with TORCH_CUDA"
    ):
        backend.resolve("cuda", Case("cuda", number=1))


def test_the_benchmark_writes_what_won() -> None:
    rows = benchmark.compare(Timed("middle", "train", 1, 2, "bfloat16", image_size=32), Rehearsal(), 0.01)
    assert [r.provider for r in rows] == ["composite", "cpp"]
    assert all(r.reason is None and r.graph_ms for r in rows)
    (entry,) = benchmark.entries(rows, "sm_90")
    assert (entry["backend"], entry["channels"], entry["positions"]) == (rows[0].winner, 128, 64)
    assert entry["ratio"] >= 1
    assert rows[0].winner in benchmark.table(rows)


def test_backends_that_disagree_have_no_winner(monkeypatch) -> None:
    tensors = Workload.tensors

    def one_is_wrong(self):
        found = tensors(self)
        return found | {"d x": found["d x"] * 1.5} if getattr(self.call, "backend", "") == "cpp" else found

    monkeypatch.setattr(Workload, "tensors", one_is_wrong)
    rows = benchmark.compare(Timed("middle", "train", 1, 2, "float32", image_size=32), Rehearsal(), 0.01)
    assert all(r.winner is None and "disagree: d x by" in r.reason for r in rows)
    assert benchmark.entries(rows, "sm_90") == []


def test_a_rehearsal_is_not_written(table, capsys) -> None:
    """Before anything is run: what it would have to say is of no GPU."""
    before = faster.PATH.read_text()
    assert benchmarks.main(["faster", "--device", "rehearsal", "--write", "--seconds", "0"]) == 1
    said = "ValueError: --write puts a GPU's times into the shipped table; --device rehearsal has none\n"
    assert capsys.readouterr().err == said
    assert faster.PATH.read_text() == before


def test_the_command_is_the_one_that_is_named(capsys) -> None:
    (said,) = re.findall(r"``python -m benchmarks (.*?)``", faster.__doc__)
    command, *arguments = said.split()
    assert command in benchmarks.COMMANDS
    device, rest = benchmarks._device(command, arguments)
    assert device == "cuda"
    assert benchmark.options_of(rest).write
    with pytest.raises(SystemExit):
        benchmarks.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "with --write, put what is faster into the table that " in shown
    with pytest.raises(SystemExit):
        benchmarks.main(["faster", "--help"])
    assert "is written only with --write." in " ".join(capsys.readouterr().out.split())


class Card(Rehearsal):
    """The CPU under the name of a GPU."""

    def describe(self):
        return super().describe() | {"gpu": "NVIDIA H100", "capability": "9.0"}


SMALL = ["--stages", "1", "--image-size", "32", "--batch", "2", "--layouts", "contiguous", "--case-seconds", "0.01"]


def test_what_was_measured_is_put_into_the_table(table, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(command.DEVICES, "cuda", Card)
    table(row(), row(mode="training", dtype="bfloat16", batch=2, positions=64, backend="another"))
    before = faster.PATH.read_text()
    arguments = [*SMALL, "--dtype", "bfloat16", "--output", str(tmp_path / "timed")]
    assert benchmarks.main(["faster", "--device", "cuda", *arguments]) == 0
    assert faster.PATH.read_text() == before
    assert "wrote 2 cases" not in capsys.readouterr().out
    assert benchmarks.main(["faster", "--device", "cuda", *arguments, "--write"]) == 0
    assert f"wrote 2 cases into {faster.PATH}" in capsys.readouterr().out
    found = json.loads(faster.PATH.read_text())
    assert [(r["arch"], r["mode"], r["batch"], r["channels"], r["positions"]) for r in found["rows"]] == [
        ("sm_90", "evaluation", 2, 128, 64),
        ("sm_90", "training", 2, 128, 64),
        ("sm_90", "training", 64, 128, 3136),
    ]
    timed = json.loads((tmp_path / "timed.json").read_text())
    winners = {r["mode"]: r["winner"] for r in timed["rows"]}
    assert [r["backend"] for r in found["rows"]] == [winners["eval"], winners["train"], "cuda"]
    assert [each["gpu"] for each in found["about"]] == ["made up", "NVIDIA H100"]
    assert {"date", "commit"} < found["about"][1].keys()
    size = Size("evaluation", "bfloat16", "contiguous", 2, 128, 64)
    assert faster.faster("sm_90", size) == winners["eval"]  # without a new process


def test_a_run_that_is_cut_short_writes_what_it_has(table, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(command.DEVICES, "cuda", Card)
    compare, calls = benchmark.compare, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compare(*args)

    monkeypatch.setattr(benchmark, "compare", stopped)
    arguments = [*SMALL, "--output", str(tmp_path / "timed"), "--write"]
    assert benchmarks.main(["faster", "--device", "cuda", *arguments]) == 1
    assert len(json.loads(faster.PATH.read_text())["rows"]) == 1
    assert benchmarks.main(["faster", "--device", "cuda", *arguments, "--seconds", "0"]) == 0
    assert f"nothing was compared: {faster.PATH} stays as it is" in capsys.readouterr().out
    assert len(json.loads(faster.PATH.read_text())["rows"]) == 1


def cases_of(*dtypes):
    return benchmark.in_order(
        expand(
            ["middle"], ["train", "eval"], [1, 2, 3, 4], [1, 8, 64, 256], [], dtypes, ["contiguous", "channels_last"]
        )
    )


def test_a_cut_leaves_a_spread() -> None:
    cases = cases_of("bfloat16", "float32", "float16")
    assert len(cases) == len(set(cases)) == 3 * 4 * 16
    groups = list(dict.fromkeys((case.dtype, case.batch) for case in cases))
    assert groups[:4] == [("bfloat16", 256), ("bfloat16", 1), ("float32", 256), ("float32", 1)]
    assert groups[4:8] == [("bfloat16", 8), ("bfloat16", 64), ("float32", 8), ("float32", 64)]
    assert groups[8:] == [("float16", batch) for batch in (256, 1, 8, 64)]
    for at in range(0, len(cases), 16):  # every stage in both modes and formats before the next batch
        assert len({(case.stage, case.mode, case.layout) for case in cases[at : at + 16]}) == 16


def test_float16_is_compared_on_a_gpu_and_refused_on_the_cpu(tmp_path, monkeypatch, capsys) -> None:
    compared = []
    monkeypatch.setattr(benchmark, "compare", lambda case, *rest: compared.append(case) or [])
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(Rehearsal, "name", name)
        arguments = ["faster", "--device", "rehearsal", "--output", str(tmp_path / "timed")]
        assert benchmarks.main(arguments) == 0
        dtypes = ["bfloat16", "float32", *(["float16"] if name == "cuda" else [])]
        assert sorted({case.dtype for case in compared}) == sorted(dtypes)
        compared.clear()
    monkeypatch.undo()
    for arguments in (
        ["faster", "--device", "rehearsal"],
        ["passes", "--device", "rehearsal"],
        ["--device", "rehearsal"],
        ["passes"],
        [],
    ):
        capsys.readouterr()
        assert benchmarks.main([*arguments, "--dtype", "bfloat16", "float16"]) == 1
        said = "ValueError: --dtype float16 is for GPUs: on the CPU maps are float32 or bfloat16\n"
        assert capsys.readouterr().err == said


def test_float16_maps_have_float32_parameters_beside_them() -> None:
    case = Timed("middle", "eval", 1, 2, "float16")
    assert all(p.dtype == torch.float32 for p in PROVIDERS["composite"].module(case).parameters())
    inputs = Inputs(torch.zeros(1, 3, 4, 4, dtype=torch.float16), None, None, {})
    asked = []
    block = Workload(replace(case, level="block"), torch.nn.Identity(), inputs)
    block.call = lambda x: asked.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))) or x
    block.run()
    assert asked == [(True, torch.float16)]
