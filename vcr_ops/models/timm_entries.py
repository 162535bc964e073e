"""VCRNets as timm's models: importing this module imports timm and registers them.

``import vcr_ops`` does that where timm has been imported, or as soon as it is: see :mod:`.timm_registration`.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .vcrnet import VCRNet

__all__: list[str] = []  # timm's register_model adds the names

_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs({"vcrnet50.untrained": _CFG, "vcrnet101.untrained": _CFG})


def _create(variant: str, pretrained: bool, layers: tuple[int, ...], options: dict[str, Any]) -> Any:
    return build_model_with_cfg(VCRNet, variant, pretrained, layers=layers, **options)


@register_model
def vcrnet50(pretrained: bool = False, **options: Any) -> Any:
    """VCRNet-50 (32x4d). options: timm's, VCRNet's and VCRBlock's. There are no weights to download."""
    return _create("vcrnet50", pretrained, (3, 4, 6, 3), options)


@register_model
def vcrnet101(pretrained: bool = False, **options: Any) -> Any:
    """VCRNet-101 (32x4d). options: timm's, VCRNet's and VCRBlock's. There are no weights to download."""
    return _create("vcrnet101", pretrained, (3, 4, 23, 3), options)
