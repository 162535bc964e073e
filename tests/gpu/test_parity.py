"""Proves: on the GPU every op stands as near to the float64 reference as plain PyTorch does, outputs and all gradients,
with fresh memory full of NaN. The cases are those of the CPU; float16 is added."""

import functools

import pytest
import torch

from tests import grid
from tests.ops import adapters

from .machine import DEVICE, MARKS, ready

pytestmark = MARKS

ADAPTERS = adapters()
# Every kernel is compiled for every combination: half of the cases, and each of them in one of the low precisions.
GRID = [case for adapter in ADAPTERS.values() for case in adapter.cases() if case.dtype != "f64"][::2]
# Far from zero, plain PyTorch overflows in float16, and nothing can be judged.
LOW = [case for case in GRID if case.dtype == "bf16"]
CASES = [case for case in GRID if case.dtype == "f32"] + [
    case.but(dtype="f16") if i % 2 and case.offset is None else case for i, case in enumerate(LOW)
]
INFERENCE = [case for case in CASES if case.op != "concept_reason" and case.norm in (None, "given", "none")][::3]


def ids(cases):
    return [case.id for case in cases]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_close_to_float64(case, nan_memory, backend):
    ADAPTERS[case.op].closeness(case, ready(backend, case), device=DEVICE).check()


@pytest.mark.parametrize("case", INFERENCE, ids=ids(INFERENCE))
def test_inference_is_close_to_float64(case, nan_memory, backend):
    ADAPTERS[case.op].closeness(case, ready(backend, case), inference=True, device=DEVICE).check()


EMPTY = [
    adapter.variants()[-1].but(size=size, layout=layout)
    for adapter in ADAPTERS.values()
    for size, layout in zip(grid.EMPTY, ("contiguous", "channels_last"), strict=True)
]


@pytest.mark.parametrize("case", EMPTY, ids=ids(EMPTY))
def test_no_images(case, backend):
    """N = 0: outputs without elements, and gradients of zero."""
    adapter = ADAPTERS[case.op]
    random = functools.partial(torch.randn, dtype=torch.float64)
    leaves = adapter.leaves(adapter.make(case, lambda *shape: random(shape)), case, DEVICE)
    outputs = adapter.ours(leaves, case, ready(backend, case))
    names = adapter.differentiable(outputs)
    assert all(outputs[name].numel() == 0 for name in names)
    wanted = [x for x in leaves.values() if x.requires_grad]
    found = torch.autograd.grad([outputs[n] for n in names], wanted, [outputs[n].detach() for n in names])
    for x, gradient in zip(wanted, found, strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()
