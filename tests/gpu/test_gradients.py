"""Proves: on the GPU every gradient is the derivative of its output, by finite differences in float64."""

import pytest
import torch

from tests.ops import adapters

from .machine import DEVICE, MARKS, ready

pytestmark = MARKS

ADAPTERS = adapters()
VARIANTS = [
    case
    for layout in ("contiguous", "channels_last")
    for adapter in ADAPTERS.values()
    for case in adapter.variants(dtype="f64", size="N2C4p3S7", layout=layout)[
        :: 9 if adapter.name == "vcr_middle" else 2
    ]
]


@pytest.mark.parametrize("case", VARIANTS, ids=[f"{case.id}-{i}" for i, case in enumerate(VARIANTS)])
def test_gradcheck(case, backend):
    adapter = ADAPTERS[case.op]
    inputs, gradients = adapter.draw(case)
    leaves = adapter.leaves(inputs, case, DEVICE)
    names = [name for name, x in leaves.items() if x.requires_grad]

    def function(*tensors):
        outputs = adapter.ours(leaves | dict(zip(names, tensors, strict=True)), case, ready(backend, case))
        return tuple(outputs[name] for name in gradients)

    assert torch.autograd.gradcheck(function, tuple(leaves[name] for name in names), fast_mode=True)


@pytest.mark.parametrize("op", ADAPTERS)
def test_only_some_inputs_require_gradients(op, backend):
    """A gradient doesn't depend on which others are asked for."""
    adapter = ADAPTERS[op]
    case = adapter.variants(dtype="f32", size="N2C4p3S7")[0]
    inputs, gradients = adapter.draw(case)
    everything = adapter.our_result(inputs, gradients, case, ready(backend, case), DEVICE).gradients
    for name in everything:
        leaves = adapter.leaves(inputs, case, DEVICE)
        for other, x in leaves.items():
            x.requires_grad_(other == name)
        alone = adapter.run(lambda x, c: adapter.ours(x, c, ready(backend, c)), leaves, gradients, case).gradients
        torch.testing.assert_close(alone[name], everything[name], rtol=1e-5, atol=1e-5)
