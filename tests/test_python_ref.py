"""Proves: python_ref is the paper's equations, by loops in numpy that do one number at a time."""

import itertools
import math

import numpy as np
import pytest
import torch

import python_ref

from . import grid
from .ops import adapters

LAYOUTS = ["contiguous", "channels_last", "permuted"]
SPATIAL = [(7,), (3, 4), (2, 3, 2)]
N, C, P = 2, 3, 5
PT = 4
CASES = list(itertools.product(LAYOUTS, SPATIAL))
IDS = [f"{layout}-{len(spatial)}d" for layout, spatial in CASES]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape)), dtype=torch.float64)


def concept(z: np.ndarray, c: int) -> np.ndarray:
    """Z_c (S, p) of one image z (C*p, *spatial)."""
    return z.reshape(C, P, -1)[c].T


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def close(x, y):
    torch.testing.assert_close(x, torch.as_tensor(np.asarray(y)), rtol=1e-12, atol=1e-12)


def attention_of(Zc, sampler, c, query, key, logit):
    if sampler == "dynamic":
        q = Zc.mean(0) @ query[c]
        return softmax(np.array([q @ (Zc[i] @ key[c]) for i in range(len(Zc))]) / math.sqrt(PT))
    return softmax(np.array([Zc[i] @ logit[c] for i in range(len(Zc))]))


@pytest.mark.parametrize("sampler", grid.SAMPLERS)
@pytest.mark.parametrize("layout, spatial", CASES, ids=IDS)
def test_sampler(sampler, layout, spatial):
    z = grid.arrange(random(N, C * P, *spatial), layout)
    value, query, key, logit = (random(C, P, PT, seed=i) for i in range(4))
    logit = logit[..., 0]
    h, attention = np.zeros((N, C, PT)), np.zeros((N, C, math.prod(spatial)))
    for n, c in itertools.product(range(N), range(C)):
        Zc = concept(z.numpy()[n], c)
        if sampler == "pool":
            h[n, c] = Zc.mean(0) @ value.numpy()[c]
            continue
        M = attention_of(Zc, sampler, c, query.numpy(), key.numpy(), logit.numpy())
        attention[n, c] = M
        h[n, c] = sum(M[i] * Zc[i] for i in range(len(M))) @ value.numpy()[c]
    options = {"sampler": sampler, "query": query, "key": key, "logit": logit}
    close(python_ref.concept_sample(z, value, **options), h)
    if sampler != "pool":
        ours, M = python_ref.concept_sample(z, value, return_attention=True, **options)
        close(ours, h)
        close(M, attention.reshape(N, C, *spatial))


@pytest.mark.parametrize("edges", grid.EDGES)
@pytest.mark.parametrize("training", [True, False], ids=["batch", "given"])
def test_reasoner(edges, training):
    h = random(N, C, PT)
    edge = {"dynamic": random(PT, C, seed=1), "static": random(C, C, seed=1), "none": None}[edges]
    weight, bias, mean, var = random(PT, seed=2), random(PT, seed=3), random(PT, seed=4), random(PT, seed=5) ** 2 + 0.1
    H = h.numpy()
    G = H.copy()
    for n, c, other in itertools.product(range(N), range(C), range(C)):
        if edges == "dynamic":
            A = np.tanh(sum(H[n, c, k] * edge.numpy()[k, other] for k in range(PT)))
        else:
            A = 0 if edge is None else edge.numpy()[c, other]
        G[n, c] += A * H[n, other]
    rows = G.reshape(-1, PT)
    mu = rows.mean(0) if training else mean.numpy()
    sigma2 = rows.var(0) if training else var.numpy()
    wanted = np.maximum((G - mu) / np.sqrt(sigma2 + 1e-5) * weight.numpy() + bias.numpy(), 0)
    given = {} if training else {"mean": mean, "var": var}
    out = python_ref.concept_reason(h, edge, edges=edges, weight=weight, bias=bias, **given)
    close(out.state, wanted)
    close(out.mean, mu)
    close(out.var, rows.var(0, ddof=1) if training else var.numpy())


@pytest.mark.parametrize("affine", grid.AFFINES)
@pytest.mark.parametrize("modulation", grid.MODULATIONS)
@pytest.mark.parametrize("layout, spatial", CASES, ids=IDS)
def test_modulator(affine, modulation, layout, spatial):
    z = grid.arrange(random(N, C * P, *spatial), layout)
    state, attention = random(N, C, PT, seed=1).relu(), random(N, C, *spatial, seed=2).exp()
    scale_weight, shift_weight = random(C, PT, P, seed=3), random(C, PT, P, seed=4)
    scale_bias, shift_bias = random(C, P, seed=5), random(C, P, seed=6)
    wanted = np.zeros((N, C, P, math.prod(spatial)))
    for n, c in itertools.product(range(N), range(C)):
        M = attention[n, c].numpy().ravel()
        for i in range(len(M)):
            h = state.numpy()[n, c] * (M[i] / M.max() if modulation == "pixel" else 1)
            alpha, beta = scale_bias.numpy()[c].copy(), shift_bias.numpy()[c].copy()
            if affine != "shift":
                alpha += h @ scale_weight.numpy()[c]
            if affine != "scale":
                beta += h @ shift_weight.numpy()[c]
            wanted[n, c, :, i] = np.maximum(alpha * concept(z.numpy()[n], c)[i] + beta, 0)
    out = python_ref.concept_modulate(
        z,
        state,
        scale_bias,
        shift_bias,
        scale_weight=None if affine == "shift" else scale_weight,
        shift_weight=None if affine == "scale" else shift_weight,
        attention=attention if modulation == "pixel" else None,
    )
    close(out, wanted.reshape(z.shape))


