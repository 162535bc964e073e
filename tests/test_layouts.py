"""Proves: output and gradient keep the map's memory format, and strides of any kind, in the map and in grad_output,
give the same values; bitwise the same, within one format."""

import pytest
import torch

from . import grid
from .backends import BACKENDS, KERNELS, on_triton
from .ops import adapters

ADAPTERS = {name: adapter for name, adapter in adapters().items() if adapter.maps}
SIZE = "N3C4p16S49"
# The layouts that are read as the first of each row.
FAMILIES = {
    "contiguous": ("sliced_batch", "sliced_channels", "gap", "permuted", "expanded"),
    "channels_last": ("sliced_channels_last",),
}
MEMBERS = [(family, member) for family, members in FAMILIES.items() for member in members]


def variants(op, backend):
    """The default variant; and pixel modulation where there is one (alone, for the interpreter)."""
    every = ADAPTERS[op].variants(dtype="f32", size=grid.SMALL if backend == "triton" else SIZE)
    both = [every[0], next((c for c in every if c.modulation == "pixel"), every[-1])]
    return both[1:] if backend == "triton" else both


def results_of(case, inputs, gradients, backend):
    return ADAPTERS[case.op].our_result(inputs, gradients, case, backend).tensors()


def is_last(x):
    return x.movedim(1, -1).is_contiguous() and not x.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", grid.LAYOUTS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_memory_formats(op, layout, backend):
    for case in variants(op, backend):
        case = case.but(layout=layout)
        inputs, gradients = ADAPTERS[op].draw(case)
        for name, x in results_of(case, inputs, gradients, backend).items():
            if name in ("out", "dz", "dy"):
                if backend != "composite" or layout in ("contiguous", "channels_last"):
                    assert x.is_contiguous() or is_last(x), "not dense"
                if layout in ("channels_last", "sliced_channels_last"):
                    assert is_last(x), name
                elif backend != "composite" or layout == "contiguous":
                    assert x.is_contiguous(), name
            elif name == "attention":
                assert x.is_contiguous()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("family, layout", MEMBERS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_strides_of_the_map_change_no_bit(op, family, layout, backend):
    for case in variants(op, backend):
        inputs, gradients = ADAPTERS[op].draw(case.but(layout=layout))
        dense = results_of(case.but(layout=family), inputs, gradients, backend)
        strided = results_of(case.but(layout=layout), inputs, gradients, backend)
        for name, x in dense.items():
            assert torch.equal(strided[name], x), name


@pytest.mark.parametrize(
    "grad_layout, backend",
    [*((layout, "cpp") for layout in grid.LAYOUTS), *map(on_triton, ("channels_last", "expanded", "gap"))],
)
@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("op", [op for op in ADAPTERS if op != "concept_sample"])
def test_strides_of_grad_output_change_no_bit(op, layout, grad_layout, backend):
    for case in variants(op, backend):
        case = case.but(layout=layout)
        inputs, gradients = ADAPTERS[op].draw(case.but(grad_layout=grad_layout))
        dense = results_of(case.but(grad_layout=layout), inputs, gradients, backend)
        strided = results_of(case.but(grad_layout=grad_layout), inputs, gradients, backend)
        for name, x in dense.items():
            assert torch.equal(strided[name], x), name


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("spatial", [(1,), (1, 1), (1, 1, 1), (2, 1, 1, 3), (3, 1), (1, 3)])
@pytest.mark.parametrize("channels", [1, 4])
def test_ambiguous_strides(spatial, channels, backend):
    """A dim of size 1 may have any stride, and where C*p or S is 1 both formats hold."""
    import vcr_ops

    torch.manual_seed(0)
    z = torch.randn(2, channels, *spatial)
    weights = [torch.randn(channels, 1, 4) for _ in range(3)]
    wanted = vcr_ops.concept_sample(z, weights[0], query=weights[1], key=weights[2], backend=backend)
    strides = [777 if n == 1 else s for n, s in zip(z.shape, z.stride(), strict=True)]
    odd = torch.as_strided(z, z.shape, strides)
    last = grid.arrange(z, "channels_last")
    for x in (odd, last):
        got = vcr_ops.concept_sample(x, weights[0], query=weights[1], key=weights[2], backend=backend)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("dtype", grid.DTYPES.values(), ids=grid.DTYPES)
def test_memory_that_is_not_aligned(layout, dtype, backend):
    import vcr_ops

    torch.manual_seed(0)
    z = grid.arrange(torch.randn(2, 12, 5, 7).to(dtype), layout)
    value = torch.randn(4, 3, 4).to(dtype)
    wanted = vcr_ops.concept_sample(z, value, sampler="pool", backend=backend)
    for offset in (1, 3):
        memory = torch.empty(z.numel() + offset, dtype=dtype)
        moved = torch.as_strided(memory, z.shape, z.stride(), offset)
        moved.copy_(z)
        assert torch.equal(vcr_ops.concept_sample(moved, value, sampler="pool", backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_inputs_are_not_changed(op, backend):
    adapter = ADAPTERS[op]
    for case in variants(op, backend):
        inputs, gradients = adapter.draw(case)
        leaves = adapter.leaves(inputs, case)
        before = {name: x.detach().clone() for name, x in leaves.items()}
        grads = {name: x.float() for name, x in gradients.items()}
        kept = {name: x.clone() for name, x in grads.items()}
        adapter.run(lambda x, c: adapter.ours(x, c, backend), leaves, grads, case)
        for name, x in before.items():
            assert torch.equal(leaves[name], x), name
        for name, x in kept.items():
            assert torch.equal(grads[name], x), name
