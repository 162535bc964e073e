"""Eleven photographs that ship inside scikit-image and scikit-learn, cut to a batch: real images without a download."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import util

import numpy as np
import torch
from torch import Tensor

NAMES = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "motorcycle_left",
    "motorcycle_right",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
    "china",
    "flower",
)
# the means and deviations that networks trained on ImageNet subtract and divide by
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def photographs() -> dict[str, np.ndarray]:
    """name -> (height, width, 3) uint8, each at least 300 pixels high and wide."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise RuntimeError(
            f"the benchmarks take their images from scikit-image and scikit-learn ({error}); "
            "install them with: pip install 'vcr-ops[benchmark]'"
        ) from error
    left, right, _ = skimage.data.stereo_motorcycle()
    found = {"motorcycle_left": left, "motorcycle_right": right}
    for name in NAMES:
        if name in ("china", "flower"):
            found[name] = sklearn.datasets.load_sample_image(f"{name}.jpg")
        elif name not in found:
            found[name] = getattr(skimage.data, name)()
    return {name: np.ascontiguousarray(found[name][..., :3]) for name in NAMES}


def image_batch(count: int, size: int = 224) -> tuple[Tensor, Tensor]:
    """``count`` square crops of the photographs, normalised, and the number of each one's photograph.

    The first eleven are centre crops; further ones are crops at other places, every second one mirrored. A crop takes
    the largest share of the picture that ``size`` divides, so that small sizes see the picture and not a corner of it.

    Returns: images (count, 3, size, size) float32, contiguous; labels (count) int64.
    """
    generator = np.random.default_rng(0)
    pictures = list(photographs().values())
    images = torch.empty(count, 3, size, size)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    for n in range(count):
        picture = pictures[n % len(pictures)]
        height, width = picture.shape[:2]
        step = max(min(height, width) // size, 1)
        span = step * size
        if span > min(height, width):
            raise ValueError(f"image size {size} is larger than {NAMES[n % len(NAMES)]} ({height} x {width})")
        top, side = (height - span) // 2, (width - span) // 2
        if n >= len(pictures):
            top, side = int(generator.integers(height - span + 1)), int(generator.integers(width - span + 1))
        cut = picture[top : top + span, side : side + span].astype(np.float32) / 255
        cut = cut.reshape(size, step, size, step, 3).mean((1, 3))
        if (n // len(pictures)) % 2:
            cut = cut[:, ::-1]
        images[n] = (torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1) - mean) / deviation
    return images, torch.arange(count) % len(pictures)


def noise_batch(count: int, size: int = 224) -> tuple[Tensor, Tensor]:
    """Normal noise in the place of ``image_batch``'s photographs."""
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % len(NAMES)


def images_for(device: str) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """``image_batch``; on a GPU's machine, where packages may be missing that can't be installed, ``noise_batch``."""
    missing = any(util.find_spec(package) is None for package in ("skimage", "sklearn"))
    return noise_batch if missing and device != "cpu" else image_batch