@pytest.mark.parametrize(
    "sampler, edges, modulation, affine",
    list(itertools.product(grid.SAMPLERS, grid.EDGES, grid.MODULATIONS, grid.AFFINES)),
)
def test_module_function_and_block_agree(sampler, edges, modulation, affine):
    options = {"sampler": sampler, "edges": edges, "modulation": modulation, "affine": affine}
    if sampler == "pool" and modulation == "pixel":
        with pytest.raises(ValueError, match="attention"):
            python_ref.VCRBlock(8, 8, groups=2, base_width=40, **options)
        return
    torch.manual_seed(0)
    block = python_ref.VCRBlock(8, 8, groups=2, base_width=40, **options).double()
    middle = python_ref.VisualConceptReasoning(10, 2, **options).double()
    middle.load_state_dict({k.replace("bn2", "bn"): v for k, v in block.state_dict().items()}, strict=False)
    middle.bn.load_state_dict(block.bn2.state_dict())
    x = random(2, 8, 4, 3)
    y = block.conv2(block.bn1(block.conv1(x)).relu())
    states = {k: v for k, v in middle.state_dict().items() if k.split(".")[0] in ("sampler", "modulator")}
    parameters = {k.split(".")[1]: v for k, v in states.items()}
    out, mean, var, state_mean, state_var = python_ref.visual_concept_reasoning(
        y,
        parameters.pop("value"),
        parameters.pop("scale_bias"),
        parameters.pop("shift_bias"),
        **parameters,
        norm_weight=middle.bn.weight,
        norm_bias=middle.bn.bias,
        edge=middle.reasoner.edge,
        state_weight=middle.reasoner.bn.weight,
        state_bias=middle.reasoner.bn.bias,
        sampler=sampler,
        edges=edges,
        modulation=modulation,
    )
    z = middle(y)
    torch.testing.assert_close(out, z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(0.1 * mean, middle.bn.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(0.9 + 0.1 * var, middle.bn.running_var, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(0.1 * state_mean, middle.reasoner.bn.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(0.9 + 0.1 * state_var, middle.reasoner.bn.running_var, rtol=1e-12, atol=1e-12)
    merged = (block.bn3(block.conv3(z)) + block.downsample(x)).relu()
    torch.testing.assert_close(block(x), merged, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("modulation", grid.MODULATIONS)
def test_types_and_memory_formats(dtype, ndim, modulation):
    torch.manual_seed(0)
    middle = python_ref.VisualConceptReasoning(16, 4, ndim=ndim, modulation=modulation).to(dtype)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[ndim]
    for memory_format in (torch.contiguous_format, last):
        y = torch.randn(2, 16, *(3,) * ndim, dtype=dtype).to(memory_format=memory_format).requires_grad_()
        out = middle(y)
        out.sum().backward()
        assert out.dtype == y.grad.dtype == dtype
        assert out.shape == y.shape
        assert out.is_contiguous(memory_format=memory_format)
        assert y.grad.is_contiguous(memory_format=memory_format)
    block = python_ref.VCRBlock(16, 16, 2, groups=4, base_width=16, ndim=ndim, modulation=modulation).to(dtype)
    x = torch.randn(2, 16, *(6,) * ndim, dtype=dtype)
    assert block(x).shape == (2, 64, *(3,) * ndim)


def test_float32_parameters_beside_bfloat16_features():
    middle = python_ref.VisualConceptReasoning(20, 4, modulation="pixel")
    out = middle(torch.randn(2, 20, 3, 3).bfloat16())
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in middle.parameters()} == {torch.float32}


def test_autocast():
    block = python_ref.VCRBlock(16, 16, groups=4, base_width=16, modulation="pixel")
    with torch.autocast("cpu", torch.bfloat16):
        out = block(torch.randn(2, 16, 5, 5))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in block.parameters()} == {torch.float32}


def test_compile():
    torch.manual_seed(0)
    middle = python_ref.VisualConceptReasoning(20, 4, modulation="pixel")
    y = torch.randn(2, 20, 3, 3)
    eager = middle(y)
    torch.testing.assert_close(
        torch.compile(middle, fullgraph=True, backend="aot_eager")(y), eager, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_networks_run(ndim):
    network = python_ref.vcrnet50(7, groups=4, base_width=4, ndim=ndim).eval()
    assert network(torch.randn(1, 3, *(32,) * ndim)).shape == (1, 7)


def test_unknown_names():
    for argument in ("sampler", "edges", "modulation", "affine"):
        with pytest.raises(ValueError, match=argument):
            python_ref.VisualConceptReasoning(20, 4, **{argument: "other"})


ADAPTERS = adapters()
VARIANTS = [case for adapter in ADAPTERS.values() for case in adapter.variants(dtype="f64", size="N2C5p8S30")]


@pytest.mark.parametrize("case", VARIANTS, ids=[case.id for case in VARIANTS])
def test_gradients_beside_long_double(case):
    adapter = ADAPTERS[case.op]
    inputs, gradients = adapter.draw(case)
    plain = adapter.plain_result(inputs, gradients, case).tensors()
    fine = adapter.reference_result(inputs, gradients, case).tensors()
    assert plain.keys() == fine.keys()
    for name, x in fine.items():
        torch.testing.assert_close(plain[name], torch.as_tensor(x.astype(float)), rtol=1e-10, atol=1e-10)
