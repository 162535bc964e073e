"""Proves, without a GPU: how many kernels each step launches, on which device, and that kernels compile for GPUs that
aren't here without spilling registers or asking for more shared memory than there is.

All kernels are compiled by `python -m vcr_ops.triton_common.aot`, which CI runs; here each is, once."""

import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from vcr_ops.triton_common import aot, configs, record
from vcr_ops.triton_common.launch import launch

if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("kernels are compiled, not interpreted", allow_module_level=True)

LOOKS = [pytest.param(*look, id="-".join(look)) for look in aot.LOOKS]
PLACES = list(itertools.product((aot.STAGES[0], aot.STAGES[-1]), aot.LAYOUTS))


@pytest.mark.parametrize("sampler, modulation", LOOKS)
def test_launches_of_a_training_step(sampler: str, modulation: str) -> None:
    for ((p, size), layout), n in itertools.product(PLACES, (1, 256)):
        problem = record.Problem(p, size, n, layout=layout, sampler=sampler, modulation=modulation)
        forward, backward = record.middle_launches(problem, "sm_90")
        names = [each.name for each in forward]
        assert names == ["channel_stats", "concept_sample", "concept_reason", "concept_modulate", "move_running_stats"]
        assert [each.name for each in backward] == ["modulate_backward_sums", "small_gradients", "middle_input_grad"]


@pytest.mark.parametrize("sampler, modulation", LOOKS)
def test_launches_of_an_evaluation(sampler: str, modulation: str) -> None:
    for ((p, size), layout), n in itertools.product(PLACES, (1, 256)):
        problem = record.Problem(p, size, n, layout=layout, mode="evaluation", sampler=sampler, modulation=modulation)
        forward, backward = record.middle_launches(problem, "sm_90")
        assert len(forward) == 2, [each.name for each in forward]
        assert backward == []


@pytest.mark.parametrize("sampler, modulation", LOOKS)
def test_steps_of_a_synchronised_middle(sampler: str, modulation: str) -> None:
    """A launch more than in one op, or two for the images' means; and fake kernels that say what they return."""
    for ((p, size), layout), n, dtype in itertools.product(PLACES, (1, 256), (torch.bfloat16, torch.float64)):
        look = dict(sampler=sampler, modulation=modulation, layout=layout, mode="steps")
        launches, steps = record.step_launches(record.Problem(p, size, n, dtype, **look), "sm_90")
        names = [each.name for each in launches]
        assert len(names) - (names.count("channel_stats") - 1) == 8, names
        for name, pair in steps.items():
            returned, fake = (x if isinstance(x, tuple) else (x,) for x in pair)
            assert len(returned) == len(fake), name
            for x, y in zip(returned, fake, strict=True):
                assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device), name


def test_grids_stay_within_the_limits() -> None:
    """65535 along the second and third axis; 2**31 - 1 along the first."""
    for layout, mode in itertools.product(aot.LAYOUTS, record.MODES):
        for each in record.launches(record.Problem(4, 56, 4096, layout=layout, mode=mode), "sm_90"):
            assert each.grid[0] < 2**31, each
            assert all(extent <= 65535 for extent in each.grid[1:]), each


class Kernel:
    """Notes where it was launched."""

    __name__ = "stand_in"

    def __init__(self, current: list[int]) -> None:
        self.current, self.runs = current, []  # type: ignore[var-annotated]

    def run(self, *args: Any, **options: Any) -> None:
        self.runs.append((self.current[-1], args, options))


def test_the_launcher_guards_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_device=lambda: current[-1], device=Guard))
    kernel = Kernel(current)
    for index in (0, 1):
        launch(kernel, (3,), torch.device("cuda", index), "x", BS=8, num_warps=4)
    options = {"grid": (3,), "warmup": False, "enable_fp_fusion": False, "BS": 8, "num_warps": 4}
    assert kernel.runs == [(0, ("x",), options), (1, ("x",), options)]
    assert current == [0]
    launch(kernel, (3, 0), torch.device("cuda", 0), "x")
    assert len(kernel.runs) == 2, "an empty grid"


def test_the_choice_meets_in_threes() -> None:
    """Each architecture, stage and layout in training, and each pair of architecture, type and variant."""
    cases = [(arch, problem) for arch, problem in aot.problems() if problem.mode == "training"]
    places = {(arch, (problem.p, problem.size), problem.layout) for arch, problem in cases}
    assert places == set(itertools.product(aot.ARCHS, aot.STAGES, aot.LAYOUTS))
    met = {(arch, problem.dtype, (problem.sampler, problem.modulation)) for arch, problem in cases}
    for first, second in itertools.combinations((aot.ARCHS, aot.DTYPES, aot.LOOKS), 2):
        assert set(itertools.product(first, second)) <= {
            pair for each in met for pair in itertools.combinations(each, 2)
        }


