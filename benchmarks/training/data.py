"""Images with labels that ship inside scikit-learn and scikit-image, and the order in which they come."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..photographs import DEVIATION, MEAN, photographs

DATASETS = ("digits", "photographs")
CROP = 48
TRAIN_CROPS, TEST_CROPS = 96, 32  # of each photograph


class Data(NamedTuple):
    """images (N, 3, H, W) float32, normalised; labels (N)."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int


def load(name: str) -> Data:
    """One of DATASETS; the same on every call.

    digits: 1797 handwritten ones, 8 x 8 made 32 x 32, a fifth of them for the test. photographs: crops, the label being
    the photograph; those of the test lie in the right 30 % of it, those for training left of that.

    Raises:
        ValueError: an unknown name. RuntimeError: scikit-learn or scikit-image is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset is {name!r}; it takes one of {', '.join(DATASETS)}")
    return _digits() if name == "digits" else _photographs()


@functools.cache
def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(f"{error}; install it with: pip install 'vcr-ops[benchmark]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(8).sub(1)[:, None]
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Data(images[train], labels[train], images[test], labels[test], 10)


@functools.cache
def _photographs() -> Data:
    generator = np.random.default_rng(0)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))

    def crops(picture: np.ndarray, left: int, right: int, count: int) -> list[Tensor]:
        found = []
        for _ in range(count):
            y = int(generator.integers(0, picture.shape[0] - 2 * CROP + 1))
            x = int(generator.integers(left, right - 2 * CROP + 1))
            cut = torch.from_numpy(picture[y : y + 2 * CROP : 2, x : x + 2 * CROP : 2].copy()).permute(2, 0, 1)
            found.append((cut / 255 - mean) / deviation)
        return found

    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    pictures = list(photographs().values())
    for picture in pictures:
        border = int(picture.shape[1] * 0.7)
        sides[0].extend(crops(picture, 0, border, TRAIN_CROPS))
        sides[1].extend(crops(picture, max(border, 0), picture.shape[1], TEST_CROPS))
    labels = torch.arange(len(pictures))
    return Data(
        torch.stack(sides[0]),
        labels.repeat_interleave(TRAIN_CROPS),
        torch.stack(sides[1]),
        labels.repeat_interleave(TEST_CROPS),
        len(pictures),
    )


def batch_at(data: Data, step: int, size: int, seed: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    """The batch of a step, or one of the equal parts of it: a function of its arguments, so a run can begin anywhere.

    Each epoch has an order of its own; what is left over at its end is left out.
    """
    per_epoch = len(data.labels) // size
    generator = torch.Generator().manual_seed(1_000_003 * seed + step // per_epoch)
    order = torch.randperm(len(data.labels), generator=generator)
    start, share = step % per_epoch * size, size // parts
    chosen = order[start + part * share : start + (part + 1) * share]
    return data.images[chosen], data.labels[chosen]
