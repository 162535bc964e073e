"""Networks made of VCRBlocks."""

from .vcrnet import VCRNet, vcrnet50, vcrnet101

__all__ = ["VCRNet", "vcrnet50", "vcrnet101"]
