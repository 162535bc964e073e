"""The systems that the paper compares with, in the same ResNeXt: each built from the equations of its own paper."""

from .cbam import CBAM
from .gc import GC
from .glore import GloRe
from .resnext import SYSTEMS, Block, compose, network
from .se import SE
from .slow_only import slow_only

__all__ = ["CBAM", "GC", "SE", "SYSTEMS", "Block", "GloRe", "compose", "network", "slow_only"]
