"""Proves: both batch norms keep PyTorch's semantics whole, step by step beside nn.BatchNorm: momentum (None too),
num_batches_tracked, track_running_stats=False, affine=False, train and eval, frozen; and the batch's statistics stand
as near to the exact ones as torch.var_mean's, also far from zero and near it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import python_ref
import vcr_ops

from .backends import TRITON
from .closeness import Closeness, Result

BACKENDS = ["cpp", "composite"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
C, P = 4, 5


def pair(backend, change=lambda module: None, **options):
    """(ours, python_ref's, which calls nn.BatchNorm) with the same parameters, float64."""
    torch.manual_seed(0)
    plain = python_ref.VisualConceptReasoning(C * P, C, **options).double()
    change(plain)
    with torch.no_grad():
        for name, x in plain.state_dict(keep_vars=True).items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else x + 0.3 * torch.randn_like(x))
    ours = vcr_ops.VisualConceptReasoning(C * P, C, backend=backend, **options).double()
    change(ours)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


def step(module, y, gradient):
    y = y.clone(memory_format=torch.preserve_format).requires_grad_()
    parameters = [p for p in module.parameters() if p.requires_grad]
    out = module(y)
    return [out.detach(), *torch.autograd.grad(out, [y, *parameters], gradient)]


def assert_same_steps(ours, plain, layout="contiguous", steps=3, images=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        y = 2 + 3 * torch.randn(images, C * P, 3, 5, generator=generator, dtype=torch.float64)
        y = y.to(memory_format=LAYOUTS[layout])
        gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        for x, wanted in zip(step(ours, y, gradient), step(plain, y, gradient), strict=True):
            torch.testing.assert_close(x, wanted, rtol=1e-9, atol=1e-9)
        assert_same_buffers(ours, plain)


def assert_same_buffers(ours, plain):
    mine, theirs = dict(ours.named_buffers()), dict(plain.named_buffers())
    assert mine.keys() == theirs.keys()
    for name, x in theirs.items():
        assert mine[name].dtype == x.dtype, name
        torch.testing.assert_close(mine[name], x, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def both_norms(**attributes):
    def change(module):
        for bn in (module.bn, module.reasoner.bn):
            for name, value in attributes.items():
                setattr(bn, name, value)

    return change


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("modulation", ["channel", "pixel"])
def test_training_steps(backend, layout, momentum, modulation):
    ours, plain = pair(backend, both_norms(momentum=momentum), modulation=modulation)
    assert_same_steps(ours, plain, layout)
    assert int(ours.bn.num_batches_tracked) == int(ours.reasoner.bn.num_batches_tracked) == 3
    # Then evaluation uses what was gathered, and leaves it alone.
    assert_same_steps(ours.eval(), plain.eval(), layout, steps=1)
    assert int(ours.bn.num_batches_tracked) == 3


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_different_momenta_and_eps(backend):
    def change(module):
        module.bn.momentum, module.bn.eps = 0.3, 0.1
        module.reasoner.bn.momentum, module.reasoner.bn.eps = None, 0.5

    ours, plain = pair(backend, change)
    assert_same_steps(ours, plain)
    assert_same_steps(ours.eval(), plain.eval(), steps=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("which", ["bn", "reasoner.bn", "both"])
def test_no_running_statistics(backend, training, which):
    """track_running_stats=False: the batch's statistics, in evaluation too."""

    def change(module):
        if which != "reasoner.bn":
            module.bn = nn.BatchNorm2d(C * P, track_running_stats=False).double()
        if which != "bn":
            module.reasoner.bn = nn.BatchNorm1d(4, track_running_stats=False).double()

    ours, plain = pair(backend, change)
    assert_same_steps(ours.train(training), plain.train(training))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tracking_switched_off(backend, training):
    """track_running_stats set to False afterwards: buffers are there, and don't move."""
    ours, plain = pair(backend)
    for module in (ours, plain):
        module.bn.track_running_stats = module.reasoner.bn.track_running_stats = False
    assert_same_steps(ours.train(training), plain.train(training))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_affine(backend):
    def change(module):
        module.bn = nn.BatchNorm2d(C * P, affine=False).double()
        module.reasoner.bn = nn.BatchNorm1d(4, affine=False).double()

    ours, plain = pair(backend, change)
    assert_same_steps(ours, plain)
    assert_same_steps(ours.eval(), plain.eval(), steps=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["bn", "reasoner.bn", "both"])
def test_frozen(backend, which):
    """Batch norm in evaluation inside a module that trains, with or without trained weights."""
    for trained in (True, False):
        ours, plain = pair(backend)
        for module in (ours, plain):
            for name in ("bn", "reasoner.bn") if which == "both" else (which,):
                module.get_submodule(name).eval().requires_grad_(trained)
        assert_same_steps(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_train_and_eval_in_turns(backend):
    ours, plain = pair(backend)
    for training in (True, False, True, True, False):
        assert_same_steps(ours.train(training), plain.train(training), steps=1)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_images(backend, momentum):
    """N = 0 counts as a batch and moves nothing."""
    ours, plain = pair(backend, both_norms(momentum=momentum))
    before = copy.deepcopy(dict(ours.named_buffers()))
    empty = torch.zeros(0, C * P, 3, 5, dtype=torch.float64)
    for module in (ours, plain):
        out = module(empty)
        assert out.shape == empty.shape
    assert_same_buffers(ours, plain)
    assert torch.equal(ours.bn.running_var, before["bn.running_var"])
    assert int(ours.bn.num_batches_tracked) == int(before["bn.num_batches_tracked"]) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_move_under_no_grad(backend):
    ours, plain = pair(backend)
    y = torch.randn(2, C * P, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(y), plain(y), rtol=1e-9, atol=1e-9)
    assert_same_buffers(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel_moves_nothing(backend):
    """As nn.BatchNorm: an error, and no buffer has moved."""
    ours, _ = pair(backend)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(torch.randn(1, C * P, 1, 1, dtype=torch.float64))
    for name, x in ours.state_dict().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_single_modules_keep_their_statistics(backend):
    torch.manual_seed(0)
    ours = vcr_ops.modules.reasoner.ConceptReasoner(C * P, C, backend=backend).double()
    plain = python_ref.ConceptReasoner(C * P, C).double()
    plain.load_state_dict(ours.state_dict())
    for training in (True, True, False):
        h = torch.randn(3, C, 4, dtype=torch.float64)
        torch.testing.assert_close(ours.train(training)(h), plain.train(training)(h), rtol=1e-9, atol=1e-9)
        assert_same_buffers(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_modules_keep_low_precision_buffers(backend):
    """module.bfloat16() rounds the buffers; updates keep their type and come as near as bfloat16 can."""
    ours, plain = pair(backend)
    ours.bfloat16(), plain.bfloat16()
    y = torch.randn(3, C * P, 3, 5).bfloat16()
    ours(y), plain(y)
    for name, x in plain.named_buffers():
        mine = dict(ours.named_buffers())[name]
        assert mine.dtype == x.dtype
        torch.testing.assert_close(mine, x, rtol=0.02, atol=0.02)


# N, concepts, p, spatial: long rows, rows that are reduced together, and neither vectors nor blocks that come out even.
STATISTICS_SIZES = [(2, 4, 4, (56, 56)), (4, 2, 32, (7, 7)), (2, 2, 16, (20, 20)), (3, 3, 5, (33, 32))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", STATISTICS_SIZES, ids=["x".join(map(str, (*n, *hw))) for *n, hw in STATISTICS_SIZES])
@pytest.mark.parametrize("centre", [0, 30, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_batch_statistics_on_their_own_scale(dtype, centre, size, layout):
    """10,000: differences from the mean are multiples of a large ulp, and their squares' sums end half way often."""
    images, concepts, p, spatial = size
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    closeness = Closeness(dtype, "batch statistics")
    for _ in range(6):
        y = (random(images, concepts * p, *spatial).double() + centre).to(dtype).to(memory_format=LAYOUTS[layout])
        weights = random(concepts, p, max(p // 4, 4)), random(concepts, p), random(concepts, p)
        ours = vcr_ops.visual_concept_reasoning(y, *weights, sampler="pool", edges="none", backend="cpp")
        var, mean = torch.var_mean(y, [0, 2, 3], correction=1)
        exact = y.double().numpy().astype(np.longdouble)
        closeness.add(
            Result({"mean": ours.norm_mean, "var": ours.norm_var}),
            Result({"mean": mean, "var": var}),
            Result({"mean": exact.mean((0, 2, 3)), "var": exact.var((0, 2, 3), ddof=1)}),
        )
    closeness.check()
