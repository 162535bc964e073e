"""Bad input is refused by name, before anything is computed and before any buffer moves."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.backends import TRITON
from tests.resnexts import resnet
from tests.small import BACKENDS, block, feature_map, middle

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


def converted() -> nn.Module:
    return vcr_ops.convert(resnet("timm").layer1)[1]


def network(**options: Any) -> vcr_ops.VCRNet:
    return vcr_ops.VCRNet((1, 1, 1, 1), 5, groups=4, **options)


TAKERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "block": (block, 16),
    "converted": (converted, 16),
    "network": (network, 3),
    "pyramid": (lambda: vcr_ops.VCRPyramid((1, 1, 1, 1), groups=4), 3),
}
INPUTS: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
    (lambda x: x.tolist(), TypeError, "x is a list; it takes a tensor"),
    (lambda x: x.int(), TypeError, "x is int32; it takes float32, float64, bfloat16, float16"),
    (lambda x: x.to(torch.complex64), TypeError, "x is complex64; it takes"),
    (lambda x: x.half(), TypeError, "x is float16 on the CPU, where it takes float32, float64 or bfloat16"),
    (lambda x: x.to_sparse(), TypeError, "x has layout torch.sparse_coo; it takes a dense tensor"),
    (lambda x: x.double(), TypeError, "x is float64; beside float32 weights it takes float32"),
    (lambda x: x.bfloat16(), TypeError, "x is bfloat16; beside float32 weights it takes float32"),
    (lambda x: x.to("meta"), ValueError, "x is on meta; it takes the weights' device, cpu"),
    (lambda x: x[:, :2], ValueError, "x has 2 channels, its shape is (2, 2, 8, 8); it takes (N, {channels}, H, W)"),
    (lambda x: x[0], ValueError, "x has 3 dims, ({channels}, 8, 8); it takes (N, {channels}, H, W)"),
    (lambda x: x[..., None], ValueError, "x has 5 dims"),
    (lambda x: x[..., :0], ValueError, "x has no positions: its shape is (2, {channels}, 8, 0); only N may be 0"),
    (lambda x: x.half().to("meta"), ValueError, "x is on meta"),
]


@pytest.mark.parametrize("name", TAKERS)
def test_inputs(name: str) -> None:
    make, channels = TAKERS[name]
    m = make()
    fits = feature_map(2, channels, 8, 8)
    for change, error, message in INPUTS:
        refused(m, change(fits), error, message.format(channels=channels))


def test_inputs_of_other_dims() -> None:
    refused(
        network(ndim=3), feature_map(1, 3, 8, 8), ValueError, "x has 4 dims, (1, 3, 8, 8); it takes (N, 3, T, H, W)"
    )
    refused(vcr_ops.VCRBlock(16, 16, ndim=1), x, ValueError, "it takes (N, 16, L)")
    with pytest.raises(ValueError, match="x is on cpu; it takes the weights' device, meta"):
        block().to("meta")(feature_map(2, 16, 4, 4))


def test_inputs_under_autocast() -> None:
    """Convolutions cast what isn't float64, weights as well as maps."""
    for weights in (torch.float32, torch.bfloat16):
        b = block().to(weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for dtype in (torch.float32, torch.bfloat16):
                assert b(feature_map(2, 16, 4, 4).to(dtype)).shape == (2, 16, 4, 4)
            refused(b, feature_map(2, 16, 4, 4).double(), TypeError, "x is float64; beside")
            refused(b, feature_map(2, 16, 4, 4).int(), TypeError, "x is int32; it takes")


def test_inputs_that_others_see_first() -> None:
    """What a hook or another module makes of x is theirs to know, as are tensors that are no plain ones."""

    class Other(Tensor):
        pass

    images = feature_map(2, 3, 32, 32)
    net = network().eval()
    expected = net(images)
    assert torch.equal(net(images.as_subclass(Other)).as_subclass(Tensor), expected)
    net.conv1.register_forward_pre_hook(lambda m, args: (args[0][:, :3].float(),))
    assert torch.equal(net(torch.cat((images, images), 1).double()), expected)
    net.conv1 = nn.Sequential(nn.Conv2d(1, 64, 1), nn.MaxPool2d(2))
    assert net(images[:, :1]).shape == (2, 5)
    for n in (0, 2):
        batched = torch.vmap(block("composite").eval())(torch.randn(3, n, 16, 4, 4))
        assert batched.shape == (3, n, 16, 4, 4)


def one(stride: int = 1, **options: Any) -> nn.Module:
    return vcr_ops.VCRBlock(16, 16, stride, **({"groups": 4} | options))


SINGLES: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (one, (1, 16, 1, 1), "x has N*S = 1 value per channel at bn1, (1, 16, 1, 1)"),
    (lambda: one(2), (1, 16, 2, 1), "x has N*S = 1 value per channel at bn2, (1, 16, 2, 1)"),
    (lambda: one(4), (1, 16, 4, 4), "x has N*S = 1 value per channel at bn2, (1, 16, 4, 4)"),
    (lambda: one(groups=1, base_width=16), (1, 16, 8, 8), "x has one image of C = 1 concept at reasoner.bn"),
    (converted, (1, 16, 1, 1), "x has N*S = 1 value per channel at bn1"),
    (network, (1, 3, 8, 8), "x has N*S = 1 value per channel at layer2.0.bn2, (1, 3, 8, 8)"),
    (network, (1, 3, 32, 32), "x has N*S = 1 value per channel at layer4.0.bn2"),
    (network, (1, 3, 2, 2), "x has N*S = 1 value per channel at bn1"),
    (lambda: network(output_stride=16), (1, 3, 16, 16), "x has N*S = 1 value per channel at layer3.0.bn2"),
    (lambda: network(output_stride=8), (1, 3, 8, 8), "x has N*S = 1 value per channel at layer2.0.bn2"),
    (TAKERS["pyramid"][0], (1, 3, 8, 8), "x has N*S = 1 value per channel at layer2.0.bn2"),
    (
        lambda: vcr_ops.VCRNet((1, 1, 1, 1), groups=1),
        (1, 3, 64, 64),
        "x has one image of C = 1 concept at layer1.0.reasoner.bn, (1, 3, 64, 64)",
    ),
]


