"""Proves: the slow-only networks have the structure that the paper's have, and take an image network's weights along:
on equal frames they compute what it computes, but for what convolutions over time see beyond the ends."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import python_ref
import vcr_ops
from tests.small import BACKENDS, enliven, feature_map
from vcr_ops.models.slow_only import make_slow_only

FRAMES = 4


def image_network(**options: Any) -> Any:
    torch.manual_seed(0)
    net = vcr_ops.VCRNet((1, 2, 2, 1), 5, groups=4, width_per_group=1, **options).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.momentum = 1.0
            nn.init.uniform_(m.weight, 0.5, 1.5), nn.init.uniform_(m.bias, -0.5, 0.5)
    net(feature_map(4, 3, 64, 64, seed=7, dtype=torch.float64))  # statistics that fit
    return net.eval()


def video_network(cls: Any = vcr_ops.VCRNet, **options: Any) -> Any:
    given = {"groups": 4, "width_per_group": 1, "ndim": 3, **options}
    if cls is vcr_ops.VCRNet:
        given = {"num_classes": 5, **given}
    return make_slow_only(cls((1, 2, 2, 1), **given)).double().eval()


def assert_near(got: Tensor, wanted: Tensor) -> None:
    """To rounding, on the scale of the largest number."""
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def still(x: Tensor) -> Tensor:
    """A video of equal frames."""
    return x.unsqueeze(2).expand(-1, -1, FRAMES, -1, -1)


def test_structure() -> None:
    """SlowFast's Table 1: 1x7x7 stem without a stride in time, 3x1x1 in the last two stages alone."""
    with torch.device("meta"):
        net = vcr_ops.vcrnet50_slow_only()
    assert (net.fc.out_features, net.ndim) == (400, 3)
    kernels = {name: m.kernel_size[0] for name, m in net.named_modules() if isinstance(m, nn.Conv3d)}
    assert {name for name, k in kernels.items() if k > 1} == {
        f"layer{stage}.{index}.conv1" for stage, count in ((3, 6), (4, 3)) for index in range(count)
    }
    assert all(m.stride[0] == m.dilation[0] == 1 for m in net.modules() if isinstance(m, nn.Conv3d))
    x = torch.empty(1, 3, 5, 64, 96, device="meta")
    assert net.eval().forward_features(x).shape == (1, 2048, 5, 2, 3)
    with torch.device("meta"):
        deep = vcr_ops.vcrnet101_slow_only(7)
    assert (len(deep.layer3), deep.fc.out_features) == (23, 7)


def test_parameters_are_the_paper_s() -> None:
    """Table 4."""
    with torch.device("meta"):
        net = vcr_ops.vcrnet50_slow_only()
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}" == "40.28"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"modulation": "pixel"}, {"sampler": "static", "edges": "static"}, {"sampler": "pool"}, {"output_stride": 8}],
    ids=["default", "pixel", "static", "pool", "dilated"],
)
def test_equal_frames_give_the_image_s_output(options: dict[str, Any], backend: str) -> None:
    """With the kernels' middle frame exactly; with their mean, too, where the ends don't show."""
    image = image_network(backend=backend, **options)
    x = feature_map(2, 3, 64, 64, dtype=torch.float64)
    for inflation in ("centre", "mean"):
        video = vcr_ops.load_inflated(
            video_network(backend=backend, **options), image.state_dict(), inflation=inflation
        )
        if inflation == "mean":
            for m in video.modules():
                if isinstance(m, nn.Conv3d) and m.kernel_size[0] > 1:
                    m.padding_mode = "circular"
                    m._reversed_padding_repeated_twice = [0, 0, 0, 0, 1, 1]
        with torch.no_grad():
            assert_near(video(still(x)), image(x))
            for m, wanted in zip(
                video.forward_intermediates(still(x), intermediates_only=True),
                image.forward_intermediates(x, intermediates_only=True),
                strict=True,
            ):
                assert_near(m, still(wanted))


def test_the_ends_show_where_kernels_see_beyond_them() -> None:
    """Mean inflation: equal up to the second stage; then two thirds of the sum at the first and the last frame."""
    image = image_network()
    video = vcr_ops.load_inflated(video_network(), image.state_dict())
    x = feature_map(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = [
            net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(y))))))
            for net, y in ((image, x), (video, still(x)))
        ]
        assert_near(before[1], still(before[0]))
        first = [net.layer3[0].conv1(y) for net, y in zip((image, video), before, strict=True)]
    wanted = still(first[0]).clone()
    wanted[:, :, [0, -1]] *= 2 / 3
    assert_near(first[1], wanted)


