"""Proves: synchronised batch norm in the fused middle. Two processes (gloo) with a part of the images each give what
one process gives with all of them: output, running statistics, every gradient; for unequal parts, one empty, too.

Also: what is exchanged is small, only in training and within process_group; compiled, it is one graph; and the passes
as ops of their own are as near to the exact values as the one op."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import python_ref
import vcr_ops
from tests import grid, interpreter_patches
from tests.closeness import Closeness, Result
from tests.grid import Case
from tests.small import BACKENDS, VARIANTS, assert_same, feature_map
from tests.synced_processes import (
    MOMENTA,
    NAMES,
    STEPS,
    TWO,
    Synced,
    both,
    found_by_both,
    images,
    make,
    network,
    part_of,
    setups,
    synced,
    train,
)
from vcr_ops.ops.vcr_middle.synced import vcr_middle_synced

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
ALONE = Synced()
CASES = [case for case in ALONE.cases() if "batch" in (case.norm, case.state) and case.size != "N2C3p4S3136"][::2]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_steps_are_as_exact_as_the_op(case: Case) -> None:
    """One process: statistics of its own, passes as ops of their own."""
    ALONE.closeness(case, "cpp").check()


# Two processes


@pytest.fixture
def found(request: Any) -> Any:
    """(backend, what the two processes found)."""
    return request.param, *(found[request.param] for found in found_by_both())


two_processes = pytest.mark.parametrize("found", BACKENDS, indirect=True)


def together(first: dict[str, Tensor], second: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Both processes' results as one's: images one after another, gradients added, statistics the same on both."""
    found = {}
    for name, x in first.items():
        y = second[name]
        if name in ("out", "dy"):
            found[name] = torch.cat((x, y))
        elif name.startswith("d"):
            found[name] = x + y
        else:
            found[name] = x
            if name not in frozen:
                assert torch.equal(x, y), name
    return found


@pytest.mark.parametrize(
    "found, case",
    [*(("composite", case) for case in TWO[:2]), *(("cpp", case) for case in TWO)],
    indirect=["found"],
    ids=lambda x: x if isinstance(x, str) else x.id,
)
def test_two_processes_are_as_exact_as_one(found: Any, case: Case) -> None:
    backend, *ranks = found
    closeness = Closeness(case.feature_dtype, f"{case.id}-{backend}")
    for index, (a, b) in enumerate(zip(*(rank["draws"][case.id] for rank in ranks), strict=True)):
        outputs = {"out": torch.cat((a.outputs["out"], b.outputs["out"]))}
        for name in a.outputs.keys() - {"out"}:
            assert torch.equal(a.outputs[name], b.outputs[name]), name
            outputs[name] = a.outputs[name]
        gradients = {
            name: torch.cat((g, b.gradients[name])) if name == "y" else g + b.gradients[name]
            for name, g in a.gradients.items()
        }
        inputs, grads = ALONE.draw(case, index)
        closeness.add(
            Result(outputs, gradients),
            ALONE.plain_result(inputs, grads, case),
            ALONE.reference_result(inputs, grads, case),
        )
    closeness.check()


def reference(module: Any, options: dict[str, str]) -> Any:
    """python_ref's, which calls nn.BatchNorm, with the same parameters and norms."""
    theirs = python_ref.VisualConceptReasoning(12, 3, **options).double()
    theirs.bn, theirs.reasoner.bn = copy.deepcopy(module.bn), copy.deepcopy(module.reasoner.bn)
    theirs.load_state_dict(module.state_dict())
    return theirs


@two_processes
@pytest.mark.parametrize("parts, variant, momentum", STEPS, ids=["-".join(step) for step in STEPS])
def test_steps_are_those_of_one_process(found: Any, parts: str, variant: str, momentum: str) -> None:
    """Three steps beside nn.BatchNorm with all images: outputs, gradients, running statistics, counters."""
    backend, *ranks = found
    module = make(backend, variant)
    module.bn.momentum = module.reasoner.bn.momentum = MOMENTA[momentum]
    whole = both(0, reference(module, VARIANTS[variant]), slice(None), steps=3)
    for mine, wanted in zip(
        zip(*(rank[f"{parts}-{variant}-{momentum}"] for rank in ranks), strict=True), whole, strict=True
    ):
        assert_same(together(*mine), wanted, 1e-11)


@two_processes
@pytest.mark.parametrize("name", ["frozen-bn", "group-norm", "states-frozen", "untracked"])
def test_where_one_norm_is_something_else(found: Any, name: str) -> None:
    backend, *ranks = found
    module = reference(setups(backend)[name], {})
    for mine, wanted in zip(
        zip(*(rank[name] for rank in ranks), strict=True), both(0, module, slice(None), steps=2), strict=True
    ):
        assert_same(together(*mine), wanted, 1e-11)


