"""Proves: the tuner times each different configuration once, drops what spills, fails or is wrong, and makes rules that
the table finds where they were measured; its clock is a stand-in's."""

from __future__ import annotations

import json
from itertools import count, product

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import __main__ as benchmarks
from benchmarks.gpu import tune
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.rehearsal import Rehearsal
from vcr_ops.triton_common import aot, configs, record
from vcr_ops.triton_common.launch import INTERPRETED
from vcr_ops.triton_common.record import Problem
from vcr_ops.triton_common.sizes import sizes_of

PROBLEM = Problem(4, 56, 2, layout="channels_last", concepts=8)
SMALL = {"BS": 16, "CB": 1, "num_warps": 4, "num_stages": 2, "splits": 1}


class Clock(Rehearsal):
    """Says what a function of the last launch that is timed says; nothing runs."""

    def __init__(self, patch, seconds):
        self.seconds, self.ran = seconds, []
        patch.setattr(tune, "run", self.run)
        patch.setattr(tune, "difference", lambda ours, theirs: "")

    def run(self, launches):
        self.ran = list(launches)

    def queued(self, function):
        function()
        return self.seconds(self.ran[-1])


def step(problem=PROBLEM):
    with record.holding():
        return tune.Step(problem, "cpu")


def search(patch, seconds, kernel="concept_modulate", budget=None, arch="sm_90"):
    """With every kernel compiled without complaint, unless aot.results is replaced."""
    if arch != "interpreter" and aot.results.__module__ == "vcr_ops.triton_common.aot":
        patch.setattr(aot, "results", lambda wanted, *_: ((each, aot.Result(32, 0, 0)) for each in wanted))
    device = Clock(patch, seconds)
    problem = PROBLEM if kernel not in tune.EVALUATION else Problem(4, 56, 2, mode="evaluation", concepts=8)
    with configs.pretend(arch):
        compiler = tune.Compiler(arch, 1)
        return tune.search(step(problem), kernel, device, compiler, budget or Budget(100))


# Forced configurations


def test_a_forced_configuration_goes_before_the_table():
    with configs.pretend("sm_90"):
        sizes = sizes_of(torch.empty(2, 32, 56, 56), (8, 4, 4))
    table = sizes.config("channel_stats"), sizes.config("concept_sample")
    with configs.force("channel_stats", SMALL):
        assert sizes.config("channel_stats") == SMALL
        assert sizes.config("concept_sample") == table[1]
        with configs.force("channel_stats", SMALL | {"BS": 32}):
            assert sizes.config("channel_stats")["BS"] == 32
        assert sizes.config("channel_stats") == SMALL
    assert (sizes.config("channel_stats"), sizes.config("concept_sample")) == table
    with pytest.raises(ValueError, match="must have exactly"), configs.force("channel_stats", {"BS": 3}):
        pass


# Candidates


def test_candidates_are_neighbours_and_possible():
    found = SMALL | {"CB": 4}
    near = [each for each in tune.tiles(found) if tune.possible(each)]
    assert near[0] == found
    assert len(near) == 21
    assert all(0.5 <= each["BS"] * each["CB"] / 64 <= 2 for each in near)
    assert {each["num_warps"] for each in near} == {2, 4, 8}
    assert {each["splits"] for each in near} == {1}
    other = [each for each in tune.spread(found) if tune.possible(each)]
    assert {(each["splits"], each["num_stages"]) for each in other} == set(product((1, 2, 4), (1, 2, 3)))
    assert not any(tune.possible(found | bad) for bad in ({"BS": 0}, {"num_warps": 32}, {"splits": 0}, {"CB": 0}))


