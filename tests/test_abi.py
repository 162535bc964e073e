"""One op library serves torch 2.10 and later: a short round through every op, which CI runs under two versions of torch
with the very same file (VCR_OPS_SECOND_TORCH=1 says that this is the other one).

The rest of the tests judge values finely; here, in float64, C++ and composite must agree to rounding.
"""

import itertools
import os

import pytest
import torch

import vcr_ops
from vcr_ops import _C, VisualConceptReasoning, concept_modulate, concept_reason, concept_sample, library

pytestmark = pytest.mark.abi

CONCEPTS, P, PT = 3, 5, 4
CHANNELS = CONCEPTS * P
VARIANTS = [
    dict(sampler=sampler, edges=edges, modulation=modulation, affine=affine)
    for sampler, edges, modulation, affine in itertools.product(
        ("dynamic", "static", "pool"), ("dynamic", "static", "none"), ("channel", "pixel"), ("both", "scale", "shift")
    )
    if not (sampler == "pool" and modulation == "pixel")
]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def feature_map(channels_last: bool, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    y = torch.randn(2, CHANNELS, 5, 7, dtype=dtype)
    return (y.to(memory_format=torch.channels_last) if channels_last else y).requires_grad_()


def both(run) -> None:
    """Values and gradients of what ``run(backend)`` returns, outputs and inputs, agree between the backends."""
    results = []
    for backend in ("cpp", "composite"):
        outputs, inputs = run(backend)
        weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs]
        total = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(total, inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9, check_stride=False)


def test_which_torch():
    built = _C.build_info()["torch"].split("+")[0]
    running = torch.__version__.split("+")[0]
    assert library.has_library()
    if os.environ.get("VCR_OPS_SECOND_TORCH") == "1":
        assert built != running


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("sampler", ["dynamic", "static", "pool"])
def test_concept_sample(sampler: str, channels_last: bool):
    torch.manual_seed(0)
    z, value, query, key, logit = (
        feature_map(channels_last),
        random(CONCEPTS, P, PT),
        random(CONCEPTS, P, PT),
        random(CONCEPTS, P, PT),
        random(CONCEPTS, P),
    )
    options = {"dynamic": dict(query=query, key=key), "static": dict(logit=logit), "pool": {}}[sampler]
    attention = sampler != "pool"

    def run(backend: str):
        out = concept_sample(z, value, sampler=sampler, return_attention=attention, backend=backend, **options)
        return list(out) if attention else [out], [z, value, *options.values()]

    both(run)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("edges", ["dynamic", "static", "none"])
def test_concept_reason(edges: str, frozen: bool):
    torch.manual_seed(0)
    h, weight, bias = random(2, CONCEPTS, PT), random(PT), random(PT)
    edge = {"dynamic": random(PT, CONCEPTS), "static": random(CONCEPTS, CONCEPTS), "none": None}[edges]
    mean, var = torch.randn(PT).double(), torch.rand(PT).double() + 0.5
    statistics = dict(mean=mean, var=var) if frozen else {}

    def run(backend: str):
        out = concept_reason(h, edge, weight=weight, bias=bias, edges=edges, backend=backend, **statistics)
        return [out.state], [t for t in (h, edge, weight, bias) if t is not None]

    both(run)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("pixel", [False, True], ids=["channel", "pixel"])
def test_concept_modulate(pixel: bool, channels_last: bool):
    torch.manual_seed(0)
    z, state = feature_map(channels_last), random(2, CONCEPTS, PT)
    weights = [random(CONCEPTS, PT, P), random(CONCEPTS, PT, P)]
    biases = [random(CONCEPTS, P), random(CONCEPTS, P)]
    attention = torch.rand(2, CONCEPTS, 5, 7, dtype=torch.float64).requires_grad_() if pixel else None

    def run(backend: str):
        out = concept_modulate(
            z,
            state,
            *biases,
            scale_weight=weights[0],
            shift_weight=weights[1],
            attention=attention,
            backend=backend,
        )
        return [out], [t for t in (z, state, *weights, *biases, attention) if t is not None]

    both(run)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_middle(variant: dict[str, str], training: bool, channels_last: bool):
    torch.manual_seed(0)
    middle = VisualConceptReasoning(CHANNELS, CONCEPTS, **variant).double().train(training)
    y = feature_map(channels_last)

    def run(backend: str):
        with vcr_ops.use_backend(backend), vcr_ops.no_running_stats_update():
            return [middle(y)], [y, *middle.parameters()]

    both(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_other_types(dtype: torch.dtype, channels_last: bool):
    torch.manual_seed(0)
    middle = VisualConceptReasoning(CHANNELS, CONCEPTS)
    y = feature_map(channels_last, dtype)
    out = middle(y)
    out.float().square().sum().backward()
    assert (out.dtype, y.grad.dtype) == (dtype, dtype)
    assert out.stride() == y.grad.stride() == y.stride()
    with vcr_ops.use_backend("composite"):
        torch.testing.assert_close(out, middle(y), rtol=0.05, atol=0.05)


def test_compiled():
    torch.manual_seed(0)
    middle = VisualConceptReasoning(CHANNELS, CONCEPTS).double()
    y = feature_map(False)
    with vcr_ops.no_running_stats_update():
        eager = torch.autograd.grad(middle(y).square().sum(), [y, *middle.parameters()])
        compiled = torch.compile(middle, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.autograd.grad(compiled(y).square().sum(), [y, *middle.parameters()]), eager)
