"""The command line: ``python -m vcr_ops.viz --help``."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import inspect, models
from ..backend import NAMES
from ..variants import MODULATIONS
from .network import load_network
from .page import draw, load_figures


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m vcr_ops.viz",
        description="Draw where the concepts of a network look, what they exchange and what they say, on images.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="a VCRNet's state dict (.pth, .safetensors)")
    weights.add_argument(
        "--random-weights",
        choices=("vcrnet50", "vcrnet101"),
        help="an untrained network: shows what the pictures look like, and nothing else",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="made where it is missing")
    parser.add_argument("--blocks", nargs="+", metavar="PATH", help="as layer3.5 (default: the last of each stage)")
    parser.add_argument("--modulation", choices=MODULATIONS, default="channel", help="which no checkpoint tells")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="of the square crop (default: 224)")
    parser.add_argument("--mean", nargs=3, type=float, default=(0.485, 0.456, 0.406), help="default: ImageNet's")
    parser.add_argument("--std", nargs=3, type=float, default=(0.229, 0.224, 0.225), help="default: ImageNet's")
    parser.add_argument("--seed", type=int, default=0, help="of the t-SNE, and of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", choices=NAMES, default="auto")
    return parser.parse_args(given)


def _read(path: Path, size: int) -> Any:
    """A square crop of the middle, (size, size, 3) uint8."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return np.array(ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (size, size)))
    except FileNotFoundError:
        raise ValueError(f"there is no image {path}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image {path} has more pixels than Pillow opens: {error}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # Pillow's for damaged files
        raise ValueError(f"the image {path} can't be read: {error}") from error


def _check_numbers(options: argparse.Namespace) -> None:
    if options.size < 32:
        raise ValueError(f"--size is {options.size}; it takes 32 or more")
    if not all(map(math.isfinite, options.mean)):
        raise ValueError(f"--mean is {options.mean}; it takes finite numbers")
    if not all(math.isfinite(x) and x > 0 for x in options.std):
        raise ValueError(f"--std is {options.std}; it takes positive, finite numbers")


def _check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # of a PyTorch without CUDA, of a machine without a GPU
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--device is {name!r}, which can't be used here: {text}") from error
    if device.type == "meta":
        raise ValueError("--device is 'meta', where nothing is computed")
    return device


def _check_folder(out: Path) -> None:
    for path in (out, *out.parents):
        if path.exists():
            if not path.is_dir():
                raise ValueError(f"--out is {out}; it takes a folder, and {path} is a file")
            return


def run(options: argparse.Namespace) -> Path:
    """What the command does; returns the page."""
    load_figures()
    _check_numbers(options)
    _check_folder(options.out)
    device = _check_device(options.device)
    pictures = [_read(path, options.size) for path in options.images]
    torch.manual_seed(options.seed)
    if options.checkpoint is not None:
        network: Any = load_network(options.checkpoint, options.modulation, options.backend)
        title = f"Concepts of {options.checkpoint.name}"
    else:
        make = getattr(models, options.random_weights)
        network = make(modulation=options.modulation, backend=options.backend).eval()
        title = f"Concepts of an untrained {options.random_weights}"
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (options.mean, options.std))
    batch = torch.stack([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in pictures])
    blocks = options.blocks or [f"layer{n}.{len(getattr(network, f'layer{n}')) - 1}" for n in (1, 2, 3, 4)]
    seen = inspect(network.to(device), ((batch - mean) / std).to(device), blocks=blocks)
    return draw(seen, pictures, [path.stem for path in options.images], options.out, title=title, seed=options.seed)


def main(given: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 with a line on standard error."""
    options = _arguments(given)
    try:
        print(run(options))
    except (OSError, RuntimeError, TypeError, ValueError, ImportError) as error:
        print(f"vcr_ops.viz: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
