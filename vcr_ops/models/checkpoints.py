"""Published ResNeXt checkpoints, torchvision's and timm's, into networks with visual concept reasoning."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checks
from ..modules.block import VCRBlock
from .convert import NEW, is_neutral

Model = TypeVar("Model", bound=nn.Module)
# Where training scripts (timm's among them) keep the state dict in a file, in the order in which timm looks.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What wrappers of the whole network put before every name.
_PREFIXES = ("module.", "_orig_mod.")
_COUNTER = "num_batches_tracked"


def load_resnext(model: Model, source: str | os.PathLike[str] | Mapping[str, Any], *, head: bool = True) -> Model:
    """Load a checkpoint in the layout of torchvision's and timm's ``resnext50_32x4d`` and ``resnext101_32x4d``.

    ::

        load_resnext(vcrnet50(zero_init=True), "resnext50_32x4d.pth")  # computes what the ResNeXt computes

    The two packages' layouts are the same: ``conv1``, ``bn1``, ``layer1.0.conv1``, ..., ``fc``. What is VCR's alone
    (``sampler``, ``reasoner`` and ``modulator`` of the blocks) is not in them and stays as it is in the model. A file
    that has some of it has to have all, so checkpoints of a VCRNet load, too.

    Args:
        model: ``vcrnet50`` or ``vcrnet101``, for a ResNeXt's file with ``zero_init=True``; or a converted network. Its
            parameters keep their type and device.
        source: a path of a file of ``torch.save`` (loaded with ``weights_only=True``) or, if it ends in
            ``.safetensors``, of that package, which has to be installed; or the state dict. It may be wrapped, as
            training scripts do, in ``"state_dict_ema"``, ``"model_ema"``, ``"state_dict"`` or ``"model"`` (the first
            of them that there is counts), and every name may have ``module.`` or ``_orig_mod.`` before it.
            ``num_batches_tracked`` may be missing.
        head: False leaves ``fc`` out, whether the file has one or not: the model's stays as it is.
    Returns:
        The model. For video: :func:`load_inflated`.
    Raises:
        TypeError: source is neither, or holds no state dict; or model is no module.
        FileNotFoundError: there is no such file.
        ImportError: the package safetensors is missing.
        ValueError: the file can't be read, or not as weights alone; model has no VCR block, or is on the meta device; a
            key is missing, unknown, of another shape, or no dense tensor with memory and numbers of its kind (floating
            point; whole numbers for counters): all such are listed; or the file is a ResNeXt's and modulators are not
            neutral, so that the network would not compute what the file's does. The model is then as it was.
    """
    return _load(model, source, head, None)


INFLATIONS = ("mean", "centre")


def load_inflated(
    model: Model, source: str | os.PathLike[str] | Mapping[str, Any], *, inflation: str = "mean", head: bool = True
) -> Model:
    """Load an image network's checkpoint into a network for video, whose kernels are inflated along time.

    ::

        load_inflated(vcrnet50_slow_only(400), "vcrnet50.pth", head=False)

    All but the convolutions' weights is loaded as it is. On equal frames the network computes what the image network
    does: exactly with "centre"; with "mean" but for the zeros that convolutions over three frames see beyond the ends.

    Args:
        model: as ``vcrnet50_slow_only``, or a VCRNet with ``ndim=3``.
        source, head: as :func:`load_resnext`'s; a ResNeXt's (with ``zero_init=True``) or a VCRNet's. Weights that are
            inflated already are loaded as they are.
        inflation: "mean", every frame of a kernel is the image's over the number of frames (Carreira, Zisserman: Quo
            Vadis, Action Recognition?; CVPR 2017; the paper's way); or "centre", the middle frame is the image's, the
            others are 0.
    Returns:
        The model.
    Raises:
        as :func:`load_resnext`; ValueError: an unknown inflation, or the model isn't for video.
    """
    checks.check_name("inflation", inflation, INFLATIONS)
    if isinstance(model, nn.Module) and not any(isinstance(m, nn.Conv3d) for m in model.modules()):
        raise ValueError(f"the model, a {type(model).__name__}, has no convolution over time; load_resnext will do")
    return _load(model, source, head, inflation)


def _can_inflate(x: Any, wanted: Any) -> bool:
    """True for an image convolution's weight, where a video's is wanted."""
    if not (isinstance(x, Tensor) and isinstance(wanted, Tensor) and x.dim() == 4 and wanted.dim() == 5):
        return False
    return (*wanted.shape[:2], *wanted.shape[3:]) == x.shape


def _inflated(x: Any, wanted: Any, inflation: str) -> Any:
    """An image convolution's weight for a video's; anything else as it is."""
    if not _can_inflate(x, wanted):
        return x
    shape = wanted.shape
    frames = shape[2]
    if inflation == "mean":
        return (x / frames).unsqueeze(2).expand(shape)
    made = x.new_zeros(shape)
    made[:, :, frames // 2] = x
    return made


def _load(model: Model, source: Any, head: bool, inflation: str | None) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    blocks = [(path, module) for path, module in model.named_modules() if isinstance(module, VCRBlock)]
    if not blocks:
        raise ValueError(f"the model, a {type(model).__name__}, has no VCRBlock; its load_state_dict will do")
    if not isinstance(source, str | os.PathLike | Mapping):
        raise TypeError(f"source is a {type(source).__name__}; it takes a path or a state dict")
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    state = _without_prefixes(_unwrapped(source if isinstance(source, Mapping) else _read(Path(source)), name))
    target = model.state_dict()
    if any(x.is_meta for x in target.values() if isinstance(x, Tensor)):
        raise ValueError("the model is on the meta device, where nothing can be loaded; call to_empty first")
    prefixes = tuple(f"{path}.{part}." if path else f"{part}." for path, _ in blocks for part in NEW)
    ours = {key for key in target if key.startswith(prefixes)}
    if not head:
        state = {key: x for key, x in state.items() if not key.startswith("fc.")}
        target = {key: x for key, x in target.items() if not key.startswith("fc.")}
    # A frozen norm has running statistics, and counts nothing.
    frozen = {key.removesuffix("running_mean") + _COUNTER for key in target if key.endswith(".running_mean")}
    state = {key: x for key, x in state.items() if key in target or key not in frozen}
    reasons = ours & state.keys()
    expected = {key for key in target if reasons or key not in ours}
    _check_entries(name, state, target, expected, inflation is not None)
    if inflation is not None:
        state = {key: _inflated(x, target[key], inflation) for key, x in state.items()}
    if not reasons:
        lively = [f"{path}.modulator" if path else "modulator" for path, b in blocks if not is_neutral(b.modulator)]
        if lively:
            raise ValueError(
                f"{name} is a ResNeXt's, and the model would not compute what it does, since {lively[0]} and "
                f"{len(lively) - 1} more are not neutral; make the model with zero_init=True"
            )
    model.load_state_dict(state, strict=False)
    return model


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            try:
                import safetensors.torch
            except ImportError as error:
                raise ImportError(f"{path} takes the package safetensors; pip install safetensors") from error
            what = "safetensors"
            path.open("rb").close()  # whose own errors of files don't all say which
            return safetensors.torch.load_file(path)
        what = "weights alone"
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ImportError, FileNotFoundError):
        raise
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can raise anything
        # PyTorch's own text goes on to say how to load it all the same, which is no good advice.
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as {what}: {text}") from error


def _unwrapped(found: Any, name: str) -> dict[str, Any]:
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    if not isinstance(found, Mapping):
        raise TypeError(f"{name} holds a {type(found).__name__}; it takes a state dict")
    if not any(isinstance(key, str) and isinstance(x, Tensor) for key, x in found.items()):
        text = f"{', '.join(map(str, found))}: no tensor" if found else "it is empty"
        raise TypeError(f"{name} holds no state dict ({text})")
    return {str(key): x for key, x in found.items()}


def _without_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    again = True
    while again:
        again = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): x for key, x in state.items()}
                again = True
    return state


def _check_entries(
    name: str, state: dict[str, Any], target: dict[str, Tensor], expected: set[str], inflate: bool
) -> None:
    lines = [f"missing: {key}" for key in target if key in expected - state.keys() and not key.endswith(_COUNTER)]
    lines += [f"unknown: {key}" for key in state if key not in target]
    classes = False
    for key, x in state.items():
        wanted = target.get(key)
        if not isinstance(wanted, Tensor):  # unknown, or a module's extra state
            continue
        kind = _another_kind(x, wanted)
        if kind:
            lines.append(f"kind of {key}: {kind}")
        if isinstance(x, Tensor) and x.shape != wanted.shape and not (inflate and _can_inflate(x, wanted)):
            lines.append(f"shape of {key}: {tuple(x.shape)}, the model has {tuple(wanted.shape)}")
            classes = classes or key.startswith("fc.")
    if lines:
        hint = "; head=False leaves fc out" if classes else ""
        raise ValueError("".join([f"{name} doesn't fit the model{hint}:", *(f"\n  {line}" for line in lines)]))


def _another_kind(x: Any, wanted: Tensor) -> str:
    """What keeps an entry from being copied, or from being the same numbers afterwards; "" where nothing does."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}, no tensor"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}, no dense one"
    if x.is_meta:
        return "a tensor on the meta device, which has no numbers"
    dtype = str(x.dtype).removeprefix("torch.")
    if wanted.is_floating_point():
        return "" if x.is_floating_point() else f"{dtype}, the model has floating point"
    whole = x.dtype != torch.bool and not x.is_complex() and not x.is_quantized
    if x.is_floating_point():  # scripts that make whole files half precision do that to counters as well
        whole = bool((x.double() % 1 == 0).all())
    return "" if whole else f"{dtype}, the model has whole numbers"


def read_state_dict(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict in a file, as :func:`load_resnext` takes it: unwrapped, and without the prefixes of wrappers.

    Some entries may be no tensors.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as :func:`load_resnext`.
    """
    return _without_prefixes(_unwrapped(_read(Path(source)), str(source)))