@two_processes
def test_a_plain_norm_beside_synchronised_states_stays_local(found: Any) -> None:
    """The map's statistics are each process's own; the states' are everybody's."""
    backend, *ranks = found
    module = reference(setups(backend)["local-bn"], {})
    norms = [copy.deepcopy(module.bn) for _ in range(2)]
    z = torch.cat([bn(part) for bn, part in zip(norms, images(5).split((2, 3)), strict=True)])
    module.reasoner(module.sampler(z))
    for rank, bn in zip(ranks, norms, strict=True):
        mine = rank["local-bn"][0]
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(mine[f"bn.{name}"], bn.get_buffer(name), rtol=1e-11, atol=1e-11)
            wanted = module.reasoner.bn.get_buffer(name)
            torch.testing.assert_close(mine[f"reasoner.bn.{name}"], wanted, rtol=1e-11, atol=1e-11)


@two_processes
def test_what_is_exchanged(found: Any) -> None:
    """Per channel and per column of the states, in training alone: mean, squares and count; then two sums."""
    backend, *ranks = found
    for rank in ranks:
        sent = rank["exchanges-training"]
        if backend == "cpp":
            assert sent == [
                *(("all_gather_into_tensor", 2 * 12 + 1), ("all_gather_into_tensor", 2 * 4 + 1)),
                *(("all_reduce", 2 * 4), ("all_reduce", 2 * 12)),
            ]
        assert sent
        assert max(numbers for _, numbers in sent) <= 2 * 12 + 1
        assert rank["exchanges-evaluation"] == rank["exchanges-frozen"] == []
        assert [name for name, _ in rank["exchanges-no_grad"]]


@two_processes
def test_process_group(found: Any) -> None:
    backend, *ranks = found
    for rank, mine in zip(ranks, (slice(0, 2), slice(2, 5)), strict=True):
        assert_same(rank["group-alone"][0], both(0, make(backend), mine)[0], 0)
    wanted = both(0, reference(make(backend), {}), slice(None))[0]
    assert_same(together(*(rank["group-pair"][0] for rank in ranks)), wanted, 1e-11)


@two_processes
def test_the_reasoner_alone(found: Any) -> None:
    backend, *ranks = found
    whole = reference(make(backend), {}).reasoner
    out = whole(feature_map(5, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([rank["reasoner"][0] for rank in ranks]), out.detach())
    for rank in ranks:
        torch.testing.assert_close(rank["reasoner"][1], whole.bn.running_var)
        assert rank["reasoner"][2] == int(whole.bn.num_batches_tracked)


@two_processes
def test_modules_that_are_called(found: Any) -> None:
    """With a hook the ops run one by one; the states' statistics are everybody's all the same."""
    backend, *ranks = found
    module = reference(make(backend), {})
    module.bn.eval()
    assert_same(together(*(rank["hooked"][0] for rank in ranks)), both(0, module, slice(None))[0], 1e-11)


@two_processes
def test_checkpointing_and_autocast(found: Any) -> None:
    backend, *ranks = found
    wanted = both(0, reference(make(backend), {}), slice(None))[0]
    assert_same(together(*(rank["checkpointed"][0] for rank in ranks)), wanted, 1e-11)
    whole = reference(make(backend), {})
    out = torch.cat([rank["autocast"] for rank in ranks])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), whole(images(5).bfloat16().double()), rtol=0.03, atol=0.03)


@two_processes
def test_compiled_in_one_graph(found: Any) -> None:
    backend, *ranks = found
    variants = ("default", "pixel") if backend == "cpp" else ("default",)
    for variant in variants:
        wanted = both(0, reference(make(backend, variant), VARIANTS[variant]), slice(None))[0]
        assert_same(together(*(rank["compiled"][variant][0] for rank in ranks)), wanted, 1e-11)
        if variant == "default" and backend == "cpp":
            assert_same(together(*(rank["compiled"]["inductor"][0] for rank in ranks)), wanted, 1e-11)
    for rank in ranks:
        assert rank["compiled"]["graphs"] == len(variants)
        # What is exchanged is in the graph, for compilers to see.
        wanted_names = ["all_gather_into_tensor", "all_reduce"] if backend == "cpp" else ["all_reduce"]
        assert rank["compiled"]["exchanges"] == wanted_names


@two_processes
def test_a_network_under_ddp(found: Any) -> None:
    _, *ranks = found
    net = network()
    with vcr_ops.use_backend("cpp"):
        whole = train(net, net, slice(None))
    for step, wanted in enumerate(whole):
        first, second = (rank["ddp"][step] for rank in ranks)
        assert first.keys() == wanted.keys()
        assert_same({**first, "out": torch.cat((first["out"], second["out"]))}, wanted, 1e-9)
        for name in first.keys() - {"out"}:
            assert torch.equal(first[name], second[name]), name


