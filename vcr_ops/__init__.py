"""Visual concept reasoning blocks for PyTorch, with fused ops that pass over the feature map as seldom as possible."""

from . import backend, library
from .backend import use_backend
from .explain import Explanation, explain
from .inspect import Concepts, inspect
from .models import (
    VCRNet,
    VCRPyramid,
    convert,
    fold,
    load_inflated,
    load_resnext,
    revert,
    set_modulation,
    timm_registration,
    vcrnet50,
    vcrnet50_slow_only,
    vcrnet101,
    vcrnet101_slow_only,
)
from .modules import (
    ConceptModulator,
    ConceptReasoner,
    ConceptSampler,
    FrozenBatchNorm,
    SyncBatchNorm,
    VCRBlock,
    VisualConceptReasoning,
    freeze_batch_norm,
    no_running_stats_update,
)
from .ops.concept_modulate.op import concept_modulate
from .ops.concept_reason.op import ConceptReasonOutput, concept_reason
from .ops.concept_sample.op import concept_sample
from .ops.vcr_middle.op import MiddleOutput, visual_concept_reasoning

__version__ = "0.1.0"

library.load()
timm_registration.when_imported()

__all__ = [
    "ConceptModulator",
    "ConceptReasonOutput",
    "ConceptReasoner",
    "ConceptSampler",
    "Concepts",
    "Explanation",
    "FrozenBatchNorm",
    "MiddleOutput",
    "SyncBatchNorm",
    "VCRBlock",
    "VCRNet",
    "VCRPyramid",
    "VisualConceptReasoning",
    "backend",
    "concept_modulate",
    "concept_reason",
    "concept_sample",
    "convert",
    "explain",
    "fold",
    "freeze_batch_norm",
    "inspect",
    "load_inflated",
    "load_resnext",
    "no_running_stats_update",
    "revert",
    "set_modulation",
    "use_backend",
    "vcrnet50",
    "vcrnet50_slow_only",
    "vcrnet101",
    "vcrnet101_slow_only",
    "visual_concept_reasoning",
]
