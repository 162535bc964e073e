"""Proves: two runs give bitwise the same result, forward and backward, on any number of threads; and what is computed
of one image in evaluation does not depend on the rest of its batch."""

import pytest
import torch

from . import grid
from .backends import TRITON, on_triton
from .ops import adapters

ADAPTERS = adapters()
LAYOUTS = ["contiguous", "channels_last"]
SHAPES = {"small-map": "N3C4p16S49", "large-map": "N2C3p4S3136"}


def variants(op, **fixed):
    """The default variant, and pixel modulation or the last one."""
    every = ADAPTERS[op].variants(**fixed)
    return [every[0], next((c for c in every if c.modulation == "pixel"), every[-1])]


@pytest.mark.parametrize("dtype", grid.DTYPES)
@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_same_bits_again_and_on_any_number_of_threads(op, layout, size, dtype, threads):
    if op == "concept_reason" and dtype == "bf16":
        pytest.skip("states are float32 beside bfloat16 features")
    adapter = ADAPTERS[op]
    for case in variants(op, dtype=dtype, size=size, layout=layout):
        inputs, gradients = adapter.draw(case)
        runs = []
        for count in (1, 1, 2, 3):
            threads(count)
            runs.append(adapter.our_result(inputs, gradients, case, "cpp").tensors())
        for again in runs[1:]:
            for name, x in runs[0].items():
                assert torch.equal(again[name], x), name


@pytest.mark.parametrize("backend", ["composite", TRITON])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_same_bits_again(op, layout, backend):
    adapter = ADAPTERS[op]
    size = grid.SMALL if backend == "triton" else "N3C4p16S49"
    for case in variants(op, dtype="f32", size=size, layout=layout)[backend == "triton" :]:
        inputs, gradients = adapter.draw(case)
        first, second = (adapter.our_result(inputs, gradients, case, backend).tensors() for _ in range(2))
        for name, x in first.items():
            assert torch.equal(second[name], x), name


def batched(name, adapter):
    """True for inputs that have one entry per image."""
    return name in adapter.maps or name in ("h", "state", "attention")


BATCHED = ["N3C4p16S49", "N2C3p4S3136", "N2C32p4S63", "N2C2p33S33"]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize(
    "dtype, size, backend",
    [
        *((dtype, size, "cpp") for dtype in grid.DTYPES for size in BATCHED),
        on_triton("f32", grid.SMALL),
        on_triton("bf16", "N2C1p5S9"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_one_image_is_independent_of_its_batch(op, layout, size, backend, dtype, grad, threads):
    if op == "concept_reason" and dtype == "bf16":
        pytest.skip("states are float32 beside bfloat16 features")
    adapter = ADAPTERS[op]
    cases = [c for c in adapter.variants(dtype=dtype, size=size, layout=layout) if c.state in (None, "given")]
    cases = [cases[0], next((c for c in cases if c.modulation == "pixel"), cases[-1])][backend == "triton" :]
    for case in cases:
        inputs, _ = adapter.draw(case)
        with torch.set_grad_enabled(grad):
            leaves = adapter.leaves(inputs, case)
            threads(2)
            together = adapter.ours(leaves, case, backend)
            threads(1)
            for n in range(case.shape[0]):
                one = {name: x[n : n + 1] if batched(name, adapter) else x for name, x in leaves.items()}
                for name, x in adapter.ours(one, case, backend).items():
                    assert torch.equal(x[0], together[name][n]), name
