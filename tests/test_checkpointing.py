"""Activation checkpointing gives the same gradients; it moves running statistics twice, which can be turned off."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vcr_ops
from tests.small import BACKENDS, assert_same, block, feature_map, middle, results


def checkpointed(m: Any, **options: Any) -> dict[str, Tensor]:
    m = copy.deepcopy(m)
    return results(m, feature_map(3, 12, 4, 5), lambda y: checkpoint(lambda y: m(y).square(), y, **options))


def once() -> tuple[Any, Any]:
    return nullcontext(), vcr_ops.no_running_stats_update()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("modulation", ["channel", "pixel"])
def test_same_gradients_and_statistics(backend: str, modulation: str) -> None:
    m = middle(backend, modulation=modulation)
    other = copy.deepcopy(m)
    expected = results(other, feature_map(3, 12, 4, 5), lambda y: other(y).square())
    assert_same(checkpointed(m, use_reentrant=False, context_fn=once), expected, 0)
    twice = checkpointed(m, use_reentrant=False)
    assert twice["bn.num_batches_tracked"] == expected["bn.num_batches_tracked"] + 1
    moved = {name for name in expected if "running" in name or "num_batches" in name}
    assert all(not torch.equal(twice[name], expected[name]) for name in moved)
    assert_same(
        {k: v for k, v in twice.items() if k not in moved}, {k: v for k, v in expected.items() if k not in moved}, 0
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_over_the_same_graph(backend: str) -> None:
    m = middle(backend)
    y = feature_map(3, 12, 4, 5).requires_grad_()
    out = checkpoint(m, y, use_reentrant=False, context_fn=once)
    first = torch.autograd.grad(out.sum(), y, retain_graph=True)
    second = torch.autograd.grad(out.sum(), y)
    assert torch.equal(first[0], second[0])
    assert int(m.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_reentrant(backend: str) -> None:
    m = middle(backend)
    y = feature_map(3, 12, 4, 5)
    a, b = y.clone().requires_grad_(), y.clone().requires_grad_()
    other = copy.deepcopy(m)
    m(a).square().sum().backward()
    checkpoint(other, b, use_reentrant=True).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block(backend: str) -> None:
    """The block's other norms are in fused ops with "cpp"; else they are PyTorch's, and move twice."""
    b = block(backend)
    x = feature_map(3, 16, 5, 4)
    expected = results(b, x)
    other = copy.deepcopy(b)
    got = results(other, x, lambda x: checkpoint(other, x, use_reentrant=False, context_fn=once))
    called = () if backend == "cpp" else ("bn1.", "bn3.")
    twice = {name for name in got if name.startswith(called) and ("running" in name or "num" in name)}
    assert_same(
        {k: v for k, v in got.items() if k not in twice}, {k: v for k, v in expected.items() if k not in twice}, 0
    )
    assert got["bn3.num_batches_tracked"] == (1 if backend == "cpp" else 2)
    assert got["bn2.num_batches_tracked"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_tensors_elsewhere(backend: str) -> None:
    """save_on_cpu and other hooks on saved tensors see all of them; of map size there is y alone."""
    m = middle(backend)
    expected = results(m, feature_map(3, 12, 8, 5))
    sizes = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        got = results(m, feature_map(3, 12, 8, 5))
    assert_same(got, expected, 0)
    if backend == "cpp":
        assert sum(size == 3 * 12 * 40 for size in sizes) == 1
