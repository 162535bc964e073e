"""explain says which backend runs and why, and what its passes move; the environment report says what is there."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import vcr_ops
from tests.small import BACKENDS, block, feature_map, middle
from vcr_ops import backend as backends
from vcr_ops import cuda_plan, library
from vcr_ops.backend import Case
from vcr_ops.faster import Size, size_of


@pytest.mark.parametrize("modulation, sampler", [("channel", "dynamic"), ("pixel", "static"), ("channel", "pool")])
def test_the_fewest_passes(modulation: str, sampler: str) -> None:
    """3 reads and 1 write forward, 4 and 1 backward, at most 2 and 1 in evaluation."""
    m = middle("cpp", modulation=modulation, sampler=sampler)
    found = vcr_ops.explain(m, feature_map(2, 12, 4, 5))
    assert [(step.name, step.reads, step.writes) for step in found.steps] == [
        ("training forward", 3, 1),
        ("training backward", 4, 1),
        ("evaluation", 2, 1),
    ]
    assert found.map_bytes == 2 * 12 * 20 * 4
    assert found.bytes("training backward") == 5 * found.map_bytes
    assert found.copies == ()


def test_triton_s_passes_need_no_gpu() -> None:
    """By the sizes: a query that is made of the mean of an image that fits no tile reads it twice."""
    m = middle("triton")
    for size, reads in ((56, 2), (90, 3)):
        found = vcr_ops.explain(m, feature_map(1, 12, size, size))
        assert found.why_not is not None
        assert (found.step("evaluation").reads, found.step("evaluation").writes) == (reads, 1)
        assert (found.step("training forward").reads, found.step("training backward").reads) == (3, 4)
        assert any("again" in note for note in found.notes) == (reads == 3)
    assert vcr_ops.explain(middle("triton", sampler="static"), feature_map(1, 12, 90, 90)).step("evaluation").reads == 2


def test_text() -> None:
    text = str(vcr_ops.explain(middle("auto"), feature_map(2, 12, 4, 5)))
    assert "VisualConceptReasoning: the middle, on a map (2, 12, 4, 5) float32 contiguous" in text
    assert "backend   cpp: auto takes it for CPU tensors" in text
    assert "one op: batch norm, sampler, reasoner and modulator" in text
    assert re.search(r"training forward +3 +1 ", text)
    assert f"instruction set: {library.active_isa()}" in text
    with vcr_ops.use_backend("composite"):
        assert "backend   composite: use_backend names it" in str(
            vcr_ops.explain(middle("auto"), feature_map(2, 12, 4, 5))
        )


def test_cuda_kernels() -> None:
    found = vcr_ops.explain(middle("cuda", sampler="pool"), feature_map(2, 12, 4, 5))
    assert [each.name for each in found.step("training forward").passes] == ["channel_stats", "concept_modulate"]
    # a map so small fits on any GPU
    assert [(each.name, each.reads, each.writes) for each in found.step("evaluation").passes] == [
        ("middle_evaluate", 1, 1)
    ]
    assert re.search(r"evaluation +1 +1 ", str(found))
    assert "where an image's tiles fit on chip" not in str(found)


@pytest.mark.parametrize("sampler, reads", [("dynamic", 3), ("pool", 2)])
def test_cuda_kernels_on_a_map_that_fits_no_chip(sampler: str, reads: int) -> None:
    """By the sizes: then the sampler needs the images' means first, and the modulator reads again."""
    m, y = middle("cuda", sampler=sampler), feature_map(1, 12, 300, 300)
    found = vcr_ops.explain(m, y)
    assert (found.step("evaluation").reads, found.step("evaluation").writes) == (reads, 1)
    assert found.step("training forward").reads == (3 if sampler == "dynamic" else 2)
    assert "evaluation is one launch of 1 read and 1 write where an image's tiles fit on chip" in found.notes
    m.bn = vcr_ops.FrozenBatchNorm(12)
    assert vcr_ops.explain(m, y).step("training forward").reads == reads


