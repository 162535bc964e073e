"""Networks made of VCRBlocks; ResNeXts made such networks, their checkpoints, and folding for inference."""

from .checkpoints import load_inflated, load_resnext
from .convert import convert, revert
from .fold import fold
from .modulation import set_modulation
from .slow_only import vcrnet50_slow_only, vcrnet101_slow_only
from .vcrnet import VCRNet, VCRPyramid, vcrnet50, vcrnet101

__all__ = [
    "VCRNet",
    "VCRPyramid",
    "convert",
    "fold",
    "load_inflated",
    "load_resnext",
    "revert",
    "set_modulation",
    "vcrnet50",
    "vcrnet50_slow_only",
    "vcrnet101",
    "vcrnet101_slow_only",
]