@pytest.mark.parametrize("make, shape, message", SINGLES)
def test_one_value_per_channel_of_inputs(make: Callable[[], nn.Module], shape: tuple[int, ...], message: str) -> None:
    m, images = make(), feature_map(*shape)
    refused(m, images, ValueError, f"Expected more than 1 value per channel when training: {message}")
    m.eval()(images)


def test_one_value_per_channel_that_is_enough() -> None:
    """Other norms, frozen ones, stages that don't run, more images: no error where nothing is wrong."""
    one(2)(feature_map(1, 16, 3, 1))
    one(2)(feature_map(2, 16, 1, 1))
    one(2)(feature_map(0, 16, 1, 1))
    one(norm_layer=lambda channels: nn.GroupNorm(1, channels))(feature_map(1, 16, 1, 1))
    b = one()
    for norm in (b.bn1, b.bn2, b.bn3, b.downsample[1]):
        norm.eval()
    b(feature_map(1, 16, 1, 1))
    b.downsample[1].train()
    refused(b, feature_map(1, 16, 1, 1), ValueError, "at downsample.1")
    net = network()
    net(feature_map(1, 3, 33, 32))
    net.forward_intermediates(feature_map(1, 3, 8, 8), [1], stop_early=True)
    vcr_ops.VCRPyramid((1, 1, 1, 1), (0, 1), groups=4)(feature_map(1, 3, 8, 8))
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    net(feature_map(1, 3, 16, 9))
    refused(net, feature_map(1, 3, 8, 8), ValueError, "at layer4.0.bn2")


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
    ({"ndim": [2]}, ValueError, "ndim is [2]; it takes 1, 2 or 3"),
    ({"ndim": True}, ValueError, "ndim is True; it takes 1, 2 or 3"),
    ({"norm_layer": nn.BatchNorm2d(4)}, TypeError, "norm_layer is a BatchNorm2d; it takes a class or function"),
    ({"norm_layer": "batch"}, TypeError, "norm_layer is a str; it takes a class or function"),
]


@pytest.mark.parametrize("change, error, message", ARGUMENTS)
def test_constructors(change: Change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        vcr_ops.VisualConceptReasoning(**({"channels": 12, "concepts": 3} | change))
    change = {name: value for name, value in change.items() if name not in ("channels", "concepts")}
    if change:
        with pytest.raises(error, match=re.escape(message)):
            vcr_ops.VCRBlock(64, 64, **change)


BLOCK_ARGUMENTS: list[tuple[Change, type[Exception], str]] = [
    ({"stride": 0}, ValueError, "stride is 0; it takes at least 1"),
    ({"stride": "1"}, TypeError, "stride is '1'; it takes an int"),
    ({"stride": (1, 2)}, TypeError, "stride is (1, 2); it takes an int"),
    ({"dilation": 0}, ValueError, "dilation is 0; it takes at least 1"),
    ({"dilation": 1.0}, TypeError, "dilation is 1.0; it takes an int"),
    ({"base_width": "4"}, TypeError, "base_width is '4'; it takes an int"),
    ({"base_width": 0}, ValueError, "base_width is 0; it takes at least 1"),
    ({"downsample": "x"}, TypeError, "downsample is 'x'; it takes an nn.Module or None"),
    ({"downsample": nn.Identity}, TypeError, "downsample is <class"),
]
NETWORK_ARGUMENTS: list[tuple[Change, type[Exception], str]] = [
    ({"width_per_group": "4"}, TypeError, "width_per_group is '4'; it takes an int"),
    ({"output_stride": [32]}, TypeError, "output_stride is [32]; it takes an int"),
    ({"output_stride": 32.0}, TypeError, "output_stride is 32.0; it takes an int"),
    ({"norm_layer": nn.BatchNorm2d(4)}, TypeError, "norm_layer is a BatchNorm2d; it takes a class or function"),
    *(
        (
            {"replace_stride_with_dilation": got},
            TypeError,
            f"replace_stride_with_dilation is {got!r}; it takes None or three booleans",
        )
        for got in (3, "abc", (1, 0, 0), {True, False})
    ),
]


@pytest.mark.parametrize("change, error, message", BLOCK_ARGUMENTS)
def test_block_arguments(change: Change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        vcr_ops.VCRBlock(64, 64, **change)


@pytest.mark.parametrize("change, error, message", NETWORK_ARGUMENTS)
def test_network_arguments(change: Change, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        network(**change)


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
