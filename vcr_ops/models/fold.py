"""For inference: batch norms become part of the convolutions before them."""

import copy
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..modules.batch_norm import are_plain
from ..modules.block import VCRBlock
from ..modules.frozen_batch_norm import FrozenBatchNorm
from ..modules.sync_batch_norm import SyncBatchNorm
from .convert import ConvertedBlock
from .shadow import input_for, same, shadow
from .vcrnet import VCRNet, VCRPyramid

Model = TypeVar("Model", bound=nn.Module)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm, FrozenBatchNorm)


class _Pair(NamedTuple):
    """A norm and the convolution whose output goes to it and nowhere else, by their paths in a module."""

    conv: str
    bn: str


def fold(model: Model) -> Model:
    """A copy of a network for inference, with batch norms folded into the convolutions before them.

    Folded are bn1 and bn3 of VCR blocks (bn2 is part of the fused middle, and stays), all norms of other modules that
    have convolutions and norms in pairs of names (``conv1`` and ``bn1``, ...) as torchvision's and timm's blocks and
    stems do, and norms right after a convolution in an ``nn.Sequential``, as in ``downsample``. ``nn.Identity`` stands
    in a folded norm's place, and the convolution has a bias. That a module's forward uses pairs of names as pairs is
    tried out on a small map; where it doesn't, its norms stay. So do norms that are no BatchNorm or SyncBatchNorm, that
    keep no running statistics, or that come after a convolution of another class than PyTorch's own (a parametrized one
    is of such a class).

    Args:
        model: VCRNet, a converted network, a ResNet, or any other module. It is not changed.
    Returns:
        The copy, in evaluation; same output to rounding. Train ``model``, not the copy.
    Raises:
        TypeError: model is no module.
        ValueError: a module in it is in training mode; or a norm or convolution to be folded has hooks, a forward of
            its own or a parametrization, then with the paths of all such.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    modules = [(path, m) for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    for path, module in modules:
        if module.training:
            raise ValueError(
                f"{path or 'the model'} is in training mode, where norms can't be folded; call eval() first"
            )
    kept = {id(_middle_norm(module)) for _, module in modules if _middle_norm(module) is not None}
    found: dict[int, tuple[str, str]] = {}  # by the norm: paths of convolution and norm in the model
    for path, module in modules:
        pairs = [pair for pair in _pairs(module) if _can_fold(module, pair, uses, kept, found)]
        if pairs and (_is_known(module) or _is_as_named(module, pairs)):
            prefix = path + "." if path else ""
            for pair in pairs:
                found[id(module.get_submodule(pair.bn))] = (prefix + pair.conv, prefix + pair.bn)
    problems = [name for names in found.values() for name in names if not are_plain(model.get_submodule(name))]
    if problems:
        raise ValueError(f"hooks and replaced forwards would not survive folding; they are on {', '.join(problems)}")
    copied = copy.deepcopy(model)
    for conv, bn in found.values():
        _fold_pair(copied, _Pair(conv, bn))
    return copied.eval()


def _middle_norm(module: nn.Module) -> Any:
    """The norm that a VCR block's middle does."""
    if isinstance(module, ConvertedBlock):
        return module.part("bn2")
    return module._modules.get("bn2") if isinstance(module, VCRBlock) else None


def _pairs(module: nn.Module) -> Iterator[_Pair]:
    """What may be a convolution and its norm."""
    if isinstance(module, ConvertedBlock):
        for n in (1, 3):
            conv, bn = (module.vcr_parts.get(f"{name}{n}") for name in ("conv", "bn"))
            if conv is not None and bn is not None:
                yield _Pair(conv, bn)
        return
    if isinstance(module, nn.Sequential):
        yield from (_Pair(*names) for names in pairwise(module._modules))
        return
    for name, child in module._modules.items():
        bn = "bn" + name.removeprefix("conv")
        if name.startswith("conv") and bn in module._modules:
            deep = isinstance(child, nn.Sequential) and len(child) > 0  # timm's deep stems
            yield _Pair(f"{name}.{list(child._modules)[-1]}" if deep and child else name, bn)


def _can_fold(
    module: nn.Module, pair: _Pair, uses: Counter[int], kept: set[int], found: dict[int, tuple[str, str]]
) -> bool:
    conv, bn = (_child(module, path) for path in pair)
    return (
        type(conv) in _CONVOLUTIONS
        and type(bn) in _NORMS
        and conv.out_channels == bn.num_features
        and bn.running_mean is not None
        and bn.running_var is not None
        and uses[id(conv)] == uses[id(bn)] == 1
        and id(bn) not in kept
        and id(bn) not in found
    )


def _child(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def _is_known(module: nn.Module) -> bool:
    """True where the forward is one that uses the pairs as pairs."""
    forward = type(module).forward
    known = (nn.Sequential.forward, VCRBlock.forward, ConvertedBlock.forward, VCRNet.forward, VCRPyramid.forward)
    return forward in known and "forward" not in module.__dict__


def _is_as_named(module: nn.Module, pairs: list[_Pair]) -> bool:
    """True where folding the pairs changes nothing about a small map's result."""
    if "forward" in module.__dict__:
        return False
    first = next(m for m in module.modules() if isinstance(m, _CONVOLUTIONS))
    for size in (8, 64):
        x = input_for(first, size)
        with torch.no_grad():
            try:
                other = shadow(module)
                expected = other.forward(x.clone())
                break
            except Exception:  # whatever it takes, a small map isn't it
                continue
    else:
        return False
    for pair in pairs:
        _fold_pair(other, pair)
    with torch.no_grad():
        return same(other.forward(x), expected)


def _fold_pair(module: nn.Module, pair: _Pair) -> None:
    conv: Any
    bn: Any
    conv, bn = (module.get_submodule(path) for path in pair)
    fused = fuse_conv_bn_eval(conv, bn)
    for path, new in ((pair.conv, fused), (pair.bn, nn.Identity().eval())):
        parent, _, name = path.rpartition(".")
        module.get_submodule(parent)._modules[name] = new