@two_processes
def test_differentiated_twice(found: Any) -> None:
    backend, *ranks = found
    if backend == "cpp":
        for rank in ranks:
            assert "backend='composite', which is differentiable twice" in rank["error-twice"]
        return
    y = torch.cat([images(2, seed=rank) for rank in range(2)]).requires_grad_()
    (first,) = torch.autograd.grad(reference(make(backend), {})(y).square().sum(), y, create_graph=True)
    first.square().sum().backward()
    torch.testing.assert_close(torch.cat([rank["twice"] for rank in ranks]), y.grad, rtol=1e-9, atol=1e-9)


@two_processes
def test_what_is_said(found: Any) -> None:
    _, *ranks = found
    for rank in ranks:
        assert "training: batch statistics over 2 processes, by the same passes" in rank["explained"]
        assert rank["error-func"].startswith("synchronised batch norm can't train under torch.func")
        assert rank["error-dims"].startswith("y has 2 dims, (2, 240); it takes (N, C*p, *spatial)")


# One process


def work_on_triton(rank: int, folder: str) -> None:
    interpreter_patches.apply()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        m = vcr_ops.SyncBatchNorm.convert_sync_batchnorm(make("triton"))
        explained = str(vcr_ops.explain(m, images(3)))
        torch.save((both(rank, m, part_of(rank, 3), n=3)[0], explained), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.triton
def test_two_processes_on_triton(tmp_path: Path) -> None:
    mp.spawn(work_on_triton, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(together(first[0], second[0]), both(0, make("cpp"), slice(None), n=3)[0], 1e-10)
    assert "over 2 processes, by the same passes, as ops of their own" in first[1]


STEPPED = [case for case in TWO if case.size != "N2C32p4S63"]  # seconds in the interpreter


@pytest.mark.triton
@pytest.mark.parametrize("case", STEPPED, ids=[case.id for case in STEPPED])
def test_steps_on_triton_are_close_to_float64(case: Case) -> None:
    ALONE.closeness(case, "triton").check()


@pytest.mark.triton
@pytest.mark.parametrize("modulation", ["channel", "pixel"])
def test_steps_on_triton_merge_images_block_by_block(modulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vcr_ops.ops.vcr_middle import triton_backward_launches

    case = next(case for case in STEPPED if case.modulation == modulation and case.shape[0] > 1 and case.dtype == "f32")
    as_one = ALONE.our_result(*ALONE.draw(case), case, "triton").tensors()
    monkeypatch.setattr(triton_backward_launches, "GRADIENT_TILE", 1)
    for name, x in ALONE.our_result(*ALONE.draw(case), case, "triton").tensors().items():
        torch.testing.assert_close(x, as_one[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_our_sync_batch_norm_by_itself() -> None:
    ours = vcr_ops.SyncBatchNorm(6, momentum=None).double()
    theirs = nn.BatchNorm2d(6, momentum=None).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for training in (True, True, False):
        y = feature_map(3, 6, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(ours.train(training)(y), theirs.train(training)(y), rtol=0, atol=0)
    with pytest.raises(ValueError, match="input has 1 dims"):
        ours(torch.zeros(6))
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, eps=0.1), nn.Sequential(nn.BatchNorm2d(6).eval()))
    before = dict(model.named_parameters())
    made = vcr_ops.SyncBatchNorm.convert_sync_batchnorm(model)
    assert made is model
    assert all(p is before[name] for name, p in made.named_parameters())
    assert type(made[1]) is type(made[2][0]) is vcr_ops.SyncBatchNorm
    assert (made[1].eps, made[1].training, made[2][0].training) == (0.1, True, False)
    assert isinstance(vcr_ops.SyncBatchNorm.convert_sync_batchnorm(nn.SyncBatchNorm(4)), vcr_ops.SyncBatchNorm)


def test_without_processes_it_is_plain_batch_norm() -> None:
    for backend in BACKENDS:
        plain, sync = make(backend), synced(make(backend))
        assert type(sync.bn) is type(sync.reasoner.bn) is nn.SyncBatchNorm
        for training in (True, False, True):
            plain.train(training), sync.train(training)
            assert_same(both(0, sync, slice(None))[0], both(0, plain, slice(None))[0], 0)
        assert vcr_ops.explain(sync, images(2)).path == "whole"


def arguments_of(case: Case) -> tuple[dict[str, Tensor], list[Any], list[Any], Tensor]:
    inputs, gradients = ALONE.draw(case)
    x = {name: t.detach() for name, t in ALONE.leaves(inputs, case).items()}
    learned = [x.get(name) for name in (*NAMES[3:10], *NAMES[12:])]
    grad = grid.arrange(gradients["out"].to(case.feature_dtype), case.layout)
    return x, learned, [case.norm, case.sampler, case.edges, case.modulation], grad


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("index", [0, 40, -1])
def test_opcheck(index: int, layout: str) -> None:
    ops, check = torch.ops.vcr_ops, torch.library.opcheck
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    case = ALONE.variants(size="N2C4p3S7", layout=layout)[index].but(norm="given")
    x, learned, variant, grad = arguments_of(case)
    y, concepts = x["y"], x["value"].shape[0]
    check(ops.vcr_middle_stats.default, (y, concepts), test_utils=utils)
    mean, squares = ops.vcr_middle_stats(y, concepts)
    torch.testing.assert_close(mean, y.double().transpose(0, 1).flatten(1).mean(1))
    torch.testing.assert_close(squares, y.double().transpose(0, 1).flatten(1).var(1, correction=0) * (2 * 7))
    first = (y, x["norm_mean"], x["norm_var"], *learned[:7], *learned[11:], variant[0], 1e-5, *variant[1:])
    check(ops.vcr_middle_states.default, first, test_utils=utils)
    saved, moments = ops.vcr_middle_states(*first)
    state_norm = torch.stack((moments[0], torch.rsqrt(moments[1] / (2 * concepts) + 1e-5)))
    check(ops.vcr_middle_modulate.default, (y, *learned, saved, state_norm, *variant), test_utils=utils)
    _, late = ops.vcr_middle_modulate(y, *learned, saved, state_norm, *variant)
    second = (grad, y, *learned, saved, late, state_norm, *variant)
    check(ops.vcr_middle_backward_sums.default, second, test_utils=utils)
    summed, state_sums, *_ = ops.vcr_middle_backward_sums(*second)
    third = (y, *learned, saved, late, state_norm, summed, state_sums / (2 * concepts), *variant)
    check(ops.vcr_middle_backward_states.default, third, test_utils=utils)
    attended, norm_sums, *_ = ops.vcr_middle_backward_states(*third)
    last = (grad, y, *learned, saved, late, summed, attended, norm_sums / 14, *variant)
    check(ops.vcr_middle_backward_input.default, last, test_utils=utils)


def test_flops_of_the_steps_are_those_of_the_ops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for sampler, modulation in (("dynamic", "pixel"), ("static", "channel")):
        m = make("cpp")
        m = vcr_ops.VisualConceptReasoning(12, 3, sampler=sampler, modulation=modulation).double()
        y = images(3).requires_grad_()
        arguments = (
            *(y, None, None, m.bn.weight, m.bn.bias, m.sampler.value, m.sampler.query, m.sampler.key, m.sampler.logit),
            *(m.reasoner.edge, None, None, m.reasoner.bn.weight, m.reasoner.bn.bias),
            *(m.modulator.scale_weight, m.modulator.shift_weight, m.modulator.scale_bias, m.modulator.shift_bias),
            *("batch", 1e-5, 1e-5, sampler, "dynamic", modulation),
        )
        with FlopCounterMode(display=False) as steps:
            vcr_middle_synced("cpp", arguments, None, None)[0].sum().backward()
        with FlopCounterMode(display=False) as whole:
            m(y).sum().backward()
        mean = 0 if sampler == "static" else 2 * y.numel()  # which the sampler then takes anyway
        assert steps.get_total_flops() == whole.get_total_flops() + mean


def test_steps_refuse_what_does_not_fit() -> None:
    case = ALONE.variants(size="N2C4p3S7")[0].but(norm="given")
    x, learned, variant, _ = arguments_of(case)
    ops, y = torch.ops.vcr_ops, x["y"]
    first = (y, x["norm_mean"], x["norm_var"], *learned[:7], *learned[11:], variant[0], 1e-5, *variant[1:])
    saved, moments = ops.vcr_middle_states(*first)
    with pytest.raises(ValueError, match="concepts doesn't divide"):
        ops.vcr_middle_stats(y, 5)
    with pytest.raises(ValueError, match="norm is given or none"):
        ops.vcr_middle_states(*(first[:12]), "batch", *first[13:])
    with pytest.raises(ValueError, match="saved has another size"):
        ops.vcr_middle_modulate(y, *learned, saved[1:], moments, *variant)
    with pytest.raises(ValueError, match="state_norm is"):
        ops.vcr_middle_modulate(y, *learned, saved, moments.float(), *variant)
    y = y.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient of their own"):
        ops.vcr_middle_stats(y, 4).sum().backward()
