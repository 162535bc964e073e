"""ResNeXt checkpoints of torchvision's and timm's layout load whole or not at all, and compute what they did."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vcr_ops
from tests.packages import imported
from tests.resnexts import resnet
from tests.small import enliven, feature_map


def layout(layers: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000, width: int = 4) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published ResNeXt, written out from the description of the network."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, n: int) -> None:
        shapes.update({f"{name}.{x}": (n,) for x in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    inplanes = 64
    for stage, blocks in enumerate(layers):
        p = width * 2**stage
        outplanes = 256 * 2**stage
        for index in range(blocks):
            at = f"layer{stage + 1}.{index}"
            shapes[f"{at}.conv1.weight"] = (32 * p, inplanes, 1, 1)
            norm(f"{at}.bn1", 32 * p)
            shapes[f"{at}.conv2.weight"] = (32 * p, p, 3, 3)
            norm(f"{at}.bn2", 32 * p)
            shapes[f"{at}.conv3.weight"] = (outplanes, 32 * p, 1, 1)
            norm(f"{at}.bn3", outplanes)
            if not index:
                shapes[f"{at}.downsample.0.weight"] = (outplanes, inplanes, 1, 1)
                norm(f"{at}.downsample.1", outplanes)
            inplanes = outplanes
    shapes["fc.weight"], shapes["fc.bias"] = (classes, inplanes), (classes,)
    return shapes


def state(classes: int = 5, **options: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(7)
        for name, shape in layout(classes=classes, **options).items()
    }


class Small(vcr_ops.VCRNet):
    """One block per stage and few channels, so that reading and writing take no time."""

    def __init__(self, classes: int = 5, **options: Any) -> None:
        super().__init__((1, 1, 1, 1), classes, width_per_group=1, groups=64, **{"zero_init": True} | options)


def small_state(classes: int = 5) -> dict[str, Tensor]:
    net = Small(classes)
    enliven(net)
    return {name: x for name, x in net.state_dict().items() if not is_new(name)}


def is_new(name: str) -> bool:
    return any(f".{part}." in name for part in ("sampler", "reasoner", "modulator"))


def assert_holds(net: nn.Module, expected: dict[str, Tensor]) -> None:
    found = net.state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("depth", [50, 101])
def test_published_layouts(depth: int, tmp_path: Path) -> None:
    """A file of the published names and shapes loads into vcrnet50 and vcrnet101; VCR's own keys stay."""
    make, layers = {50: (vcr_ops.vcrnet50, (3, 4, 6, 3)), 101: (vcr_ops.vcrnet101, (3, 4, 23, 3))}[depth]
    published = state(layers=layers)
    assert sum(x.numel() for x in state(1000, layers=layers).values() if x.is_floating_point()) > 25e6
    torch.save(published, tmp_path / "resnext.pth")
    net = make(5, zero_init=True)
    before = {name: x.clone() for name, x in net.state_dict().items() if is_new(name)}
    assert vcr_ops.load_resnext(net, tmp_path / "resnext.pth") is net
    assert_holds(net, published | before)
    assert len(published) + len(before) == len(net.state_dict())


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_packages_own_files(package: str, tmp_path: Path) -> None:
    """The layout above is theirs, and the loaded network computes what theirs does."""
    found: Any = imported(package)
    theirs = found.create_model if package == "timm" else lambda name, **k: getattr(found.models, name)(**k)
    for name, layers in (("resnext50_32x4d", (3, 4, 6, 3)), ("resnext101_32x4d", (3, 4, 23, 3))):
        if package == "torchvision" and "101" in name:
            continue  # it has 32x8d and 64x4d alone
        with torch.device("meta"):
            shapes = {key: tuple(x.shape) for key, x in theirs(name).state_dict().items()}
        assert shapes == layout(layers)
    parent = theirs("resnext50_32x4d", num_classes=5).eval()
    torch.save(parent.state_dict(), tmp_path / "f.pth")
    net = vcr_ops.load_resnext(vcr_ops.vcrnet50(5, zero_init=True), tmp_path / "f.pth").eval()
    x = feature_map(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), parent(x))


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda s: s,
    "DistributedDataParallel": lambda s: {f"module.{k}": x for k, x in s.items()},
    "compiled": lambda s: {f"_orig_mod.module.{k}": x for k, x in s.items()},
    "training script": lambda s: {"epoch": 3, "arch": "resnext50", "state_dict": s},
    "averaged": lambda s: {"state_dict": {}, "state_dict_ema": {f"module.{k}": x for k, x in s.items()}},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    "without counters": lambda s: {k: x for k, x in s.items() if "num_batches" not in k},
    "half": lambda s: {k: x.half().float() for k, x in s.items()},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrapped(how: str, tmp_path: Path) -> None:
    published = small_state()
    torch.save(WRAPPED[how](published), tmp_path / "f.pt")
    for source in (tmp_path / "f.pt", str(tmp_path / "f.pt"), WRAPPED[how](published)):
        net = vcr_ops.load_resnext(Small(), source)
        if how == "half":
            published = {k: x.half().to(x.dtype) for k, x in published.items()}
        assert_holds(net, {k: x for k, x in published.items() if how != "without counters" or "num_batches" not in k})


