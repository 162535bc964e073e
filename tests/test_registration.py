"""Proves: every op is registered as PyTorch wants it (schema, fake kernel, autograd), by torch.library.opcheck with
permuted dense maps, on which mistakes about strides show."""

import functools
from unittest import mock

import pytest
import torch

import vcr_ops
from vcr_ops import library

from . import grid
from .ops import adapters

ADAPTERS = adapters()
OPS = torch.ops.vcr_ops
LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced_channels"]
SIZE = "N2C4p3S7"
assert vcr_ops.library.has_library()


def variants(op, layout, dtype):
    """Three variants, which between them leave out what can be left out."""
    every = ADAPTERS[op].variants(dtype=dtype, size=SIZE, layout=layout)
    return [every[0], every[len(every) // 2], every[-1]]


def forward_arguments(case, x, save):
    """The arguments of the schema."""
    if case.op == "concept_sample":
        names = ("z", "value", "query", "key", "logit")
        return [x.get(n) for n in names] + [case.sampler, case.attention == "with", save]
    if case.op == "concept_reason":
        return [x.get(n) for n in ("h", "edge", "mean", "var", "weight", "bias")] + [1e-5, case.edges, save]
    if case.op == "concept_modulate":
        names = ("z", "state", "scale_weight", "shift_weight", "scale_bias", "shift_bias", "attention")
        return [x.get(n) for n in names]
    names = ("y", "norm_mean", "norm_var", "norm_weight", "norm_bias", "value", "query", "key", "logit", "edge")
    names += ("state_mean", "state_var", "state_weight", "state_bias")
    names += ("scale_weight", "shift_weight", "scale_bias", "shift_bias")
    return [x.get(n) for n in names] + [case.norm, 1e-5, 1e-5, case.sampler, case.edges, case.modulation, save]


def backward_arguments(case, x, outputs, gradients):
    """The arguments of the backward op, after a forward that saved."""
    saved = outputs[-1] if isinstance(outputs, tuple) else None
    if case.op == "concept_sample":
        dattention = gradients.get("attention")
        rest = [x.get(n) for n in ("z", "value", "query", "key", "logit")]
        return [gradients["h"], dattention, *rest, saved, case.sampler]
    if case.op == "concept_reason":
        rest = [x.get(n) for n in ("h", "edge", "weight", "bias")]
        return [gradients["state"], *rest, saved, case.edges, case.state == "batch"]
    if case.op == "concept_modulate":
        return [gradients["out"], *forward_arguments(case, x, True)]
    names = ("y", "norm_weight", "norm_bias", "value", "query", "key", "logit", "edge", "state_weight", "state_bias")
    names += ("scale_weight", "shift_weight", "scale_bias", "shift_bias")
    rest = [x.get(n) for n in names]
    variant = [case.sampler, case.edges, case.modulation]
    return [gradients["out"], *rest, saved, case.norm, case.state == "batch", *variant]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ADAPTERS)
def test_opcheck(op, layout, dtype):
    adapter = ADAPTERS[op]
    if op == "concept_reason" and (layout != "contiguous" or dtype == "bf16"):
        pytest.skip("has no map")
    for case in variants(op, layout, dtype):
        inputs, gradients = adapter.draw(case)
        leaves = adapter.leaves(inputs, case)
        forward = getattr(OPS, op).default
        # The first variant goes through everything; the checks by tracing take a second each.
        utils = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(forward, forward_arguments(case, leaves, True), test_utils=utils)
        with torch.no_grad():
            still = {name: x.detach() for name, x in leaves.items()}
            torch.library.opcheck(forward, forward_arguments(case, still, False), test_utils=utils[:2])
            outputs = forward(*forward_arguments(case, still, True))
            grads = {}
            for name, g in gradients.items():
                small = name in ("h", "attention", "state")
                grads[name] = g.to(case.small_dtype if small else case.feature_dtype)
                if not small:
                    grads[name] = grid.arrange(grads[name], layout)
            arguments = backward_arguments(case, still, outputs, grads)
            torch.library.opcheck(getattr(OPS, f"{op}_backward").default, arguments, test_utils=utils[:2])


@pytest.mark.parametrize("op", ADAPTERS)
def test_fake_kernels_take_one_device(op):
    """Each tensor in turn is on another device than the rest: forward and backward say so before they return fakes."""
    case = variants(op, "contiguous", "f32")[0]
    adapter = ADAPTERS[op]
    inputs, gradients = adapter.draw(case)
    with torch.no_grad():
        leaves = {name: x.detach() for name, x in adapter.leaves(inputs, case).items()}
        forward = forward_arguments(case, leaves, True)
        outputs = getattr(OPS, op)(*forward)
        grads = {name: g.float() for name, g in gradients.items()}
        for name, arguments in ((op, forward), (f"{op}_backward", backward_arguments(case, leaves, outputs, grads))):
            function = getattr(OPS, name).default
            places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)]
            assert len(places) > 2
            for place in places:
                mixed = [x.to("meta") if i == place else x for i, x in enumerate(arguments)]
                with pytest.raises(ValueError, match=f"^{name} takes tensors on one device; these are on .* and "):
                    function(*mixed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("op", ADAPTERS)
def test_opcheck_by_tracing(op, layout, nan_memory):
    """Traced with dynamic shapes: forward and gradients are those of eager.

    What nobody writes or reads (gaps in what is saved for backward) is NaN in both.
    """
    case = variants(op, layout, "f32")[0]
    inputs, _ = ADAPTERS[op].draw(case)
    arguments = forward_arguments(case, ADAPTERS[op].leaves(inputs, case), True)
    same = functools.partial(torch.testing.assert_close, equal_nan=True)
    with mock.patch.object(torch.testing, "assert_close", same):
        torch.library.opcheck(
            getattr(OPS, op).default, arguments, test_utils="test_aot_dispatch_dynamic", atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("op", ADAPTERS)
def test_inference_keeps_nothing(op):
    """save=False has no gradient, and says so."""
    if op == "concept_modulate":
        pytest.skip("saves its inputs alone")
    case = variants(op, "contiguous", "f32")[0]
    leaves = ADAPTERS[op].leaves(ADAPTERS[op].draw(case)[0], case)
    outputs = getattr(OPS, op).default(*forward_arguments(case, leaves, False))
    assert outputs[-1].numel() == 0
    with pytest.raises(RuntimeError, match="save=False"):
        outputs[0].sum().backward()


def test_every_op_has_an_adapter():
    registered = {
        name.removeprefix("vcr_ops::") for name in torch._C._dispatch_get_all_op_names() if "vcr_ops::" in name
    }
    differentiable = {name.removesuffix("_backward") for name in registered if name.endswith("_backward")}
    assert differentiable - set(library.AROUND) == set(ADAPTERS)  # what is around the middle has test_norm_relu.py
