"""Proves: on the GPU a VCRBlock's training step, under autocast and compiled too, gives the values of the composite;
and the backend runs that ``auto`` promises."""

import copy

import pytest
import torch

import python_ref
import vcr_ops
from tests.closeness import Closeness, Result
from tests.small import VARIANTS, assert_same, block, feature_map, middle, results
from vcr_ops.explain import op_arguments
from vcr_ops.ops.vcr_middle.synced import has_steps, vcr_middle_synced

from .machine import DEVICE, MARKS, REHEARSED, full_float32

pytestmark = MARKS

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
LAYOUT = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@TRAINING
@LAYOUT
@VARIANT
def test_block_is_the_composite_s(variant, channels_last, training, backend):
    ours, composite = (block(b, **VARIANTS[variant]).to(DEVICE).train(training) for b in (backend, "composite"))
    x = feature_map(3, 16, 6, 5, channels_last=channels_last).to(DEVICE)
    with full_float32():
        assert_same(results(ours, x), results(composite, x))


def result_of(module, x, autocast):
    """Output and gradients of the input and the parameters, after a forward under autocast or not."""
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        out = module(x)
    grad = feature_map(*out.shape, seed=2).to(out.device, out.dtype)
    named = {"x": x, **dict(module.named_parameters())}
    found = torch.autograd.grad(out, list(named.values()), grad)
    return Result({"out": out.detach()}, dict(zip(named, found, strict=True)))


@TRAINING
@VARIANT
def test_block_under_autocast(variant, training, backend):
    """As near to the float64 reference as the literal equations under autocast; parameters' gradients are float32."""
    ours = block(backend, **VARIANTS[variant]).to(DEVICE).train(training)
    plain = python_ref.VCRBlock(16, 4, groups=3, base_width=80, **VARIANTS[variant]).to(DEVICE).train(training)
    plain.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(plain).double()
    closeness = Closeness(torch.bfloat16, f"block under autocast, {variant}")
    for seed in range(10):
        x = feature_map(3, 16, 6, 5, seed=seed + 3).to(DEVICE)
        result = result_of(ours, x, autocast=True)
        assert result.outputs["out"].dtype == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in result.gradients.values())
        closeness.add(result, result_of(plain, x, autocast=True), result_of(exact, x.double(), autocast=False))
    closeness.check()


@TRAINING
@LAYOUT
@VARIANT
def test_compiled_values(variant, channels_last, training, backend):
    torch.compiler.reset()
    eager = middle(backend, **VARIANTS[variant]).to(DEVICE).train(training)
    module = copy.deepcopy(eager)
    call = torch.compile(module, fullgraph=True, dynamic=False)
    y = feature_map(3, 12, 6, 5, channels_last=channels_last).to(DEVICE)
    assert_same(results(module, y, call), results(eager, y))


@VARIANT
def test_steps_of_a_synchronised_middle(variant, backend):
    """One by one, with nobody to talk to, they give what the whole op gives."""
    if not has_steps(backend):
        pytest.skip(f"{backend} has no steps")
    m = middle(backend, **VARIANTS[variant]).to(DEVICE)
    y = feature_map(3, 12, 6, 5).to(DEVICE).requires_grad_()
    arguments = op_arguments(y, m.bn, m, "whole", True)
    out, *_ = vcr_middle_synced(backend, arguments, None, None)
    whole = m(y)
    grad = feature_map(3, 12, 6, 5, seed=2).to(DEVICE)
    wanted, got = (torch.autograd.grad(x, [y, *m.parameters()], grad) for x in (whole, out))
    names = ["dy", *(f"d{name}" for name, _ in m.named_parameters())]
    assert_same(
        {"out": out} | dict(zip(names, got, strict=True)), {"out": whole} | dict(zip(names, wanted, strict=True))
    )


@pytest.mark.skipif(bool(REHEARSED), reason="auto takes another backend for CPU tensors")
def test_auto_takes_what_explain_says():
    y = feature_map(3, 12, 6, 5).to(DEVICE)
    with torch.no_grad():
        taken = vcr_ops.explain(middle("auto").to(DEVICE), y).backend
        assert torch.equal(middle("auto").to(DEVICE).eval()(y), middle(taken).to(DEVICE).eval()(y))
    assert taken in ("triton", "cuda")


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_block_takes_what_explain_says(channels_last):
    """Its middle's map is the one that its convolutions make, and explain makes none."""
    x = feature_map(3, 16, 6, 5, channels_last=channels_last).to(DEVICE)
    b, m, maps = block("auto").to(DEVICE), middle("auto", channels=15).to(DEVICE), []
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            said = vcr_ops.explain(b, x)
            handle = b.bn2.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
            b(x)
            handle.remove()
            of_the_map = vcr_ops.explain(m, maps[-1])
        assert (said.backend, said.reason, said.why_not) == (of_the_map.backend, of_the_map.reason, None)
        assert (said.shape, said.map_format) == (of_the_map.shape, of_the_map.map_format)
