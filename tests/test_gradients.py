"""Proves: every gradient is the derivative of its output, by finite differences in float64, for every op and variant;
the composite's second derivatives too; and the C++ ops refuse to be differentiated twice, rather than to give zeros."""

import itertools

import pytest
import torch

from .backends import KERNELS, with_backends
from .grid import SIZES, SMALL, arrange
from .ops import adapters

ADAPTERS = adapters()
VARIANTS = [case for adapter in ADAPTERS.values() for case in adapter.variants(dtype="f64", size=SMALL)]


def interpreted():
    """A layout has kernels of its own: both meet every choice (odd steps), and every size in turn."""
    for op, adapter in ADAPTERS.items():
        cases = [case for case in VARIANTS if case.op == op]
        sizes = itertools.cycle(SIZES)
        for layout, step in (("contiguous", 17), ("channels_last", 23)):
            if layout == "contiguous" or adapter.maps:
                for case in cases[:: step if op == "vcr_middle" else 1]:
                    yield case.but(layout=case.layout and layout, size=next(sizes))


INTERPRETED = list(interpreted())
# The slow check compares every entry of the Jacobian, the fast one random combinations of them.
SLOW = [
    adapter.variants(dtype="f64", size="N2C3p1S15", layout="channels_last")[i]
    for adapter in ADAPTERS.values()
    for i in (0, -1)
]


def function_of(case, backend):
    """(function of tensors alone, its inputs), for gradcheck: a draw away from the kinks of ReLU."""
    adapter = ADAPTERS[case.op]
    inputs, gradients = adapter.draw(case)
    leaves = adapter.leaves(inputs, case)
    names = [name for name, x in leaves.items() if x.requires_grad]

    def function(*tensors):
        outputs = adapter.ours(leaves | dict(zip(names, tensors, strict=True)), case, backend)
        return tuple(outputs[name] for name in gradients)

    return function, tuple(leaves[name] for name in names)


@with_backends(VARIANTS, (), VARIANTS)
def test_gradcheck(case, backend):
    function, inputs = function_of(case, backend)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@with_backends((), INTERPRETED)
def test_gradcheck_of_all_inputs_at_once(case, backend):
    """The inputs as one vector: the fast check then takes two forwards, not two for each input."""
    function, inputs = function_of(case, backend)
    vector = torch.cat([x.detach().flatten() for x in inputs]).requires_grad_()

    def of_vector(vector):
        pieces = vector.split([x.numel() for x in inputs])
        tensors = [piece.view(x.shape) for piece, x in zip(pieces, inputs, strict=True)]
        tensors = [
            x if like.is_contiguous() else arrange(x, case.layout) for x, like in zip(tensors, inputs, strict=True)
        ]
        return function(*tensors)

    assert torch.autograd.gradcheck(of_vector, vector, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("case", SLOW, ids=[case.id for case in SLOW])
def test_gradcheck_of_every_entry(case):
    function, inputs = function_of(case, "cpp")
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("case", VARIANTS, ids=[case.id for case in VARIANTS])
def test_gradgradcheck_of_the_composite(case):
    function, inputs = function_of(case, "composite")
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_no_double_backward_of_kernels(op, backend):
    case = ADAPTERS[op].variants(dtype="f64", size=SMALL)[0]
    function, inputs = function_of(case, backend)
    first = torch.autograd.grad(function(*inputs)[0].square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="composite"):
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize("backend", ["cpp", "composite"])
@pytest.mark.parametrize("op", ADAPTERS)
def test_only_some_inputs_require_gradients(op, backend):
    """A gradient doesn't depend on which others are asked for."""
    adapter = ADAPTERS[op]
    case = adapter.variants(dtype="f32", size=SMALL)[0]
    inputs, gradients = adapter.draw(case)
    everything = adapter.our_result(inputs, gradients, case, backend).gradients
    for name in everything:
        leaves = adapter.leaves(inputs, case)
        for other, x in leaves.items():
            x.requires_grad_(other == name)
        alone = adapter.run(lambda x, c: adapter.ours(x, c, backend), leaves, gradients, case).gradients
        torch.testing.assert_close(alone[name], everything[name], rtol=1e-5, atol=1e-5)
