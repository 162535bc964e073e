"""Visual concept reasoning blocks for PyTorch, with fused ops that pass over the feature map as few times as possible."""

from . import backend, library
from .backend import use_backend
from .ops.concept_modulate.op import concept_modulate
from .ops.concept_reason.op import ConceptReasonOutput, concept_reason
from .ops.concept_sample.op import concept_sample
from .ops.vcr_middle.op import MiddleOutput, visual_concept_reasoning

__version__ = "0.1.0"

library.load()

__all__ = [
    "ConceptReasonOutput",
    "MiddleOutput",
    "backend",
    "concept_modulate",
    "concept_reason",
    "concept_sample",
    "use_backend",
    "visual_concept_reasoning",
]
