"""Changing the level at which a network's modulators work."""

from typing import TypeVar

from torch import nn

from .. import checks
from ..modules.block import VCRBlock
from ..modules.middle import VisualConceptReasoning
from ..variants import MODULATIONS

Model = TypeVar("Model", bound=nn.Module)


def set_modulation(model: Model, modulation: str) -> Model:
    """Make all VCR blocks of a network modulate at "pixel" or "channel" level, in place; no parameter changes.

    Both levels have the same parameters, so a network that was trained on ImageNet at channel level goes on at pixel
    level, as the paper has it for detection and segmentation (Table 2).

    Args:
        model: with VCRBlocks, converted ones or VisualConceptReasonings in it.
    Returns:
        The model.
    Raises:
        TypeError: model is no module.
        ValueError: an unknown name; no such block; or pixel level where a sampler has no attention map ("pool"), with
            the paths of all such. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    checks.check_name("modulation", modulation, MODULATIONS)
    blocks = [(path, m) for path, m in model.named_modules() if isinstance(m, VCRBlock | VisualConceptReasoning)]
    if not blocks:
        raise ValueError(f"the model, a {type(model).__name__}, has no VCRBlock")
    pools = [path or "the model" for path, block in blocks if block.sampler.sampler == "pool"]
    if modulation == "pixel" and pools:
        raise ValueError(f"pixel level needs an attention map, which sampler='pool' hasn't: {', '.join(pools)}")
    for _, block in blocks:
        block.modulation = modulation
    return model