def test_every_kernel_compiles() -> None:
    """One of each, for one architecture after the other: of the smallest stage."""
    kernels = aot.kernels(aot.problems())
    names = list(dict.fromkeys(kernel.name for kernel in kernels))
    assert {"channel_stats", "concept_sample", "concept_modulate", "modulate_backward_sums"} <= set(names)
    archs = dict(zip(names, itertools.cycle(aot.ARCHS), strict=False))
    first = {kernel.name: kernel for kernel in reversed(kernels) if kernel.arch == archs[kernel.name]}
    assert first.keys() == set(names)
    for kernel, result in aot.results(list(first.values()), jobs=2):
        assert result.complaint(kernel.arch) == "", kernel.name
        assert result.registers > 0


def test_every_rule_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled ahead of time uses each rule of the table, on each architecture that it is for. (The last is for
    whatever no other is for; on sm_100 that is nothing.)"""
    used, holds = set(), configs._holds

    def noted(rule: configs.Rule, names: dict[str, Any], sizes: dict[str, int]) -> bool:
        found = holds(rule, names, sizes)
        if found:
            used.add((configs.rules().index(rule), names["arch"]))
        return found

    monkeypatch.setattr(configs, "_holds", noted)
    configs.config.cache_clear()
    for arch, problem in aot.problems():
        record.launches(problem, arch)
    archs = [rule.get("arch", aot.ARCHS) for rule in configs.rules()]
    wanted = {(i, arch) for i, of in enumerate(archs) for arch in ([of] if isinstance(of, str) else of)}
    wanted -= {(len(configs.rules()) - 1, "sm_100")}
    assert {(i, arch) for i, arch in wanted if arch in aot.ARCHS} - used == set()


def test_a_large_batch() -> None:
    """What every program reads of all images' states has a bound, and so have the registers that it takes."""
    problem = record.Problem(32, 7, 4096, modulation="pixel")
    forward, backward = record.middle_launches(problem, "sm_90")
    modulate = next(each for each in forward if each.name == "concept_modulate")
    sums, small, _ = backward
    assert {x.numel() for x in modulate.args if isinstance(x, torch.Tensor) and x.dtype is torch.float64} == {
        128 * 2 * 8
    }
    assert sums.grid == (6 * 132,)
    assert {x.numel() for x in small.args if isinstance(x, torch.Tensor) and x.dtype is torch.float64} == {
        6 * 132 * 2 * 8
    }
    for each in (modulate, sums, small):
        assert aot.compile_kernel(aot.kernel_of(each, "sm_90", problem)).complaint("sm_90") == "", each.name


@triton.jit
def spills(x, o, N: tl.constexpr):
    """Far more live values than there are registers."""
    i = tl.arange(0, N)
    v = tl.load(x + i)
    w = tl.load(x + N + i)
    for _ in range(8):
        v = v * w + tl.sum(v, 0)
        w = w * v + tl.max(w, 0)
    tl.store(o + i, v + w)


@pytest.mark.parametrize("arch, n", [("sm_90", 32768), ("gfx942", 65536)])
def test_spills_are_seen(arch: str, n: int) -> None:
    argument = aot.Argument(torch.float32)
    options = (("N", n), ("num_warps", 4))
    result = aot.compile_kernel(aot.Kernel(spills, (argument, argument), options, arch, record.Problem(4, 7, 1)))
    assert "spills" in result.complaint(arch)


def test_too_much_shared_memory_is_seen() -> None:
    assert aot.Result(100, 0, 232_448).complaint("sm_90") == ""
    assert "takes 232449 bytes of shared memory of 232448" in aot.Result(100, 0, 232_449).complaint("sm_90")
    assert "65536" in aot.Result(100, 0, 65_537).complaint("gfx942")


def test_what_does_not_compile_is_a_complaint() -> None:
    kernel = aot.Kernel(spills, (aot.Argument(torch.float32),), (("N", 3),), "sm_90", record.Problem(4, 7, 1))
    assert aot.compile_kernel(kernel).complaint("sm_90") != ""


def test_configurations(tmp_path: Any) -> None:
    configs.check(configs.rules())
    asked = {"layout": "contiguous", "p": 4, "S": 3136, "N": 1, "itemsize": 2}
    small = {"BS": 16, "CB": 1, "num_warps": 1, "num_stages": 1, "splits": 1}
    table = [{"kernel": ["a", "b"], "p": [None, 4], "arch": "sm_90", "config": small}, {"config": small | {"BS": 32}}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "rules", lambda: table)
        configs.config.cache_clear()
        sizes = [configs.config(name, **asked, arch=arch)["BS"] for name in "abc" for arch in ("sm_90", "sm_80")]
        assert sizes == [16, 32, 16, 32, 32, 32]
        assert configs.config("a", **(asked | {"p": 5}), arch="sm_90")["BS"] == 32
    configs.config.cache_clear()
    configs.write(table, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text().count("\n") == 4
    for bad, message in (
        ([{"kernels": "a", "config": small}, *table], "rule 0 has an unknown field, 'kernels'"),
        ([{"config": {"BS": 1}}], "rule 0: config must have exactly BS"),
        (table[:1], "the last rule must hold for everything"),
    ):
        with pytest.raises(ValueError, match=message):
            configs.write(bad, tmp_path / "table.json")
