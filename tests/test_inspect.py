"""vcr_ops.inspect: what it returns is what the block computes, and the model is as before."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import python_ref
import vcr_ops
from vcr_ops import VCRBlock, VisualConceptReasoning, convert, inspect

from .resnexts import resnet

VARIANTS = [
    (sampler, edges, modulation)
    for sampler, edges, modulation in itertools.product(
        ("dynamic", "static", "pool"), ("dynamic", "static", "none"), ("channel", "pixel")
    )
    if (sampler, modulation) != ("pool", "pixel")
]


def block(**options: Any) -> VCRBlock:
    torch.manual_seed(0)
    m = VCRBlock(24, 16, groups=4, base_width=16, **options).double()
    for bn in (x for x in m.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)):
        assert bn.running_mean is not None
        assert bn.running_var is not None
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return m


@pytest.mark.parametrize("backend", ["cpp", "composite"])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("sampler, edges, modulation", VARIANTS)
def test_values_are_the_equations(sampler: str, edges: str, modulation: str, ndim: int, backend: str) -> None:
    m = block(sampler=sampler, edges=edges, modulation=modulation, ndim=ndim, backend=backend)
    x = torch.randn(3, 24, *(5, 4, 2)[:ndim], dtype=torch.float64)
    got = inspect(m, x)
    assert list(got) == [""]
    attention, states, found_edges, updated = got[""]

    reference = python_ref.VCRBlock(
        24, 16, groups=4, base_width=16, sampler=sampler, edges=edges, modulation=modulation, ndim=ndim
    ).double()
    reference.load_state_dict(m.state_dict())
    reference.eval()
    with torch.no_grad():
        z = reference.bn2(reference.conv2(torch.relu(reference.bn1(reference.conv1(x)))))
        h, a = reference.sampler(z), torch.full((3, 4, *x.shape[2:]), 1 / x[0, 0].numel(), dtype=x.dtype)
        if sampler != "pool":
            h, a = reference.sampler(z, return_attention=True)
        new = reference.reasoner(h)
    torch.testing.assert_close(states, h)
    torch.testing.assert_close(attention, a)
    torch.testing.assert_close(attention.flatten(2).sum(2), torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(updated, new)
    edge = m.reasoner.edge
    if edges == "none":
        assert found_edges is None
    else:
        assert edge is not None
        A = torch.tanh(h @ edge.detach()) if edges == "dynamic" else edge.detach().expand(3, 4, 4)
        torch.testing.assert_close(found_edges, A)


def state_of(model: nn.Module) -> list[Any]:
    hooks = [len(getattr(m, name)) for m in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
    return [*(m.training for m in model.modules()), *hooks, *(x.clone() for x in model.state_dict().values())]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(block(), nn.BatchNorm2d(64).double(), VisualConceptReasoning(64, 4).double())
    model[1].eval()
    before = state_of(model)
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    assert list(inspect(model, x)) == ["0", "2"]
    assert same(state_of(model), before)
    with pytest.raises(ValueError, match="x has 7 channels"):
        inspect(model, x[:, :7])
    assert same(state_of(model), before)
    assert model.training
    assert not model[1].training


def test_network_and_choice_of_blocks() -> None:
    torch.manual_seed(0)
    model = vcr_ops.VCRNet((1, 1, 1, 1), num_classes=3, groups=4)
    images = torch.randn(2, 3, 64, 64)
    everything = inspect(model, images)
    assert list(everything) == [f"layer{n}.0" for n in (1, 2, 3, 4)]
    assert [tuple(c.attention.shape) for c in everything.values()] == [(2, 4, n, n) for n in (16, 8, 4, 2)]
    one = inspect(model, images, blocks=["layer3.0"])
    assert list(one) == ["layer3.0"]
    torch.testing.assert_close(one["layer3.0"].states, everything["layer3.0"].states)
    with pytest.raises(ValueError, match=r"blocks has 'layer5', which is no block.*layer1\.0"):
        inspect(model, images, blocks=["layer5"])
    with torch.autocast("cpu"):
        assert inspect(model, images)["layer2.0"].states.dtype == torch.float32


def test_converted_blocks() -> None:
    model = convert(resnet("torchvision"))
    found = inspect(model, torch.randn(2, 3, 64, 64))
    assert found
    assert all(isinstance(model.get_submodule(path), VCRBlock) for path in found)


def test_compiled_model_runs_uncompiled() -> None:
    m = block()
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64)
    expected = inspect(m, x)[""]
    compiled = torch.compile(m, backend="eager")
    compiled(x)
    m.load_state_dict(block().state_dict())  # whose statistics the call has moved
    for got, want in zip(inspect(compiled, x)[""], expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: inspect(3, torch.randn(1, 3, 8, 8)), TypeError, "model is a int; it takes an nn.Module"),  # type: ignore[type-var]
        (lambda: inspect(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8, 8)), ValueError, "a Conv2d, has no VCRBlock"),
        (lambda: inspect(block(), [1.0]), TypeError, "images is a list; it takes a tensor"),  # type: ignore[arg-type]
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_block_that_runs_twice() -> None:
    twice = VisualConceptReasoning(8, 2)
    with pytest.raises(ValueError, match="the block '0' runs more than once"):
        inspect(nn.Sequential(twice, twice), torch.randn(2, 8, 3, 3))