@pytest.mark.parametrize("kernel", list(tune.TIMED))
def test_each_kernel_s_configuration_reaches_what_is_timed(kernel):
    mode = "evaluation" if kernel in tune.EVALUATION else "training"
    size = 112 if kernel in tune.EVALUATION else 56  # a small map is one tile, whatever the table says
    problem = Problem(4, size, 2, layout="channels_last", mode=mode, concepts=8)
    with configs.pretend("sm_90"):
        one = step(problem)
        shipped = one.shipped(kernel)
        before, _ = one.take(kernel, shipped)
        after, _ = one.take(kernel, shipped | {"BS": shipped["BS"] // 2, "splits": shipped["splits"] * 2})
    changed = {a.name for a, b in zip(before, after, strict=True) if tune.identity([a]) != tune.identity([b])}
    assert changed & set(tune.TIMED[kernel])
    idle = {"concept_modulate"} if kernel == "concept_sample" else set()  # told the splits, but doesn't merge them
    assert changed - idle <= set(tune.TIMED[kernel])


# Searching


def test_the_fastest_is_found_across_both_rounds(monkeypatch):
    def seconds(launch):  # best at 8 warps and 3 stages, which no single round reaches
        return 1e-3 / launch.options["num_warps"] / launch.options["num_stages"]

    outcome = search(monkeypatch, seconds)
    assert outcome.beyond_noise
    assert (outcome.best["num_warps"], outcome.best["num_stages"]) == (8, 3)
    assert outcome.gain == pytest.approx(1 - (4 * 2) / (8 * 3))
    assert outcome.timed > 20
    assert "-> 41.7 µs (66.7% less)" in tune.line(outcome)


def test_every_different_launch_is_timed_once(monkeypatch):
    asked = []

    def seconds(launch):
        asked.append(tune.identity([launch]))
        return 1.0

    outcome = search(monkeypatch, seconds)
    # the shipped one is timed last again, and with it the first ones that weren't slower
    assert len(set(asked)) == outcome.timed
    assert max(asked.count(each) for each in set(asked)) <= tune.SCREENING + tune.MOST
    assert not outcome.beyond_noise
    assert tune.new_rules([outcome], [2], "sm_90") == []


def test_what_spills_or_fails_or_is_wrong_is_dropped(monkeypatch):
    def results(wanted, *_):
        for each in wanted:
            options = dict(each.options)
            spills = 8 if options["num_warps"] == 2 else 0
            yield each, aot.Result(32, spills, 300_000 if options["num_stages"] == 3 else 0)

    def seconds(launch):
        if launch.options["BS"] > PROBLEM_BS:
            raise RuntimeError("out of resource: shared memory\nmore")
        return 1e-3 * launch.options["CB"] * launch.options["num_warps"] / launch.options["num_stages"]

    with configs.pretend("sm_90"):
        PROBLEM_BS = step().shipped("concept_modulate")["BS"]
    monkeypatch.setattr(aot, "results", results)
    outcome = search(monkeypatch, seconds)
    said = list(outcome.dropped.values())
    assert "spills 8 bytes" in said
    assert "takes 300000 bytes of shared memory of 232448" in said
    assert "RuntimeError: out of resource: shared memory" in said
    assert (outcome.best["num_warps"], outcome.best["num_stages"]) == (4, 2)
    assert outcome.best["BS"] <= PROBLEM_BS

    monkeypatch.undo()
    right = search(monkeypatch, lambda launch: 1.0 / launch.options["num_warps"])
    monkeypatch.undo()
    differences = iter(["result 0 is off"] + [""] * 100)
    device_run = Clock(monkeypatch, lambda launch: 1.0 / launch.options["num_warps"])
    monkeypatch.setattr(tune, "difference", lambda ours, theirs: next(differences))
    with configs.pretend("sm_90"):
        monkeypatch.setattr(aot, "results", lambda wanted, *_: ((each, aot.Result(1, 0, 0)) for each in wanted))
        wrong = tune.search(step(), "concept_modulate", device_run, tune.Compiler("sm_90", 1), Budget(100))
    assert wrong.timed == right.timed - 1
    assert "1 WRONG" in tune.line(wrong)


def test_no_candidate_is_begun_when_the_time_is_over(monkeypatch):
    outcome = search(monkeypatch, lambda launch: 1.0, budget=Budget(0))
    assert outcome.timed == 1
    assert outcome.best == outcome.shipped


def test_results_may_differ_by_rounding_alone():
    out, gradient = torch.randn(1000).bfloat16(), torch.randn(50)
    nothing = torch.full((3,), 1e-9)  # a gradient that is zero in theory
    theirs = [out, gradient, nothing, torch.empty(0)]
    assert tune.difference([out, gradient * (1 + 1e-5), -nothing, torch.empty(0)], theirs) == ""
    assert "result 1 is off by" in tune.difference([out, gradient * 1.01, nothing, torch.empty(0)], theirs)
    assert "result 0" in tune.difference([out.clone().fill_(float("nan")), *theirs[1:]], theirs)


def test_candidates_are_compiled_for_the_architecture(monkeypatch):
    """By the real compiler, in a process of its own."""
    if INTERPRETED:
        pytest.skip("kernels are compiled, not interpreted")
    monkeypatch.setattr(aot, "default_cache", lambda: None)
    with configs.pretend("sm_90"):
        compiler = tune.Compiler("sm_90", 1)
        one = step()
        new = tune.fresh(one, "concept_modulate", [one.shipped("concept_modulate")] * 2, compiler, set())
        assert len(new) == 1  # the same launches again are no other candidate
        compiler.compile(new[0][1], Budget(100))
    assert [kernel.name for kernel in new[0][1]] == ["concept_modulate"]
    assert compiler.complaint(new[0][1]) == ""
    assert "out of time" in tune.Compiler("sm_90", 1).complaint(new[0][1])


# Rules


def outcome(n, best, kernel="channel_stats", p=4, size=56, beyond_noise=True):
    problem = Problem(p, size, n, layout="contiguous")
    return tune.Outcome(kernel, problem, SMALL, SMALL | best, 2.0, 1.0, beyond_noise, 9, {})


def test_ranges_meet_at_geometric_means():
    assert [tune.between([1, 16, 256], n) for n in (1, 16, 256)] == [[None, 4], [5, 64], [65, None]]
    assert tune.between([8], 8) == [None, None]


def test_rules_hold_where_they_were_measured():
    wide, long = {"CB": 2}, {"BS": 64}
    outcomes = [
        outcome(1, long),
        outcome(16, wide),
        outcome(256, wide),
        outcome(1, wide, p=16, size=14),
        outcome(16, wide, p=16, size=14, beyond_noise=False),
        outcome(256, wide, p=16, size=14),
    ]
    rules = tune.new_rules(reversed(outcomes), [256, 1, 16], "sm_90")
    assert [(rule["p"], rule["S"], rule["N"], rule["config"]) for rule in rules] == [
        ([None, 4], [784, 12544], [None, 4], SMALL | long),
        ([None, 4], [784, 12544], [5, None], SMALL | wide),
        ([9, 16], [49, 784], [None, 4], SMALL | wide),
        ([9, 16], [49, 784], [65, None], SMALL | wide),
    ]
    table = tune.in_front(rules, configs.rules())
    configs.check(table)
    with pytest.MonkeyPatch.context() as patch:
        asked = {"layout": "contiguous", "p": 4, "S": 3136, "itemsize": 2}
        before = configs.config("channel_stats", N=1, **asked, arch="gfx942")
        patch.setattr(configs, "rules", lambda: table)
        configs.config.cache_clear()
        assert configs.config("channel_stats", N=1, **asked, arch="sm_90") == SMALL | long
        assert configs.config("channel_stats", N=128, **asked, arch="sm_90") == SMALL | wide
        assert configs.config("channel_stats", N=1, **asked, arch="gfx942") == before
    configs.config.cache_clear()


def test_rules_that_can_t_be_reached_any_more_go():
    first = tune.new_rules([outcome(16, {"CB": 2}), outcome(256, {})], [16, 256], "sm_90")
    table = tune.in_front(first, [{"config": SMALL}])
    assert len(table) == 3
    again = tune.new_rules([outcome(16, {"CB": 4}), outcome(256, {"CB": 4})], [16, 256], "sm_90")
    assert tune.in_front(again, table) == [*again, {"config": SMALL}]
    narrow = tune.new_rules([outcome(16, {"CB": 4})], [1, 16, 256], "sm_90")
    assert tune.in_front(narrow, table) == [*narrow, *table]
    assert not tune.covers(first[0], {"kernel": ["channel_stats", "concept_sample"], "config": SMALL})
    assert tune.covers({"kernel": ["a", "b"], "config": SMALL}, first[0] | {"kernel": "a"})


# The command


def test_large_batches_come_first_and_each_kernel_in_its_mode():
    planned = tune.steps(tune.parser().parse_args([]))
    assert sum(len(kernels) for _, kernels in planned) == 6 * 2 * 4 * 3
    assert [problem.n for problem, _ in planned] == sorted((problem.n for problem, _ in planned), reverse=True)
    assert {(problem.p, problem.size) for problem, _ in planned} == {(4, 56), (8, 28), (16, 14), (32, 7)}
    assert {problem.mode for problem, kernels in planned if kernels == ["concept_sample_inference"]} == {"evaluation"}


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="there is a GPU here, or the interpreter")
def test_without_a_gpu_the_command_says_so(capsys):
    assert benchmarks.main(["tune"]) == 1
    assert "no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmarks.main(["tune", "--device", "rehearsal"])
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.triton
def test_a_rehearsal_runs_the_kernels_and_writes_a_table(tmp_path, capsys, monkeypatch):
    for name in ("SCREENING", "LEAST", "MOST"):
        monkeypatch.setattr(tune, name, 1)
    monkeypatch.setattr(tune, "ROUNDS", (lambda found: [found | {"num_stages": 3}, found | {"BS": found["BS"] // 2}],))
    clock = count()
    # whatever is timed later is faster, so that there are rules
    monkeypatch.setattr(Rehearsal, "queued", lambda self, function: (function(), 0.5 ** next(clock))[1])
    words = ["tune", "--device", "rehearsal", "--stages", "1", "--layouts", "contiguous"]
    words += ["--image-size", "8", "--batch", "2", "--concepts", "1"]
    kernels = ["--kernels", "concept_modulate", "concept_sample_inference", "middle_input_grad"]
    with pytest.raises(SystemExit):
        benchmarks.main([*words, *kernels])
    assert "belong in no table" in capsys.readouterr().err
    before = configs.PATH.read_text()
    path = tmp_path / "table.json"
    assert benchmarks.main([*words, *kernels, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    table = json.loads(path.read_text())
    configs.check(table)
    assert [rule["kernel"] for rule in table[:3]] == [
        "concept_sample_inference",
        "concept_modulate",
        "middle_input_grad",
    ]
    assert {rule["arch"] for rule in table[:3]} == {"interpreter"}
    assert configs.PATH.read_text() == before
    assert benchmarks.main([*words, "--kernels", "concept_modulate", "--seconds", "0", "--dry-run"]) == 0
    assert "1 of 1 cases: out of time" in capsys.readouterr().out
