"""The pictures of concepts: the command on real images with a small network's checkpoint, and its errors."""

import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import photographs
from vcr_ops import VCRNet, inspect
from vcr_ops.viz import draw, figures
from vcr_ops.viz.__main__ import main
from vcr_ops.viz.network import load_network

NAMES = ("chelsea", "coffee")


def network(**options: str) -> VCRNet:
    torch.manual_seed(0)
    return VCRNet((1, 1, 2, 1), 5, groups=4, **options).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        Image.fromarray(photographs()[name]).save(folder / f"{name}.png")
    torch.save(network().state_dict(), folder / "network.pth")
    (folder / "no-image.png").write_text("no image")
    return folder


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.places: list[str] = []
        self.others: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            assert found["alt"]
            self.pictures.append(str(found["src"]))
        elif tag == "a":
            self.links.append(str(found["href"]))
        elif "src" in found or "href" in found:
            self.others.append(tag)
        if "id" in found:
            self.places.append(str(found["id"]))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_command(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "pictures"
    images = [str(files / f"{name}.png") for name in NAMES]
    assert main([*images, "--checkpoint", str(files / "network.pth"), "--out", str(out), "--size", "64"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    page = Page((out / "index.html").read_text(encoding="utf-8"))
    assert page.links == [f"#{place}" for place in page.places]
    assert page.places == ["block-layer1-0", "block-layer2-0", "block-layer3-1", "block-layer4-0"]
    assert page.others == []
    assert len(page.pictures) == 4 * (len(NAMES) + 3)  # attention, edges, states before and after
    assert {*page.pictures, "index.html"} == {file.name for file in out.iterdir()}
    for file in page.pictures:
        picture = np.asarray(Image.open(out / file).convert("L"))
        assert picture.std() > 1  # not blank
    assert [file.name for file in out.parent.iterdir()] == ["pictures"]


VARIANTS = [
    {"sampler": sampler, "edges": edges, "affine": affine}
    for sampler, edges, affine in itertools.product(
        ("dynamic", "static", "pool"), ("dynamic", "static", "none"), ("both", "scale", "shift")
    )
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options.values()))
def test_a_checkpoint_tells_the_network(options: dict[str, str], tmp_path: Path) -> None:
    torch.save({"state_dict": network(**options).state_dict()}, tmp_path / "x.pth")
    loaded = load_network(tmp_path / "x.pth", "channel", "auto")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), network(**options)(x))


