"""Proves: each Triton kernel reads and writes the map as often as `explain` says; counted element by element."""

import pytest
import torch

import vcr_ops

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


def counted(m, y, train):
    from .traffic import counted_traffic

    m.train(train)
    with counted_traffic(y) as traffic:
        if train:
            results(m, y)
        else:
            with torch.no_grad():
                m(y)
    return traffic


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
    m = middle("triton", sampler=sampler, modulation=modulation)
    traffic = counted(m, y, mode == "training")
    said = {}
    for step in vcr_ops.explain(m, y).steps:
        if step.name.startswith(mode):
            said |= {each.name: (each.reads, each.writes) for each in step.passes}
    for name, (reads, writes) in traffic.passes().items():
        wanted_reads, wanted_writes = said.pop(name, (0, 0))
        assert writes == wanted_writes, name
        # Sums are centred on one position of the map, which is read first.
        assert wanted_reads <= reads <= wanted_reads + 3 / y[0, 0].numel(), name
    assert not said, "passes that no kernel made"
