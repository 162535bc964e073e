"""The ops as nn.Modules, and the residual block."""

from .batch_norm import no_running_stats_update
from .block import VCRBlock
from .middle import VisualConceptReasoning
from .modulator import ConceptModulator
from .reasoner import ConceptReasoner
from .sampler import ConceptSampler

__all__ = [
    "ConceptModulator",
    "ConceptReasoner",
    "ConceptSampler",
    "VCRBlock",
    "VisualConceptReasoning",
    "no_running_stats_update",
]
