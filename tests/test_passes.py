"""Proves: each Triton kernel reads and writes the map as often as `explain` says; counted element by element."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vcr_ops
from vcr_ops.explain import op_arguments

from .small import feature_map, middle, results

pytestmark = pytest.mark.triton
VARIANTS = [
    ("dynamic", "channel"),
    ("dynamic", "pixel"),
    ("static", "pixel"),
    ("static", "channel"),
    ("pool", "channel"),
]
# Positions of one tile, and of several with a rest.
SIZES = {"one-tile": (3, 4), "tiles": (13, 5)}


def counted(m, y, train, attention=0):
    from .traffic import counted_traffic

    m.train(train)
    with counted_traffic(y, attention) as traffic:
        if train:
            results(m, y)
        else:
            with torch.no_grad():
                m(y)
    return traffic


def assert_as_explained(m, y, mode, attention=0):
    """Returns what is said of the mode: {kernel: (reads, writes)}."""
    m.train(mode == "training")
    said = {}
    for step in vcr_ops.explain(m, y).steps:
        if step.name.startswith(mode):
            said |= {each.name: (each.reads, each.writes) for each in step.passes}
    left = said.copy()
    left.pop("sum of both input gradients", None)  # PyTorch's
    for name, (reads, writes) in counted(m, y, mode == "training", attention).passes().items():
        wanted_reads, wanted_writes = left.pop(name, (0, 0))
        assert writes == pytest.approx(wanted_writes), name
        # Sums are centred on one position of the map, or on three, which are read first.
        assert wanted_reads - 1e-9 <= reads <= wanted_reads + 3 / y[0, 0].numel() + 1e-9, name
    assert not left, "passes that no kernel made"
    return said


CASES = [
    (sampler, modulation, last, size)
    for i, (sampler, modulation) in enumerate(VARIANTS)
    for last in (False, True)
    for size in list(SIZES)[(i + last) % 2 :: 2]
]


@pytest.mark.parametrize(
    "sampler, modulation, channels_last, size",
    CASES,
    ids=[f"{a}-{b}-{'channels_last' if last else 'contiguous'}-{size}" for a, b, last, size in CASES],
)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_passes(mode, sampler, modulation, channels_last, size):
    y = feature_map(2, 12, *SIZES[size], channels_last=channels_last)
    assert_as_explained(middle("triton", sampler=sampler, modulation=modulation), y, mode)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("sampler, norm", [("dynamic", "batch"), ("static", "group"), ("pool", "batch")])
def test_an_image_of_several_tiles(sampler, norm, channels_last, monkeypatch):
    """In evaluation the sampler reads it once, unless its query is made of the image's mean: then twice."""
    from vcr_ops.triton_common import sizes

    monkeypatch.setattr(sizes, "ONE_TILE", 0)
    y = feature_map(2, 12, 13, 5, channels_last=channels_last)
    m = middle("triton", sampler=sampler)
    if norm == "group":
        m.bn = nn.GroupNorm(3, 12)
    said = assert_as_explained(m, y, "evaluation")
    assert said == {"concept_sample": (2 if sampler == "dynamic" else 1, 0), "concept_modulate": (1, 1)}


@pytest.mark.parametrize("sampler, modulation", VARIANTS[1:3])
def test_training_without_the_batch_s_statistics(sampler, modulation):
    """A frozen norm: the images' means come from a pass of their own where images are split, else from the sampler."""
    m = middle("triton", sampler=sampler, modulation=modulation)
    m.bn = vcr_ops.FrozenBatchNorm(12)
    for size, last in (((13, 5), False), ((3, 4), True)):
        said = assert_as_explained(m, feature_map(2, 12, *size, channels_last=last), "training")
        assert sum(reads for reads, _ in said.values()) <= 7


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampler", ["dynamic", "pool"])
def test_synchronised_statistics(sampler, size, monkeypatch):
    """The sampler is given the norm's, and must find the images' means itself: again where they fit no tile."""
    from vcr_ops.ops.vcr_middle.synced import vcr_middle_synced

    from .traffic import counted_traffic

    m, y = middle("triton", sampler=sampler), feature_map(2, 12, *SIZES[size])
    arguments = op_arguments(y, m.bn, m, "whole", True)
    monkeypatch.setattr(sys.modules["vcr_ops.explain"], "sync_groups", lambda *_: (SimpleNamespace(size=2), None))
    found = vcr_ops.explain(m, y)
    said = {each.name: (each.reads, each.writes) for step in found.steps[:2] for each in step.passes}
    with counted_traffic(y) as traffic:  # statistics of this batch alone: the same passes
        out = vcr_middle_synced("triton", (y.requires_grad_(), *arguments[1:]), None, None)[0]
        torch.autograd.grad(out, [y], feature_map(*y.shape, seed=2))
    assert {name: reads for name, (reads, _) in traffic.passes().items() if reads > 0.5} == pytest.approx(
        {name: reads for name, (reads, _) in said.items()}, abs=6 / y[0, 0].numel()
    )
    forward = 4 if size == "tiles" and sampler == "dynamic" else 3
    assert [step.reads for step in found.steps[:2]] == [forward, 4]
    note = ", by the same passes, as ops of their own" + (
        ", the sampler's after one for the images' means" * (forward > 3)
    )
    assert any(note + ";" in each for each in found.notes)


@pytest.mark.parametrize("sampler, modulation", VARIANTS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_modules_one_by_one(mode, sampler, modulation):
    """With a hook somewhere each op runs its own kernels, and attention goes from one to the other."""
    m = middle("triton", sampler=sampler, modulation=modulation)
    m.reasoner.register_forward_hook(lambda *_: None)
    last = sampler == "static"
    y = feature_map(2, 12, *((3, 5) if last else (13, 5)), channels_last=last)
    said = assert_as_explained(m, y, mode, attention=2 * 3 * y[0, 0].numel())
    assert ("attention_sums" in said) == (mode == "training" and modulation == "pixel")


def test_neighbouring_programs_share_the_rows_of_a_channels_last_map():
    """All blocks of an image's concepts, which may be less than a sector wide, come before the next image's."""
    y = feature_map(3, 20, 2, 3, channels_last=True)
    m = middle("triton", channels=20, concepts=5)
    places = counted(m, y, False).places
    images = [place // (y[0].numel() * y.element_size()) for place in places]
    before_the_last = {place for place, n in zip(places[: images.index(2)], images, strict=False) if n == 1}
    assert len(before_the_last) == 3, "blocks of two concepts of the five"