@pytest.mark.parametrize(
    "images, checkpoint, more, message",
    [
        ("absent.png", "network.pth", [], "there is no image .*absent.png"),
        ("no-image.png", "network.pth", [], "no-image.png can't be read"),
        ("chelsea.png", "absent.pth", [], "absent.pth"),
        ("chelsea.png", "no-image.png", [], "can't be read as weights alone"),
        ("chelsea.png", "resnext.pth", [], "is no VCRNet's checkpoint: it has no layer1.0.sampler.value"),
        (
            "chelsea.png",
            "broken.pth",
            [],
            r"missing: layer2.0.conv1.w.*unknown: more\n.*shape of layer3.0.bn1.b",
        ),
        ("chelsea.png", "network.pth", ["--blocks", "layer9.0"], "'layer9.0', which is no block"),
        ("chelsea.png", "network.pth", ["--size", "8"], "--size is 8"),
        ("chelsea.png", "network.pth", ["--std", "1", "0", "1"], "--std is"),
        ("chelsea.png", "network.pth", ["--std", "1", "nan", "1"], "--std is .*nan.*; it takes positive, finite"),
        ("chelsea.png", "network.pth", ["--mean", "nan", "0", "1"], "--mean is .*nan.*; it takes finite numbers"),
        ("chelsea.png", "network.pth", ["--device", "cuda:99"], "--device is 'cuda:99', which can't be used here: ."),
        ("chelsea.png", "network.pth", ["--device", "gpu"], "--device is 'gpu', which can't be used here: ."),
        ("chelsea.png", "network.pth", ["--device", "meta"], "--device is 'meta', where nothing is computed"),
        ("chelsea.png", ".", [], "can't be read: Is a directory"),
        (
            "chelsea.png",
            "dims.pth",
            [],
            r"is no VCRNet's checkpoint: fc.weight has shape \(\); .*; conv1.weight has shape \(3,\); .*; "
            r"layer1.0.sampler.value has shape \(4,\); a VCRNet's has 3 dims.*; layer1.0.reasoner.edge has shape \(\)",
        ),
        ("chelsea.png", "scalar.pth", [], r"layer1.0.sampler.value has shape \(\); a VCRNet's has 3 dims"),
        ("chelsea.png", "numbers.pth", [], "fc.weight is a float, no tensor"),
    ],
)
def test_errors(
    images: str,
    checkpoint: str,
    more: list[str],
    message: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = network().state_dict()
    torch.save({key: x for key, x in state.items() if "sampler" not in key}, files / "resnext.pth")
    value, scalar = "layer1.0.sampler.value", torch.tensor(1.0)
    dims = {"fc.weight": scalar, "conv1.weight": torch.ones(3), value: torch.ones(4), "layer1.0.reasoner.edge": scalar}
    torch.save(state | dims, files / "dims.pth")
    torch.save(state | {value: scalar}, files / "scalar.pth")
    torch.save(state | {"fc.weight": 0.5}, files / "numbers.pth")
    state["more"] = state.pop("layer2.0.conv1.weight")
    state["layer3.0.bn1.bias"] = torch.zeros(3)
    torch.save(state, files / "broken.pth")
    out = tmp_path / "out"
    given = [str(files / images), "--checkpoint", str(files / checkpoint), "--out", str(out), "--size", "64", *more]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert not list(tmp_path.iterdir())


def test_an_image_over_pillow_s_limit(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    given = [str(files / "chelsea.png"), "--checkpoint", str(files / "network.pth"), "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert re.search("the image .*chelsea.png has more pixels than Pillow opens", capsys.readouterr().err)


def test_out_is_a_file(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "more" / "out"):
        given = [str(files / "chelsea.png"), "--checkpoint", str(files / "network.pth"), "--out", str(out)]
        assert main(given) == 2
        assert f"--out is {out}; it takes a folder, and {file} is a file" in capsys.readouterr().err
    seen = inspect(network(), torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="a file; it takes a folder"):
        draw(seen, [np.zeros((32, 32, 3), np.uint8)], ["a"], file)
    assert file.read_text() == "kept"
    assert [*tmp_path.iterdir()] == [file]


def test_needs_weights(files: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(files / "chelsea.png"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2


def test_missing_packages(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "vcr_ops.viz.figures", raising=False)
    monkeypatch.delattr("vcr_ops.viz.figures", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    given = [str(files / "chelsea.png"), "--random-weights", "vcrnet50", "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert "pip install 'vcr-ops[viz]'" in capsys.readouterr().err


def test_draw_errors(tmp_path: Path) -> None:
    seen = inspect(network(), torch.randn(2, 3, 32, 32))
    picture = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="seen is empty"):
        draw({}, [picture], ["a"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"1 images, 1 names, 2 attention maps of 'layer1\.0'"):
        draw(seen, [picture], ["a"], tmp_path / "out")
    video = VCRNet((1, 1, 1, 1), 5, groups=4, ndim=3).eval()
    with pytest.raises(ValueError, match="3 spatial dims; it takes 2"):
        draw(inspect(video, torch.randn(1, 3, 2, 32, 32)), [picture], ["a"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("states", [torch.rand(3, 4), torch.ones(9, 4), torch.zeros(0, 4)], ids=["few", "same", "none"])
def test_states_that_cannot_be_laid_out(states: torch.Tensor) -> None:
    message = rf"t-SNE takes at least 4 states that differ; these are {len(states)}, or all the same"
    with pytest.raises(ValueError, match=message):
        figures.embed(states, 0)


def test_blocks_whose_states_cannot_be_laid_out_get_no_picture_of_them(tmp_path: Path) -> None:
    silent = network().requires_grad_(False)
    silent.layer1[0].sampler.value.zero_()  # all its states are zero
    seen = inspect(silent, torch.randn(1, 3, 32, 32))
    draw(seen, [np.zeros((32, 32, 3), np.uint8)], ["a"], tmp_path / "out")
    drawn = {file.name for file in (tmp_path / "out").iterdir()}
    assert "layer2-0-states-sampled.png" in drawn
    assert "layer1-0-states-sampled.png" not in drawn
