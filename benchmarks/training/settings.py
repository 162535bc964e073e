"""What a run is made of. Equal for all systems, but for the system."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .data import DATASETS

SYSTEMS = ("resnext", "se", "gc", "glore", "vcr", "vcr-reference", "vcr-converted")
"""vcr-reference: the literal equations with vcr's initial weights. vcr-converted: the resnext run of the same seed,
converted, then trained on."""

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Settings:
    """One run.

    lr is the peak: it rises over the first tenth of the steps and falls as a cosine to 0. ema: the decay of the
    weights' moving average at the end; the paper's is 0.9999 on ImageNet, for runs a thousand times as long.
    """

    system: str
    dataset: str
    seed: int = 0
    steps: int = 200
    batch: int = 32
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 1e-4
    ema: float = 0.98
    layers: tuple[int, int, int, int] = (1, 1, 1, 1)
    groups: int = 8
    base_width: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.system not in SYSTEMS:
            raise ValueError(f"system is {self.system!r}; it takes one of {', '.join(SYSTEMS)}")
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset is {self.dataset!r}; it takes one of {', '.join(DATASETS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it takes one of {', '.join(DTYPES)}")
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes 1 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it takes 0 to 1")

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.system}-{self.seed}"

    def lr_at(self, step: int) -> float:
        rise = max(1, self.steps // 10)
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))

    def ema_at(self, step: int) -> float:
        return min(self.ema, (1 + step) / (10 + step))  # no memory of the random start