def test_from_a_path_of_a_resnext_and_without_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain: Any = python_ref.ResNet(python_ref.Bottleneck, (1, 2, 2, 1), 5, groups=4, base_width=1)
    plain = enliven(plain).double().eval()
    torch.save({"state_dict": {f"module.{name}": x for name, x in plain.state_dict().items()}}, tmp_path / "net.pth")
    video = video_network(zero_init=True)
    assert vcr_ops.load_inflated(video, tmp_path / "net.pth", inflation="centre") is video
    x = feature_map(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_near(video(still(x)), plain(x))
    classes = video_network(zero_init=True, num_classes=9)
    head = classes.fc.weight.clone()
    vcr_ops.load_inflated(classes, plain.state_dict(), head=False)
    assert torch.equal(classes.fc.weight, head)
    assert torch.equal(classes.layer1[0].conv1.weight[:, :, 0], plain.layer1[0].conv1.weight)
    assert_near(classes.layer4[0].conv1.weight.detach().sum(2), plain.layer4[0].conv1.weight.detach())


def test_inflated_weights_load_as_they_are() -> None:
    first, second = enliven(video_network(), 3), video_network()
    vcr_ops.load_inflated(second, first.state_dict())
    for name, x in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], x), name


def test_pyramid_for_video() -> None:
    net = video_network(vcr_ops.VCRPyramid, out_indices=(1, 4))
    with torch.no_grad():
        maps = net(feature_map(1, 3, FRAMES, 64, 64, dtype=torch.float64))
    assert [tuple(m.shape) for m in maps] == [(1, 256, FRAMES, 16, 16), (1, 2048, FRAMES, 2, 2)]
    assert net.feature_info.reduction() == [4, 32]
    image = image_network().state_dict()
    state = {name: x for name, x in image.items() if not name.startswith("fc.")}
    vcr_ops.load_inflated(net, state)


def test_a_training_step() -> None:
    net = video_network(dropout=0.02, drop_path_rate=0.1).train()
    net(feature_map(2, 3, FRAMES, 32, 32, dtype=torch.float64)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_bad_input() -> None:
    state = image_network().state_dict()
    with pytest.raises(ValueError, match="inflation is 'max'; it takes one of 'mean', 'centre'"):
        vcr_ops.load_inflated(video_network(), state, inflation="max")
    with pytest.raises(ValueError, match="has no convolution over time; load_resnext will do"):
        vcr_ops.load_inflated(image_network(), state)
    with pytest.raises(ValueError, match="ndim is 2; a slow-only network is for video, and takes 3"):
        vcr_ops.vcrnet50_slow_only(ndim=2)
    with pytest.raises(TypeError, match="model is a int"):
        vcr_ops.load_inflated(3, state)  # type: ignore[type-var]
    video = video_network(num_classes=7)
    before = {name: x.clone() for name, x in video.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape("shape of fc.weight: (5, 2048), the model has (7, 2048)")):
        vcr_ops.load_inflated(video, state)
    assert all(torch.equal(x, before[name]) for name, x in video.state_dict().items())
    del state["layer3.0.conv1.weight"]
    with pytest.raises(ValueError, match=r"missing: layer3\.0\.conv1\.weight"):
        vcr_ops.load_inflated(video_network(), state)


# The level of modulation


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_channel_level_network_goes_on_at_pixel_level(backend: str) -> None:
    """As the paper's detectors: the parameters of one level are those of the other."""
    channel = image_network(backend=backend)
    made = image_network(backend=backend, modulation="pixel")
    made.load_state_dict(channel.state_dict())
    x = feature_map(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        wanted, before = made(x), channel(x)
        assert vcr_ops.set_modulation(channel, "pixel") is channel
        assert torch.equal(channel(x), wanted)
        assert not torch.allclose(wanted, before)
        assert torch.equal(vcr_ops.set_modulation(channel, "channel")(x), before)
    middle = vcr_ops.VisualConceptReasoning(12, 3)
    assert vcr_ops.set_modulation(nn.Sequential(middle), "pixel")[0].modulation == "pixel"


def test_levels_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="modulation is 'image'; it takes one of 'channel', 'pixel'"):
        vcr_ops.set_modulation(image_network(), "image")
    with pytest.raises(ValueError, match=r"which sampler='pool' hasn't: layer1\.0, layer2\.0"):
        vcr_ops.set_modulation(image_network(sampler="pool"), "pixel")
    with pytest.raises(ValueError, match="the model, a Linear, has no VCRBlock"):
        vcr_ops.set_modulation(nn.Linear(1, 1), "pixel")
    with pytest.raises(TypeError, match="model is a str"):
        vcr_ops.set_modulation("net", "pixel")  # type: ignore[type-var]
