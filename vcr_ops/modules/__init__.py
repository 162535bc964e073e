"""The ops as nn.Modules, and the residual block."""

from .block import VCRBlock
from .frozen_batch_norm import FrozenBatchNorm, freeze_batch_norm
from .middle import VisualConceptReasoning
from .modulator import ConceptModulator
from .reasoner import ConceptReasoner
from .running_stats import no_running_stats_update
from .sampler import ConceptSampler
from .sync_batch_norm import SyncBatchNorm

__all__ = [
    "ConceptModulator",
    "ConceptReasoner",
    "ConceptSampler",
    "FrozenBatchNorm",
    "SyncBatchNorm",
    "VCRBlock",
    "VisualConceptReasoning",
    "freeze_batch_norm",
    "no_running_stats_update",
]
