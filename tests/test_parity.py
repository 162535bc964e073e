"""Proves: every op, variant, dtype and layout stands as near to the float64 reference as plain PyTorch does, outputs
and all gradients, with fresh memory full of NaN."""

import functools

import torch

from . import grid
from .backends import with_backends
from .ops import adapters

ADAPTERS = adapters()
CASES = [case for adapter in ADAPTERS.values() for case in adapter.cases()]
INTERPRETED = [case for adapter in ADAPTERS.values() for case in adapter.cases(grid.INTERPRETED)]
# The composite needs no case of its own for the strides of slices: PyTorch's ops take care of them.
COMPOSITE = [case for case in CASES if case.layout in (None, "contiguous", "channels_last", "permuted")]


@with_backends(CASES, INTERPRETED, COMPOSITE)
def test_close_to_float64(case, backend, nan_memory):
    ADAPTERS[case.op].closeness(case, backend).check()


# Every variant has been seen above; kernels of inference differ by layout and size.
def inference(cases):
    return [case for case in cases if case.op != "concept_reason" and case.norm in (None, "given", "none")][::2]


@with_backends(inference(CASES), inference(INTERPRETED))
def test_inference_is_close_to_float64(case, backend, nan_memory):
    ADAPTERS[case.op].closeness(case, backend, inference=True).check()


EMPTY = [
    case.but(size=size, layout=layout, dtype=dtype)
    for adapter in ADAPTERS.values()
    for case in (adapter.variants()[0], adapter.variants()[-1])
    for size, layout in zip(grid.EMPTY, ("contiguous", "channels_last"), strict=True)
    for dtype in grid.DTYPES
    if (case.op, dtype) != ("concept_reason", "bf16")  # states are float32 beside bfloat16 features
]


@with_backends(EMPTY, EMPTY, EMPTY)
def test_no_images(case, backend):
    """N = 0: outputs without elements, and gradients of zero."""
    adapter = ADAPTERS[case.op]
    random = functools.partial(torch.randn, dtype=torch.float64)
    inputs = adapter.make(case, lambda *shape: random(shape))
    leaves = adapter.leaves(inputs, case)
    outputs = adapter.ours(leaves, case, backend)
    plain = adapter.reference(inputs, case.but(dtype="f64"))
    names = adapter.differentiable(outputs)
    for name in names:
        assert outputs[name].shape == plain[name].shape
        assert outputs[name].numel() == 0
    wanted = [x for x in leaves.values() if x.requires_grad]
    found = torch.autograd.grad([outputs[n] for n in names], wanted, [outputs[n].detach() for n in names])
    for x, gradient in zip(wanted, found, strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()
