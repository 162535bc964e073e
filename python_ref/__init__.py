"""The equations of Visual Concept Reasoning Networks (AAAI 2021), literally, in plain PyTorch: see README.md."""

from .bottleneck import Bottleneck, VCRBlock
from .concept_modulate import ConceptModulator, concept_modulate
from .concept_reason import ConceptReasoner, ConceptReasonOutput, concept_reason
from .concept_sample import ConceptSampler, concept_sample
from .middle import VisualConceptReasoning, visual_concept_reasoning
from .networks import ResNet, resnext50, resnext101, vcrnet50, vcrnet101

__all__ = [
    "Bottleneck",
    "ConceptModulator",
    "ConceptReasonOutput",
    "ConceptReasoner",
    "ConceptSampler",
    "ResNet",
    "VCRBlock",
    "VisualConceptReasoning",
    "concept_modulate",
    "concept_reason",
    "concept_sample",
    "resnext50",
    "resnext101",
    "vcrnet50",
    "vcrnet101",
    "visual_concept_reasoning",
]
