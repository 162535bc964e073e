"""Proves: the grid holds every legal pair of choices, its ids are unique, and strides don't change values."""

import itertools

import pytest
import torch

from . import grid

FACTORS = {
    "sampler": grid.SAMPLERS,
    "modulation": grid.MODULATIONS,
    "dtype": tuple(grid.DTYPES),
    "parameters": (None, "f32"),
    "layout": grid.LAYOUTS,
    "size": tuple(grid.SIZES),
}


def test_every_legal_pair_occurs():
    cases = grid.pairwise("an_op", FACTORS)
    assert len({case.id for case in cases}) == len(cases)
    everything = [
        grid.Case("an_op", **dict(zip(FACTORS, picks, strict=True))) for picks in itertools.product(*FACTORS.values())
    ]
    possible = [case for case in everything if grid.legal(case)]
    assert len(cases) < len(possible) / 10
    for a, b in itertools.combinations(FACTORS, 2):
        wanted = {(getattr(c, a), getattr(c, b)) for c in possible}
        assert {(getattr(c, a), getattr(c, b)) for c in cases} == wanted


def test_the_grid_is_always_the_same():
    assert grid.pairwise("an_op", FACTORS) == grid.pairwise("an_op", FACTORS)


def test_ids_read_as_cases():
    case = grid.Case(
        "concept_sample", sampler="dynamic", dtype="bf16", parameters="f32", layout="channels_last", size="N2C4p3S7"
    )
    assert case.id == "sample-dynamic-bf16-parameters_f32-channels_last-N2C4p3S7"


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("size", [*grid.SIZES, *grid.EMPTY])
def test_strides_do_not_change_values(layout, size):
    n, concepts, p, spatial = grid.Case("x", size=size).shape
    x = torch.randn(n, concepts * p, *spatial)
    if layout == "expanded":
        x = grid.same_images(x)
    view = grid.arrange(x, layout)
    assert torch.equal(view, x)
    if x.numel() > n and n > 1:
        last = view.movedim(1, -1)
        assert (layout == "contiguous") <= view.is_contiguous()
        assert (layout == "channels_last") <= last.is_contiguous()
        if spatial[-1] > 1 and concepts * p > 1:
            assert (view.is_contiguous() or last.is_contiguous()) == (layout in ("contiguous", "channels_last"))
