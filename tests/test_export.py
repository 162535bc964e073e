"""torch.export with a dynamic batch, and AOTInductor from it, give eager mode's values."""

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


def test_onnx_export_takes_the_composite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = exported(middle("auto").eval(), 3, 12, 4, 5)
    assert "vcr_ops" not in program.graph_module.code
    with pytest.raises(RuntimeError, match=r"ONNX export can't look into the C\+\+ ops; use backend='composite'"):
        exported(middle("cpp").eval(), 3, 12, 4, 5)


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