def test_types_and_formats_stay() -> None:
    net = Small().bfloat16().to(memory_format=torch.channels_last)
    published = small_state()
    vcr_ops.load_resnext(net, published)
    assert_holds(net, {name: x.bfloat16() if x.is_floating_point() else x for name, x in published.items()})
    assert net.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_safetensors(tmp_path: Path) -> None:
    torch_format = pytest.importorskip(
        "safetensors.torch", reason="needs safetensors, which the library itself doesn't"
    )
    published = small_state()
    torch_format.save_file(published, tmp_path / "f.safetensors")
    assert_holds(vcr_ops.load_resnext(Small(), tmp_path / "f.safetensors"), published)
    (tmp_path / "g.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"g\.safetensors can't be read as safetensors"):
        vcr_ops.load_resnext(Small(), tmp_path / "g.safetensors")
    with pytest.raises(FileNotFoundError):
        vcr_ops.load_resnext(Small(), tmp_path / "h.safetensors")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        vcr_ops.load_resnext(Small(), tmp_path / "f.safetensors")


def test_checkpoints_of_a_vcrnet() -> None:
    """What is VCR's alone is loaded where a file has it, and then all of it is required."""
    theirs = enliven(Small(zero_init=False))
    net = vcr_ops.load_resnext(Small(zero_init=False), theirs.state_dict())
    assert_holds(net, theirs.state_dict())
    partly = theirs.state_dict()
    gone = [name for name in partly if name.startswith("layer2.0.sampler.")]
    for name in gone:
        del partly[name]
    with pytest.raises(ValueError, match=r"missing: layer2\.0\.sampler\.value") as error:
        vcr_ops.load_resnext(Small(), partly)
    assert str(error.value).count("missing: ") == len(gone) == 3


def test_converted_networks() -> None:
    parent = resnet("torchvision")
    net = vcr_ops.load_resnext(vcr_ops.convert(resnet("torchvision")), parent.state_dict()).eval()
    x = feature_map(2, 3, 32, 24)
    torch.testing.assert_close(net(x), parent.eval()(x))


def assert_unchanged(net: nn.Module, source: Any, text: str, kind: type[Exception] = ValueError, **options: Any) -> str:
    before = {name: x.clone() for name, x in net.state_dict().items()}
    with pytest.raises(kind, match=text) as error:
        vcr_ops.load_resnext(net, source, **options)
    assert_holds(net, before)
    return str(error.value)


def test_all_that_is_wrong_is_listed() -> None:
    published = small_state(classes=7)
    del published["conv1.weight"], published["layer3.0.bn2.running_var"]
    published["layer1.0.se.fc1.weight"] = torch.ones(3)
    published["layer9.0.conv1.weight"] = torch.ones(3)
    published["layer2.0.conv2.weight"] = torch.ones(64, 2, 3, 3)
    text = assert_unchanged(Small(), published, "the state dict doesn't fit the model; head=False leaves fc out")
    assert text.splitlines()[1:] == [
        "  missing: conv1.weight",
        "  missing: layer3.0.bn2.running_var",
        "  unknown: layer1.0.se.fc1.weight",
        "  unknown: layer9.0.conv1.weight",
        "  shape of layer2.0.conv2.weight: (64, 2, 3, 3), the model has (128, 2, 3, 3)",
        "  shape of fc.weight: (7, 2048), the model has (5, 2048)",
        "  shape of fc.bias: (7,), the model has (5,)",
    ]
    published = small_state()
    published["bn1.weight"] = torch.ones(3)
    assert "head" not in assert_unchanged(Small(), published, r"shape of bn1\.weight")


def test_entries_that_can_t_be_copied_are_listed() -> None:
    """One after the other they would leave the model half loaded, and some would load without what they are."""
    published = small_state()
    del published["conv1.weight"]
    # The last entries, so that what comes before them would have been copied.
    wrong = {
        "layer4.0.bn2.weight": torch.empty_like(published["layer4.0.bn2.weight"], device="meta"),
        "layer4.0.bn2.num_batches_tracked": torch.tensor(2.5),
        "layer4.0.conv3.weight": published["layer4.0.conv3.weight"].to_sparse(),
        "layer4.0.bn3.weight": published["layer4.0.bn3.weight"].to(torch.complex64),
        "layer4.0.bn3.bias": published["layer4.0.bn3.bias"].bool(),
        "layer4.0.bn3.running_mean": [0.0],
        "layer4.0.bn3.running_var": published["layer4.0.bn3.running_var"].int(),
        "layer4.0.bn3.num_batches_tracked": torch.tensor(True),
        "fc.weight": torch.ones(3, 3).to_sparse(),
    }
    text = assert_unchanged(Small(), published | wrong, "the state dict doesn't fit the model")
    assert text.splitlines()[1:] == [
        "  missing: conv1.weight",
        "  kind of layer4.0.bn2.weight: a tensor on the meta device, which has no numbers",
        "  kind of layer4.0.bn2.num_batches_tracked: float32, the model has whole numbers",
        "  kind of layer4.0.conv3.weight: a tensor of layout torch.sparse_coo, no dense one",
        "  kind of layer4.0.bn3.weight: complex64, the model has floating point",
        "  kind of layer4.0.bn3.bias: bool, the model has floating point",
        "  kind of layer4.0.bn3.running_mean: a list, no tensor",
        "  kind of layer4.0.bn3.running_var: int32, the model has floating point",
        "  kind of layer4.0.bn3.num_batches_tracked: bool, the model has whole numbers",
        "  kind of fc.weight: a tensor of layout torch.sparse_coo, no dense one",
        "  shape of fc.weight: (3, 3), the model has (5, 2048)",
    ]
    assert_unchanged(Small(), small_state() | {"epoch": 3}, "unknown: epoch")
    assert_unchanged(Small(), 3, "source is a int; it takes a path or a state dict", TypeError)


def test_head() -> None:
    published = small_state(classes=7)
    net = Small()
    fc = net.fc.weight.detach().clone()
    vcr_ops.load_resnext(net, published, head=False)
    del published["fc.weight"], published["fc.bias"]
    assert_holds(net, published)
    assert torch.equal(net.fc.weight, fc)
    vcr_ops.load_resnext(net, published, head=False)
    assert_unchanged(net, published, r"missing: fc\.weight\n  missing: fc\.bias")


def test_deeper_files_don_t_load() -> None:
    text = assert_unchanged(
        vcr_ops.vcrnet50(5, zero_init=True), state(layers=(3, 4, 23, 3)), "unknown: layer3.22.bn3.num_batches_tracked"
    )
    assert text.count("unknown: layer3.") == 17 * 18


def test_a_network_that_would_not_start_as_the_file_s() -> None:
    text = assert_unchanged(Small(zero_init=False), small_state(), "make the model with zero_init=True")
    assert "layer1.0.modulator and 3 more are not neutral" in text


class _Harmful:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a file ran code",))


def test_files_that_can_t_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>404</html>")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04")
    torch.save(small_state() | {"fc.bias": _Harmful()}, tmp_path / "harmful.pth")
    net = Small()
    for name in ("empty", "text", "cut", "harmful"):
        text = assert_unchanged(net, tmp_path / f"{name}.pth", rf"{name}\.pth can't be read as weights alone")
        assert "weights_only=False" not in text
    assert_unchanged(net, tmp_path / "none.pth", re.escape("none.pth"), FileNotFoundError)
    for name in ("folder.pth", "folder.safetensors"):
        (tmp_path / name).mkdir()
        assert_unchanged(net, tmp_path / name, rf"{re.escape(name)} can't be read: Is a directory")
    assert_unchanged(net, tmp_path / "empty.pth" / "x.pth", r"x\.pth can't be read: Not a directory")


@pytest.mark.parametrize(
    "found,text",
    [
        (torch.ones(3), "holds a Tensor; it takes a state dict"),
        ({}, "it is empty"),
        ({"epoch": 3}, "no state dict .epoch: no tensor"),
        ({3: torch.ones(3)}, "no state dict .3: no tensor"),
    ],
)
def test_no_state_dict(found: Any, text: str, tmp_path: Path) -> None:
    torch.save(found, tmp_path / "f.pth")
    assert_unchanged(Small(), tmp_path / "f.pth", text, TypeError)


def test_models_that_nothing_can_be_loaded_into() -> None:
    with pytest.raises(ValueError, match="has no VCRBlock"):
        vcr_ops.load_resnext(resnet("timm"), small_state())
    with pytest.raises(TypeError, match="model is a str"):
        vcr_ops.load_resnext("vcrnet50", small_state())
    with torch.device("meta"):
        net = Small()
    with pytest.raises(ValueError, match="on the meta device"):
        vcr_ops.load_resnext(net, small_state())
