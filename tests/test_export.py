"""torch.export with a dynamic batch, AOTInductor from it, and ONNX files give eager mode's values."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.small import BACKENDS, VARIANTS, block, feature_map, middle


def exported(module: nn.Module, *shape: int, strict: bool = False) -> Any:
    batch = Dim("batch", min=1, max=64)
    return torch.export.export(module, (feature_map(*shape),), dynamic_shapes=({0: batch},), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation(variant: str, backend: str, strict: bool) -> None:
    m = middle(backend, **VARIANTS[variant]).eval()
    program = exported(m, 3, 12, 4, 5, strict=strict)
    assert ("vcr_ops.vcr_middle" in program.graph_module.code) == (backend == "cpp")
    for n in (1, 2, 7):
        y = feature_map(n, 12, 4, 5, seed=n)
        torch.testing.assert_close(program.module()(y), m(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_loaded(backend: str, tmp_path: Path) -> None:
    m = middle(backend).eval()
    torch.export.save(exported(m, 3, 12, 4, 5), tmp_path / "middle.pt2")
    program = torch.export.load(tmp_path / "middle.pt2")
    y = feature_map(5, 12, 4, 5)
    torch.testing.assert_close(program.module()(y), m(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_mode_moves_the_statistics(backend: str) -> None:
    m = middle(backend)
    program = exported(copy.deepcopy(m), 3, 12, 4, 5).module()
    y = feature_map(5, 12, 4, 5)
    torch.testing.assert_close(program(y), m(y))
    buffers = dict(m.named_buffers())
    for name, b in program.named_buffers():
        torch.testing.assert_close(b, buffers[name])


NOT_BY_NAME = r"ONNX export can't look into the C\+\+ ops; use backend='composite'"


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_onnx_export_takes_the_composite(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which torch.onnx.export(dynamo=True) captures, without the packages that it needs."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = exported(middle("auto").eval(), 3, 12, 4, 5, strict=strict)
    assert "vcr_ops" not in program.graph_module.code
    with pytest.raises(RuntimeError, match=NOT_BY_NAME):
        exported(middle("cpp").eval(), 3, 12, 4, 5, strict=strict)


def to_onnx(module: nn.Module, x: torch.Tensor, path: Path, dynamo: bool) -> None:
    """A real export with a dynamic batch; skips the test where its packages aren't installed."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it; the library itself doesn't")
    if dynamo:
        options: dict[str, Any] = {"dynamic_shapes": ({0: Dim("batch", min=1, max=64)},)}
    else:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(module, (x,), path, dynamo=dynamo, verbose=False, **options)


ONNX_WARNINGS = pytest.mark.filterwarnings("ignore")  # the exporters' own: of age, of what they can't prove


@ONNX_WARNINGS
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_file_has_the_values(dynamo: bool, tmp_path: Path) -> None:
    b = block("auto", modulation="pixel").eval()
    to_onnx(b, feature_map(3, 16, 6, 5), tmp_path / "block.onnx", dynamo)
    run = pytest.importorskip("onnx.reference").ReferenceEvaluator(str(tmp_path / "block.onnx"))
    for n in (1, 3, 5):
        x = feature_map(n, 16, 6, 5, seed=n)
        (out,) = run.run(None, {run.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), b(x).detach(), rtol=1e-5, atol=1e-5)


@ONNX_WARNINGS
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_export_by_name_raises(dynamo: bool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=NOT_BY_NAME):
        to_onnx(middle("cpp").eval(), feature_map(3, 12, 4, 5), tmp_path / "middle.onnx", dynamo)
    assert torch.onnx.is_in_onnx_export() is False
    assert middle("cpp").eval()(feature_map(3, 12, 4, 5)).isfinite().all()  # and what comes after isn't traced


def test_what_is_exported_is_for_inference() -> None:
    program = exported(middle("cpp").eval(), 3, 12, 4, 5).module()
    out = program(feature_map(5, 12, 4, 5).requires_grad_())
    with pytest.raises(RuntimeError, match="vcr_middle was called with save=False"):
        out.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_aotinductor(channels_last: bool, tmp_path: Path) -> None:
    """A package of a block loads and gives the values, for batch sizes that it wasn't made with."""
    b = block("cpp", modulation="pixel" if channels_last else "channel").eval()
    if channels_last:
        b = b.to(memory_format=torch.channels_last)
    path = torch._inductor.aoti_compile_and_package(exported(b, 3, 16, 6, 5), package_path=str(tmp_path / "block.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for n in (2, 5):
        x = feature_map(n, 16, 6, 5, seed=n)
        with torch.no_grad():
            torch.testing.assert_close(run(x), b(x))
