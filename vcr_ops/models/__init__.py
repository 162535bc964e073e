"""Networks made of VCRBlocks; ResNeXts made such networks, their checkpoints, and folding for inference."""

from .checkpoints import load_resnext
from .convert import convert, revert
from .fold import fold
from .vcrnet import VCRNet, VCRPyramid, vcrnet50, vcrnet101

__all__ = ["VCRNet", "VCRPyramid", "convert", "fold", "load_resnext", "revert", "vcrnet50", "vcrnet101"]
