"""Proves: on the GPU output and gradient keep the map's memory format, and other strides, in the map and in
grad_output, change no bit."""

import pytest
import torch

from tests import grid
from tests.ops import adapters

from .machine import DEVICE, MARKS, ready

pytestmark = MARKS

ADAPTERS = {name: adapter for name, adapter in adapters().items() if adapter.maps}
SIZE = "N3C4p16S49"


def variants(op):
    """The default variant; and pixel modulation, where there is one, or the last."""
    every = ADAPTERS[op].variants(dtype="bf16", size=SIZE)
    return [every[0], next((c for c in every if c.modulation == "pixel"), every[-1])]


def results_of(backend, case, inputs, gradients):
    return ADAPTERS[case.op].our_result(inputs, gradients, case, ready(backend, case), DEVICE).tensors()


def format_of(x):
    last = x.movedim(1, -1).is_contiguous() and not x.is_contiguous()
    return "channels_last" if last else "contiguous" if x.is_contiguous() else "neither"


@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_memory_format_and_values_of_any_strides(op, layout, backend):
    family = "channels_last" if layout in ("channels_last", "sliced_channels_last") else "contiguous"
    for case in variants(op):
        inputs, gradients = ADAPTERS[op].draw(case.but(layout=layout))
        dense = results_of(backend, case.but(layout=family), inputs, gradients)
        strided = results_of(backend, case.but(layout=layout), inputs, gradients)
        for name, x in dense.items():
            assert torch.equal(strided[name], x), name
            if name in ("out", "dz", "dy"):
                assert format_of(strided[name]) == format_of(x) == family, name


@pytest.mark.parametrize("grad_layout", grid.LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", [op for op in ADAPTERS if op != "concept_sample"])
def test_strides_of_grad_output_change_no_bit(op, layout, grad_layout, backend):
    for case in variants(op):
        case = case.but(layout=layout)
        inputs, gradients = ADAPTERS[op].draw(case.but(grad_layout=grad_layout))
        dense = results_of(backend, case.but(grad_layout=layout), inputs, gradients)
        strided = results_of(backend, case.but(grad_layout=grad_layout), inputs, gradients)
        for name, x in dense.items():
            assert torch.equal(strided[name], x), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ADAPTERS)
def test_memory_that_is_not_aligned(op, layout, backend):
    """A map that begins in the middle of a vector of 16 bytes."""
    adapter, case = ADAPTERS[op], variants(op)[0].but(layout=layout)
    inputs, _ = adapter.draw(case)
    with torch.no_grad():
        leaves = adapter.leaves(inputs, case, DEVICE)
        wanted = adapter.ours(leaves, case, ready(backend, case))
        for name in adapter.maps:
            x = leaves[name]
            memory = torch.empty(x.numel() + 3, dtype=x.dtype, device=DEVICE)
            leaves[name] = torch.as_strided(memory, x.shape, x.stride(), 3).copy_(x)
        got = adapter.ours(leaves, case, ready(backend, case))
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name
