"""Every op, both ways, is counted by torch's FLOP counter: multiply-adds times two, those of the folded algebra."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vcr_ops
from tests.small import feature_map, middle
from vcr_ops import flops

OPS = ("concept_sample", "concept_reason", "concept_modulate", "vcr_middle")


def counted(run: Any) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("modulation", ["channel", "pixel"])
def test_the_middle(modulation: str) -> None:
    m, y = middle("cpp", modulation=modulation), feature_map(2, 12, 5, 7).requires_grad_()
    found = counted(lambda: m(y).sum().backward())
    assert set(found) == {"vcr_ops.vcr_middle", "vcr_ops.vcr_middle_backward"}
    explained = vcr_ops.explain(m, y)
    assert found["vcr_ops.vcr_middle"] == explained.step("training forward").flops
    assert found["vcr_ops.vcr_middle_backward"] == explained.step("training backward").flops
    m.eval()
    with torch.no_grad():
        assert counted(lambda: m(y)) == {"vcr_ops.vcr_middle": explained.step("evaluation").flops}


def test_evaluation_by_hand() -> None:
    N, C, p, pt, S = 2, 3, 4, 4, 35
    m, y = middle("cpp").eval(), feature_map(N, C * p, 5, 7)
    map_ = N * C * p * S * (1 + 1 + 1 + 1)  # mean, logits, weighted mean, scale and shift
    small = N * C * p * pt * 3 + N * C * pt * (2 * C + 3) + N * C * p * (2 * pt + 2)
    with torch.no_grad():
        assert counted(lambda: m(y)) == {"vcr_ops.vcr_middle": 2 * (map_ + small)}


def test_single_ops() -> None:
    m, y = middle("cpp", modulation="pixel"), feature_map(2, 12, 5, 7).requires_grad_()

    def run() -> None:
        h, attention = m.sampler(y, return_attention=True)
        m.modulator(y, m.reasoner(h), attention).sum().backward()

    found = counted(run)
    assert set(found) == {f"vcr_ops.{op}{suffix}" for op in OPS[:3] for suffix in ("", "_backward")}
    assert all(n > 0 for n in found.values())


def test_every_op_has_a_formula() -> None:
    from torch.utils.flop_counter import flop_registry

    for op in OPS:
        for name in (op, f"{op}_backward"):
            assert getattr(torch.ops.vcr_ops, name) in flop_registry
            assert getattr(flops, name).__doc__


def test_the_paper_s_share() -> None:
    """0.02 G multiply-adds more than ResNeXt-50 at 224 x 224 (Table 1): the middles' own."""
    total = 0
    for blocks, p, size in ((3, 4, 56), (4, 8, 28), (6, 16, 14), (3, 32, 7)):
        m = vcr_ops.VisualConceptReasoning(32 * p, 32)
        shape = (1, 32 * p, size, size)
        total += blocks * vcr_ops.explain(m, torch.empty(shape)).step("evaluation").flops // 2
    assert 0.005e9 < total < 0.025e9