def test_cuda_kernels_by_the_gpu_that_is_here(as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """56 x 56 with messages between 32 concepts: a cluster has room for an image, a block has not."""
    m, features = middle("cuda", channels=128, concepts=32), feature_map(16, 128, 56, 56)
    h100, a100 = cuda_plan.Device(227 << 10, 132, True, 50 << 20), cuda_plan.Device(163 << 10, 108)
    for device, y, reads in ((h100, features, 1), (a100, features.bfloat16(), 2), (a100, features, 3)):
        monkeypatch.setattr(cuda_plan, "device_of", lambda number, device=device: device)
        found = vcr_ops.explain(m, y)
        assert found.why_not is None
        assert (found.step("evaluation").reads, found.step("evaluation").writes) == (reads, 1)
        assert found.bytes("evaluation") == (reads + 1) * found.map_bytes


def test_it_runs_nothing_and_moves_nothing() -> None:
    for backend in BACKENDS:
        b = block(backend)
        before = {name: x.clone() for name, x in b.state_dict().items()}
        vcr_ops.explain(b, feature_map(2, 16, 6, 6))
        assert all(torch.equal(x, before[name]) for name, x in b.state_dict().items())
        assert all(p.grad is None for p in b.parameters())


def test_the_block_s_map() -> None:
    b = vcr_ops.VCRBlock(16, 4, stride=2, groups=3, base_width=80)
    x = feature_map(2, 16, 7, 6)
    found = vcr_ops.explain(b, x)
    assert (found.shape, found.map_format, found.dtype) == ((2, 15, 4, 3), "contiguous", torch.float32)
    assert vcr_ops.explain(b, x.to(memory_format=torch.channels_last)).map_format == "channels_last"
    with torch.autocast("cpu"):
        assert vcr_ops.explain(b, x).dtype == torch.bfloat16


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """explain takes CPU tensors for a GPU's, fake ones for fake ones, and CUDA C++ for the faster at 15 channels."""

    def case_of(z: torch.Tensor) -> Case:
        fake = isinstance(z, FakeTensor)
        return Case("cuda", fake=fake, size=None if fake else size_of(z, torch.is_grad_enabled()))

    monkeypatch.setattr(sys.modules["vcr_ops.explain"], "case_of", case_of)
    monkeypatch.setattr(backends, "arch_of", lambda number: "sm_90")
    monkeypatch.setattr(library, "_cuda_problem", None)
    monkeypatch.setattr(backends, "_built_for", {0: None})
    monkeypatch.setattr(backends, "_checked", {("cuda", 0): "Triton isn't installed"})
    monkeypatch.setattr(cuda_plan, "device_of", lambda number: cuda_plan.Device())
    taken = {12: None, 15: "cuda", 18: "triton"}

    def faster(arch: str, size: Size) -> str | None:
        return taken[size.channels] if size.mode == "training" else "triton"

    monkeypatch.setattr(backends, "faster", faster)


@pytest.mark.parametrize("planes, base_width", [(4, 64), (4, 80), (4, 96)])
def test_a_block_is_told_the_backend_of_its_map(as_if_on_a_gpu: None, planes: int, base_width: int) -> None:
    """By its convolutions' shape and strides: the same as is told of the map itself."""
    b = vcr_ops.VCRBlock(16, planes, stride=2, groups=3, base_width=base_width)
    m = vcr_ops.VisualConceptReasoning(3 * base_width // 16, 3)
    for form in (torch.contiguous_format, torch.channels_last):
        x = feature_map(2, 16, 7, 6).contiguous(memory_format=form)
        y = feature_map(2, 3 * base_width // 16, 4, 3).contiguous(memory_format=form)
        of_the_map, said = vcr_ops.explain(m, y), vcr_ops.explain(b, x)
        assert (said.shape, said.map_format) == (of_the_map.shape, of_the_map.map_format)
        assert (said.backend, said.reason, said.why_not) == (of_the_map.backend, of_the_map.reason, of_the_map.why_not)
        assert said.backend == ("cuda" if base_width == 80 else "triton")
        assert said.why_not == (None if base_width == 80 else "Triton isn't installed")
        assert ("no other was measured at such sizes" in said.reason) == (base_width == 64)
        note = "grad mode decides: in evaluation it is triton, whose passes are not these"
        assert (note in said.notes) == (base_width == 80)
        with torch.no_grad():
            said = vcr_ops.explain(b, x)
        assert said.backend == "triton"
        assert (note.replace("evaluation it is triton", "training it is cuda") in said.notes) == (base_width == 80)


@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_and_copies(backend: str) -> None:
    m, y = middle(backend), feature_map(2, 12, 4, 10)
    assert vcr_ops.explain(m, y[..., ::2]).copies == (
        "the map's strides fit neither memory format: one dense copy, forward and backward",
    )
    handle = m.reasoner.register_forward_hook(lambda *_: None)
    found = vcr_ops.explain(m, y)
    assert found.path == "modules"
    assert "each module is called" in str(found)
    handle.remove()
    m.bn = nn.GroupNorm(3, 12)
    found = vcr_ops.explain(m, y)
    assert found.path == "after norm"
    assert "the norm's own passes are not counted" in found.notes


def test_composite_is_counted() -> None:
    found = vcr_ops.explain(middle("composite"), feature_map(4, 12, 8, 8))
    ours = vcr_ops.explain(middle("cpp"), feature_map(4, 12, 8, 8))
    for step in ("training forward", "training backward", "evaluation"):
        assert found.bytes(step) > ours.bytes(step)
        assert found.step(step).flops == ours.step(step).flops


def test_a_backend_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("nowhere.so"))
    found = vcr_ops.explain(middle("cpp"), feature_map(2, 12, 4, 5))
    assert found.why_not is not None
    assert "can't run here: the C++ ops aren't built" in str(found)


def test_errors() -> None:
    with pytest.raises(TypeError, match="module is a ReLU; explain takes a VCRBlock or a VisualConceptReasoning"):
        vcr_ops.explain(nn.ReLU(), feature_map(2, 12, 4, 5))
    with pytest.raises(ValueError, match="x has 2 dims"):
        vcr_ops.explain(middle(), torch.rand(2, 12))
    with pytest.raises(ValueError, match=r"y has 10 channels, which sampler.value's 3 concepts don't divide"):
        vcr_ops.explain(middle(), torch.rand(2, 10, 3, 3))


def test_environment_report() -> None:
    found = subprocess.run([sys.executable, "-m", "vcr_ops"], capture_output=True, text=True, timeout=100, check=True)
    rows = dict(line.split("  ", 1) for line in found.stdout.splitlines())
    assert rows["torch"].strip().startswith(torch.__version__)
    assert rows["instruction set"].strip().startswith(library.active_isa())
    assert rows["auto on cpu"].strip() == "cpp"
    assert rows["composite on cpu"].strip().startswith("can run")
