"""Bad input is refused by name, before anything is computed and before any buffer moves."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.backends import TRITON
from tests.small import BACKENDS, feature_map, middle

C, P, PT, S = 3, 4, 4, (5, 2)
Change = dict[str, Any]


def sample(backend: str = "composite", **change: Any) -> Any:
    given = {
        "z": feature_map(2, C * P, *S),
        "value": torch.rand(C, P, PT),
        "query": torch.rand(C, P, PT),
        "key": torch.rand(C, P, PT),
    } | change
    return vcr_ops.concept_sample(given.pop("z"), given.pop("value"), **given, backend=backend)


def reason(backend: str = "composite", **change: Any) -> Any:
    given = {"h": torch.rand(2, C, PT), "edge": torch.rand(PT, C)} | change
    return vcr_ops.concept_reason(given.pop("h"), given.pop("edge"), **given, backend=backend)


def modulate(backend: str = "composite", **change: Any) -> Any:
    given = {
        "z": feature_map(2, C * P, *S),
        "state": torch.rand(2, C, PT),
        "scale_bias": torch.rand(C, P),
        "shift_bias": torch.rand(C, P),
        "scale_weight": torch.rand(C, PT, P),
    } | change
    names = ("z", "state", "scale_bias", "shift_bias")
    return vcr_ops.concept_modulate(*[given.pop(name) for name in names], **given, backend=backend)


def whole(backend: str = "composite", **change: Any) -> Any:
    given = {
        "y": feature_map(2, C * P, *S),
        "value": torch.rand(C, P, PT),
        "scale_bias": torch.rand(C, P),
        "shift_bias": torch.rand(C, P),
        "query": torch.rand(C, P, PT),
        "key": torch.rand(C, P, PT),
        "edge": torch.rand(PT, C),
    } | change
    names = ("y", "value", "scale_bias", "shift_bias")
    return vcr_ops.visual_concept_reasoning(*[given.pop(name) for name in names], **given, backend=backend)


x = feature_map(2, C * P, *S)
BAD: list[tuple[Callable[..., Any], Change, type[Exception], str]] = [
    # the map
    (sample, {"z": [1.0]}, TypeError, "z is a list; it takes a tensor"),
    (sample, {"z": x[0, 0]}, ValueError, "z has 2 dims, (5, 2); it takes (N, C*p, *spatial), one spatial dim or more"),
    (sample, {"z": x.int()}, TypeError, "z is int32; it takes float32, float64, bfloat16, float16"),
    (sample, {"z": x.to(torch.complex64)}, TypeError, "z is complex64; it takes float32"),
    (sample, {"z": x.bool()}, TypeError, "z is bool; it takes"),
    (sample, {"z": x.half()}, TypeError, "z is float16 on the CPU, where it takes float32, float64 or bfloat16"),
    (sample, {"z": x.to_sparse()}, TypeError, "z has layout torch.sparse_coo; it takes a dense tensor"),
    (sample, {"z": x[..., :0]}, ValueError, "z has no positions: its shape is (2, 12, 5, 0); only N may be 0"),
    (sample, {"z": x[:, :0]}, ValueError, "z has no channels: its shape is (2, 0, 5, 2); only N may be 0"),
    (sample, {"z": x[:, :10]}, ValueError, "z has 10 channels, which value's 3 concepts don't divide"),
    (sample, {"z": x[:, :9]}, ValueError, "value is for 3 concepts of 4 channels, 12 in all; z has 9 channels"),
    (modulate, {"z": x[0, 0]}, ValueError, "z has 2 dims"),
    (modulate, {"z": x.long()}, TypeError, "z is int64; it takes"),
    (modulate, {"z": x[:, :10]}, ValueError, "z has 10 channels, which scale_bias's 3 concepts don't divide"),
    (whole, {"y": x[0, 0]}, ValueError, "y has 2 dims"),
    (whole, {"y": x.half()}, TypeError, "y is float16 on the CPU"),
    (whole, {"y": x[..., :0]}, ValueError, "y has no positions"),
    (whole, {"y": x[:, :10]}, ValueError, "y has 10 channels, which value's 3 concepts don't divide"),
    (whole, {"y": x.to("meta")}, ValueError, "value is on cpu; it takes y's device, meta"),
    (whole, {"y": x.double(), "value": torch.rand(C, P, PT).bfloat16()}, TypeError,
     "value is bfloat16; beside float64 y it takes float64 or float32"),
    # parameters
    (sample, {"value": None}, TypeError, "value is a NoneType; it takes a tensor"),
    (sample, {"value": torch.rand(C, P)}, ValueError, "value has shape (3, 4); it takes (C, p, pt)"),
    (sample, {"value": torch.rand(C, P, 0)}, ValueError, "value has shape (C, p, 0); states need at least one column"),
    (sample, {"value": torch.rand(C, P, PT).double()}, TypeError,
     "value is float64; beside float32 z it takes float32"),
    (sample, {"query": torch.rand(C, P, PT, device="meta")}, ValueError, "query is on meta; it takes z's device, cpu"),
    (sample, {"query": torch.rand(C, PT + 1, P)}, ValueError, "query has shape (3, 5, 4); it takes (3, 4, 4)"),
    (sample, {"query": None}, ValueError, "query is None, but sampler='dynamic' takes a tensor"),
    (sample, {"key": None}, ValueError, "key is None, but sampler='dynamic' takes a tensor"),
    (sample, {"logit": torch.rand(C, P)}, ValueError, "logit is given, but sampler='dynamic' takes none"),
    (sample, {"sampler": "pool"}, ValueError, "query is given, but sampler='pool' takes none"),
    (sample, {"sampler": "static", "query": None, "key": None}, ValueError,
     "logit is None, but sampler='static' takes a tensor"),
    (sample, {"sampler": "mean"}, ValueError, "sampler is 'mean'; it takes one of 'dynamic', 'static', 'pool'"),
    (sample, {"sampler": "pool", "query": None, "key": None, "return_attention": True}, ValueError,
     "return_attention is True, but sampler='pool' has no attention map"),
    (reason, {"h": torch.rand(2, PT)}, ValueError, "h has shape (2, 4); it takes (N, C, pt)"),
    (reason, {"h": torch.rand(2, C, PT).int()}, TypeError, "h is int32; it takes"),
    (reason, {"edge": None}, ValueError, "edge is None, but edges='dynamic' takes a tensor"),
    (reason, {"edges": "none"}, ValueError, "edge is given, but edges='none' takes none"),
    (reason, {"edges": "static"}, ValueError, "edge has shape (4, 3); it takes (3, 3)"),
    (reason, {"edges": "full"}, ValueError, "edges is 'full'; it takes one of 'dynamic', 'static', 'none'"),
    (reason, {"mean": torch.zeros(PT)}, ValueError, "var is None; mean and var are given both or not at all"),
    (reason, {"mean": torch.zeros(2), "var": torch.ones(2)}, ValueError, "mean has shape (2,); it takes (4,)"),
    (reason, {"mean": torch.zeros(PT), "var": torch.ones(PT, requires_grad=True)}, ValueError,
     "var requires grad; statistics that are given are constants: pass var.detach()"),
    (reason, {"weight": torch.ones(2)}, ValueError, "weight has shape (2,); it takes (4,)"),
    (reason, {"bias": torch.ones(PT).double()}, TypeError, "bias is float64; beside float32 h it takes float32"),
    (reason, {"eps": "small"}, TypeError, "eps is 'small'; it takes a number"),
    (reason, {"eps": -1.0}, ValueError, "eps is -1.0; it takes a number that is not negative"),
    (reason, {"h": torch.rand(1, 1, PT), "edge": torch.rand(PT, 1)}, ValueError,
     "Expected more than 1 value per channel when training: h has N*C = 1 state, (1, 1, 4)"),
    (modulate, {"scale_bias": torch.rand(C * P)}, ValueError, "scale_bias has shape (12,); it takes (C, p)"),
    (modulate, {"shift_bias": torch.rand(P, C)}, ValueError, "shift_bias has shape (4, 3); it takes (3, 4)"),
    (modulate, {"state": torch.rand(3, C, PT)}, ValueError, "state has shape (3, 3, 4); it takes (2, 3, pt)"),
    (modulate, {"state": torch.rand(2, C, PT).double()}, TypeError, "state is float64; beside float32 z it takes"),
    (modulate, {"scale_weight": torch.rand(C, 7, P)}, ValueError,
     "scale_weight has shape (3, 7, 4); state's 4 columns take (C, 4, p)"),
    (modulate, {"shift_weight": torch.rand(C, PT)}, ValueError, "shift_weight has shape (3, 4); it takes (3, pt, 4)"),
    (modulate, {"attention": torch.rand(2, C, 5)}, ValueError, "attention has shape (2, 3, 5); it takes (2, 3, 5, 2)"),
    (whole, {"norm": "layer"}, ValueError, "norm is 'layer'; it takes one of 'batch', 'given', 'none'"),
    (whole, {"norm": "given"}, ValueError, "norm_mean is None, but norm='given' takes a tensor"),
    (whole, {"norm_mean": torch.rand(12)}, ValueError, "norm_mean is given, but norm='batch' takes none"),
    (whole, {"norm": "given", "norm_mean": torch.rand(12), "norm_var": torch.rand(5)}, ValueError,
     "norm_var has shape (5,); it takes (12,)"),
    (whole, {"norm": "none", "norm_weight": torch.rand(12)}, ValueError, "norm_weight is given, but norm='none' takes"),
    (whole, {"norm_bias": torch.rand(3)}, ValueError, "norm_bias has shape (3,); it takes (12,)"),
    (whole, {"norm_eps": None}, TypeError, "norm_eps is None; it takes a number"),
    (whole, {"state_mean": torch.rand(PT)}, ValueError, "state_var is None; state_mean and state_var are given both"),
    (whole, {"state_weight": torch.rand(1)}, ValueError, "state_weight has shape (1,); it takes (4,)"),
    (whole, {"modulation": "image"}, ValueError, "modulation is 'image'; it takes one of 'channel', 'pixel'"),
    (whole, {"modulation": "pixel", "sampler": "pool", "query": None, "key": None}, ValueError,
     "modulation is 'pixel', which needs an attention map; sampler='pool' has none"),
    (whole, {"scale_weight": torch.rand(C, P, PT + 1)}, ValueError, "scale_weight has shape (3, 4, 5); it takes"),
    (whole, {"y": x[:1, :, :1, :1]}, ValueError,
     "Expected more than 1 value per channel when training: y has N*S = 1 value per channel, (1, 12, 1, 1)"),
]  # fmt: skip


def skip_what_the_interpreter_takes(message: str, backend: str) -> None:
    if backend == "triton" and "float16 on the CPU" in message:
        pytest.skip("Triton's interpreter takes it, as a GPU does")


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("op, change, error, message", BAD)
def test_ops(op: Callable[..., Any], change: Change, error: type[Exception], message: str, backend: str) -> None:
    skip_what_the_interpreter_takes(message, backend)
    op(backend)
    with pytest.raises(error, match=re.escape(message)):
        op(backend, **change)


def refused(m: nn.Module, y: Any, error: type[Exception], message: str) -> None:
    before = {name: b.clone() for name, b in m.named_buffers()}
    with pytest.raises(error, match=re.escape(message)):
        m(y)
    for name, b in m.named_buffers():
        assert torch.equal(b, before[name]), f"{name} moved"


MAPS: list[tuple[Any, type[Exception], str]] = [
    (x[0, 0], ValueError, "y has 2 dims"),
    (x[0], ValueError, "y has 3 dims; its batch norm is a BatchNorm2d, which takes 4"),
    (x[..., None], ValueError, "y has 5 dims; its batch norm is a BatchNorm2d, which takes 4"),
    (x.half(), TypeError, "y is float16 on the CPU"),
    (x.int(), TypeError, "y is int32; it takes"),
    (x.to(torch.complex64), TypeError, "y is complex64; it takes"),
    (x.to_sparse(), TypeError, "y has layout torch.sparse_coo; it takes a dense tensor"),
    (x[:, :9], ValueError, "value is for 3 concepts of 4 channels, 12 in all; y has 9 channels"),
    (x[:, :10], ValueError, "y has 10 channels, which value's 3 concepts don't divide"),
    (x[..., :0], ValueError, "y has no positions"),
    (x.to("meta"), ValueError, "is on cpu; it takes y's device, meta"),
    (x[:1, :, :1, :1], ValueError, "Expected more than 1 value per channel when training: y has N*S = 1"),
    ("image", TypeError, "y is a str; it takes a tensor"),
]


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
@pytest.mark.parametrize("y, error, message", MAPS)
def test_module(y: Any, error: type[Exception], message: str, backend: str) -> None:
    skip_what_the_interpreter_takes(message, backend)
    refused(middle(backend), y, error, message)


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_module_of_another_type_or_device(backend: str) -> None:
    refused(middle(backend).double(), x, TypeError, "value is float64; beside float32 y it takes float32")
    refused(middle(backend).bfloat16(), x, TypeError, "is bfloat16; beside float32 y it takes float32")
    refused(middle(backend).eval().double(), x, TypeError, "is float64; beside float32 y it takes float32")
    m = middle(backend)
    m.modulator.to("meta")
    refused(m, x, ValueError, "scale_bias is on meta; it takes y's device, cpu")


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_one_value_per_channel(backend: str) -> None:
    m = middle(backend)
    m.bn.eval()
    m(x[:1, :, :1, :1])  # three concepts: three states
    m.eval()
    m(x[:1, :, :1, :1])
    one = middle(backend, channels=4, concepts=1)
    message = "Expected more than 1 value per channel when training: y has one image of C = 1 concept"
    refused(one, x[:1, :4], ValueError, message)
    one(x[:, :4])
    one.reasoner.bn.eval()
    one(x[:1, :4])


@pytest.mark.parametrize("backend", [*BACKENDS, TRITON])
def test_single_modules(backend: str) -> None:
    m = middle(backend)
    refused(m.sampler, x.int(), TypeError, "z is int32; it takes")
    refused(m.reasoner, torch.rand(2, 12), ValueError, "h has shape (2, 12); it takes (N, C, pt)")
    with pytest.raises(ValueError, match="state has shape"):
        m.modulator(x, torch.rand(1, 1, 1))
    one = vcr_ops.ConceptReasoner(4, 1, backend=backend)
    refused(one, torch.rand(1, 1, 4), ValueError, "Expected more than 1 value per channel when training")


ARGUMENTS: list[tuple[Change, type[Exception], str]] = [
    ({"channels": 10}, ValueError, "channels is 10, which concepts=3 doesn't divide"),
    ({"channels": 12.0}, TypeError, "channels is 12.0; it takes an int"),
    ({"concepts": 0}, ValueError, "concepts is 0; it takes at least 1"),
    ({"sampler": "Dynamic"}, ValueError, "sampler is 'Dynamic'; it takes one of"),
    ({"edges": None}, ValueError, "edges is None; it takes one of"),
    ({"modulation": "both"}, ValueError, "modulation is 'both'; it takes one of 'channel', 'pixel'"),
    ({"affine": "none"}, ValueError, "affine is 'none'; it takes one of 'both', 'scale', 'shift'"),
    ({"modulation": "pixel", "sampler": "pool"}, ValueError, "modulation is 'pixel', which needs an attention map"),
    (
        {"backend": "cuda12"},
        ValueError,
        "backend is 'cuda12'; it takes one of 'auto', 'cpp', 'triton', 'cuda', 'composite'",
    ),
    ({"ndim": 4}, ValueError, "ndim is 4; it takes 1, 2 or 3"),
]


@pytest.mark.parametrize("change, error, message", ARGUMENTS)
def test_constructors(change: Change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        vcr_ops.VisualConceptReasoning(**({"channels": 12, "concepts": 3} | change))
    change = {name: value for name, value in change.items() if name not in ("channels", "concepts")}
    if change:
        with pytest.raises(error, match=re.escape(message)):
            vcr_ops.VCRBlock(64, 64, **change)


def test_block_and_network_arguments() -> None:
    with pytest.raises(ValueError, match="planes=1 and base_width=4 leave 0 channels to a concept"):
        vcr_ops.VCRBlock(64, 1)
    with pytest.raises(ValueError, match="groups is 0; it takes at least 1"):
        vcr_ops.VCRBlock(64, 64, groups=0)
    with pytest.raises(TypeError, match=r"num_classes is 10.0; it takes an int"):
        vcr_ops.vcrnet50(10.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"replace_stride_with_dilation is .* it takes None or three booleans"):
        vcr_ops.vcrnet50(replace_stride_with_dilation=[True])


def test_nothing_is_computed_first() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        names: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    calls, integers = Calls(), x.int()
    for backend in BACKENDS:
        m = middle(backend)
        calls.names = []
        with calls, pytest.raises(TypeError):
            m(integers)
        assert set(calls.names) <= {"vcr_ops.vcr_middle.default"}  # the op that refuses
