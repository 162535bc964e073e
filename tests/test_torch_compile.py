"""torch.compile(fullgraph=True) gives the values of eager mode: output, gradients, running statistics."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import vcr_ops
from tests.small import BACKENDS, VARIANTS, assert_same, block, feature_map, middle, results


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def compiled(module: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    module = copy.deepcopy(module)
    return module, torch.compile(module, fullgraph=True, **options)


def shown_equal(eager: nn.Module, module: nn.Module, call: Any, y: Tensor) -> None:
    # The module is moved on by the compiled call, so that a second step starts from the first one's statistics.
    assert_same(results(module, y, call), results(eager, y, eager))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("batch", ["static", "dynamic"])
@pytest.mark.parametrize("variant, backend", [*((variant, "cpp") for variant in VARIANTS), ("pixel", "composite")])
def test_middle(variant: str, backend: str, batch: str, training: bool) -> None:
    """The graph itself, for every variant, and that a new batch size makes no new graph."""
    m = middle(backend, **VARIANTS[variant]).train(training)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    module, call = compiled(m, dynamic=None if batch == "dynamic" else False, backend=count)
    for n in (7, 9) if batch == "dynamic" else (7, 7):
        y = feature_map(n, 12, 6, 5, seed=n)
        if batch == "dynamic":
            torch._dynamo.mark_dynamic(y, 0)
        shown_equal(m, module, call, y)
    assert len(graphs) == 1


def test_block_through_inductor() -> None:
    b = block("cpp").eval()
    _, call = compiled(b)
    x = feature_map(3, 16, 6, 5)
    with torch.no_grad():
        torch.testing.assert_close(call(x), b(x))


def test_channels_last_through_inductor() -> None:
    m = middle("cpp", modulation="pixel")
    module, call = compiled(m)
    y = feature_map(3, 12, 6, 5, channels_last=True)
    shown_equal(m, module, call, y)
    assert call(y).is_contiguous(memory_format=torch.channels_last)


def test_evaluation_without_grad() -> None:
    m = middle("cpp").eval()
    _, call = compiled(m, backend="aot_eager")
    y = feature_map(3, 12, 4, 5)
    with torch.no_grad():
        torch.testing.assert_close(call(y), m(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    m = middle(backend)
    module, call = compiled(m, backend="aot_eager")
    y = feature_map(3, 12, 4, 5).bfloat16()

    def cast(call: Any) -> Any:
        def run(y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(y)

        return run

    got, expected = results(module, y, cast(call)), results(m, y, cast(m))
    assert got["out"].dtype == torch.bfloat16
    assert_same(got, expected, 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_ops(backend: str) -> None:
    m = middle(backend, modulation="pixel")

    class OneByOne(nn.Module):
        def __init__(self, m: Any) -> None:
            super().__init__()
            self.m = m

        def forward(self, y: Tensor) -> Tensor:
            z = self.m.bn(y)
            h, attention = self.m.sampler(z, return_attention=True)
            return self.m.modulator(z, self.m.reasoner(h), attention)

    one = OneByOne(copy.deepcopy(m))
    module, call = compiled(one, backend="aot_eager")
    for n in (7, 9):
        y = feature_map(n, 12, 6, 5)
        torch._dynamo.mark_dynamic(y, 0)
        shown_equal(one, module, call, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks(backend: str) -> None:
    m = middle(backend)
    m.reasoner.register_forward_hook(lambda module, args, out: 2 * out)
    module, call = compiled(m, backend="aot_eager")
    shown_equal(m, module, call, feature_map(4, 12, 4, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cumulative_average(backend: str) -> None:
    m = middle(backend)
    m.bn.momentum = m.reasoner.bn.momentum = None
    module, call = compiled(m, backend="aot_eager")
    for seed in (1, 2):
        shown_equal(m, module, call, feature_map(4, 12, 4, 5, seed=seed))


def test_backend_switch_inside() -> None:
    m = middle("auto")

    def run(y: Tensor) -> Tensor:
        with vcr_ops.use_backend("composite"):
            return m(y)

    y = feature_map(4, 12, 4, 5)
    with vcr_ops.no_running_stats_update():
        expected = m(y)
        graphs: list[Any] = []

        def keep(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend=keep)(y), expected)
    assert "vcr_middle" not in graphs[0].code


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_errors(backend: str) -> None:
    m = middle(backend)
    call = torch.compile(m, backend="eager")
    with pytest.raises(Exception, match="y is int32; it takes float32"):
        call(feature_map(4, 12, 4, 5).int())
