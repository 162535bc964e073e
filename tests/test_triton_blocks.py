"""Any C, p and pt: what doesn't fit a tile is taken block by block. Small limits make small problems take that way."""

import pytest
import torch

from tests.grid import Case
from tests.ops import adapters

CASES = [
    Case("vcr_middle", sampler, edges, modulation, "both", norm, state, dtype="f64", layout=layout, size="N2C3p1S15")
    for sampler, edges, modulation, norm, state, layout in (
        ("dynamic", "dynamic", "pixel", "batch", "batch", "channels_last"),
        ("dynamic", "static", "channel", "given", "given", "contiguous"),
        ("static", "none", "pixel", "none", "given", "contiguous"),
        ("static", "dynamic", "pixel", "given", "batch", "channels_last"),
        ("dynamic", "none", "channel", "none", "given", "channels_last"),
    )
] + [Case("concept_reason", edges="dynamic", state="batch", dtype="f64", layout=None, size="N2C4p3S7")]


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_blocks_are_as_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from vcr_ops.ops.concept_reason import triton as reason
    from vcr_ops.ops.vcr_middle import triton_backward_launches as middle
    from vcr_ops.triton_common import sizes

    monkeypatch.setattr(sizes, "SMALL_TILE", 4)
    monkeypatch.setattr(reason, "SMALL_TILE", 8)
    monkeypatch.setattr(middle, "STATE_SUMS_TILE", 4)
    monkeypatch.setattr(middle, "GRADIENT_TILE", 4)
    monkeypatch.setattr(sizes, "MERGED_TILE", 0)
    monkeypatch.setattr(sizes, "LARGEST_TILE", 4)
    monkeypatch.setattr(sizes, "ONE_TILE", 0)
    adapter = adapters()[case.op]
    inputs, gradients = adapter.draw(case)
    ours = adapter.our_result(inputs, gradients, case, "triton").tensors()
    for name, expected in adapter.our_result(inputs, gradients, case, "composite").tensors().items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )
    with torch.no_grad():
        outputs = adapter.ours(adapter.leaves(inputs, case), case, "triton")
    torch.testing.assert_close(
        outputs, adapter.ours(adapter.leaves(inputs, case), case, "composite"), rtol=1e-10, atol=1e-12
    )


@pytest.mark.triton
@pytest.mark.parametrize("edges, channels_last", [("dynamic", True), ("static", False)])
def test_states_of_several_images_in_a_row(edges: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches: a program reasons for several images, the last one for fewer; so do those that sum backwards."""
    from tests.small import assert_same, feature_map, results
    from tests.small import middle as module
    from vcr_ops.ops.vcr_middle import triton_backward_launches, triton_forward_launches

    y = feature_map(5, 12, 3, 5, dtype=torch.float64, channels_last=channels_last)
    monkeypatch.setattr(triton_forward_launches, "STATE_ROWS", 2)
    monkeypatch.setattr(triton_backward_launches, "PROGRAMS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(triton_backward_launches, "MOST_ALONE", 1)
    ours, other = (results(module(name, edges=edges).double(), y) for name in ("triton", "composite"))
    assert_same(ours, other, 1e-10)
