"""A trained ResNeXt becomes a VCR network, in place and with its weights, and goes back."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .. import checks
from ..backend import check_backend
from ..modules.batch_norm import are_plain
from ..modules.block import VCRBlock
from ..modules.frozen_batch_norm import is_frozen
from ..modules.inputs import check_block
from ..modules.middle import run_middle
from ..modules.modulator import ConceptModulator
from ..modules.norm_relu import run_drops, run_norm_relu, run_shortcut
from ..modules.reasoner import ConceptReasoner
from ..modules.sampler import ConceptSampler
from ..modules.sync_batch_norm import SyncBatchNorm
from .shadow import input_for, same, shadow

Model = TypeVar("Model", bound=nn.Module)
Adapter = Callable[[nn.Module], Mapping[str, str | None] | None]

ACTIVATIONS = ("act1", "act2", "act3")
PARTS = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "downsample", "drop_path")
NEW = ("sampler", "reasoner", "modulator")
"""The modules that convert adds to a block."""

_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
_CORE = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
_OPTIONS = ("modulation", "backend", "vcr_parts", "vcr_adapted")
# What timm's bottlenecks may have besides, and what it is where it does something.
_EXTRAS = {"se": "an attention module", "aa": "anti-aliasing", "drop_block": "drop block"}


class ConvertedBlock(VCRBlock):
    """A bottleneck that :func:`convert` made a VCRBlock; its class is a subclass of this one and of its own before.

    vcr_parts: where each of ``PARTS`` is, by the path of a submodule; None is left out, and an absent activation is a
    ReLU that is no module. vcr_adapted: an adapter said so.
    """

    original: type[nn.Module]
    vcr_parts: dict[str, str | None]
    vcr_adapted: bool

    def part(self, name: str) -> Any:
        """The submodule that does the work of one of ``PARTS``; None where there is none."""
        return part_of(self, self.vcr_parts, name)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inplanes, *spatial) to (N, outplanes, *spatial), as the block's before, with reasoning."""
        check_block(self, x, self.part)
        m = self._modules
        y = _before_middle(self, self.vcr_parts, x, self.backend)
        y = run_middle(y, self.part("bn2"), m["sampler"], m["reasoner"], m["modulator"], self.modulation, self.backend)
        return _after_middle(self, self.vcr_parts, x, y, self.backend, in_place=not self.vcr_adapted)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made where it is needed, and can't be found by its name.
        how: Any = super().__reduce_ex__(max(int(protocol), 2))
        return _blank, (self.original,), *how[2:]


def _blank(original: type[nn.Module]) -> Any:
    return object.__new__(_converted_class(original))


_classes: dict[type[nn.Module], type[ConvertedBlock]] = {}


def _converted_class(original: type[nn.Module]) -> type[ConvertedBlock]:
    if original not in _classes:
        members = {"original": original, "__doc__": f"{original.__name__}, made a VCRBlock by vcr_ops.convert."}
        _classes[original] = type(f"VCR{original.__name__}", (ConvertedBlock, original), members)
    return _classes[original]


def part_of(block: nn.Module, parts: Mapping[str, str | None], name: str) -> Any:
    """The submodule of a block that is one of its parts; None where there is none."""
    path = parts.get(name)
    if path is None:
        return None
    found: Any = block
    for step in path.split("."):
        found = None if found is None else found._modules.get(step)
    return found


def _called(block: nn.Module, parts: Mapping[str, str | None], name: str, x: Tensor) -> Tensor:
    module = part_of(block, parts, name)
    return x if module is None else module(x)


def _activation(block: nn.Module, parts: Mapping[str, str | None], name: str) -> Any:
    return part_of(block, parts, name) if name in parts else torch.relu


def _before_middle(block: nn.Module, parts: Mapping[str, str | None], x: Tensor, backend: str | None) -> Tensor:
    """x to what the grouped convolution gives."""
    y = _called(block, parts, "conv1", x)
    bn, act = part_of(block, parts, "bn1"), _activation(block, parts, "act1")
    y = run_norm_relu(y, bn, act, backend, source=part_of(block, parts, "conv1"))
    return _called(block, parts, "conv2", y)


def _after_middle(
    block: nn.Module, parts: Mapping[str, str | None], x: Tensor, y: Tensor, backend: str | None, *, in_place: bool
) -> Tensor:
    """x, and the middle's y, to what the block gives; in_place: as torchvision's and timm's blocks add."""
    convolved, bn = _called(block, parts, "conv3", y), part_of(block, parts, "bn3")
    out, bn = run_drops(convolved, bn, (part_of(block, parts, "drop_path"),))
    source = part_of(block, parts, "conv3") if out is convolved else None
    shortcut, shortcut_bn = run_shortcut(part_of(block, parts, "downsample"), x)
    act = _activation(block, parts, "act3")
    return run_norm_relu(out, bn, act, backend, shortcut, shortcut_bn, source=source, in_place=in_place)


def _plain_forward(block: nn.Module, parts: Mapping[str, str | None], x: Tensor) -> Tensor:
    """What the block must have computed, if the parts are what they seem."""
    y = _before_middle(block, parts, x, "composite")
    y = torch.relu(part_of(block, parts, "bn2")(y))
    return _after_middle(block, parts, x, y, "composite", in_place=False)


class _Unfit(Exception):
    """Why a block can't be converted."""


class _Change(NamedTuple):
    block: nn.Module
    converted: type[ConvertedBlock]
    attributes: dict[str, Any]
    modules: dict[str, nn.Module]


def _is_conv(module: object, *sizes: int) -> bool:
    """True for a convolution whose kernel has one of these sizes in the last two dims."""
    return isinstance(module, _ConvNd) and not module.transposed and set(module.kernel_size[-2:]) <= set(sizes)


def _looks_like_a_bottleneck(module: nn.Module) -> bool:
    children: Any = module._modules
    return (
        all(children.get(name) is not None for name in _CORE)
        and _is_conv(children["conv1"], 1)
        and _is_conv(children["conv2"], 3)
        and _is_conv(children["conv3"], 1)
    )


def _bottleneck_parts(block: nn.Module) -> dict[str, str | None]:
    """Where the parts of torchvision's and timm's bottlenecks are."""
    children = {name: child for name, child in block._modules.items() if child is not None}
    for name, what in _EXTRAS.items():
        child = children.pop(name, None)
        if child is not None and type(child) is not nn.Identity:
            raise _Unfit(f"it has {what}, {name}, a {type(child).__name__}")
        if child is not None and not are_plain(child):
            raise _Unfit(f"{name} has hooks, or a forward of its own, and would not be called any more")
    parts: dict[str, str | None] = {name: name for name in (*_CORE, "downsample", "drop_path")}
    for name in ACTIVATIONS:
        if name in children or "relu" in children:
            parts[name] = name if name in children else "relu"
    unknown = children.keys() - parts.values()
    if unknown:
        names = ", ".join(f"{name}, a {type(children[name]).__name__}" for name in sorted(unknown))
        raise _Unfit(f"it has what convert doesn't know: {names} (an adapter can say what it is)")
    return parts


def _adapted_parts(block: nn.Module, found: object) -> dict[str, str | None]:
    if not isinstance(found, Mapping):
        raise _Unfit(f"the adapter gave a {type(found).__name__}; it gives None or a mapping of parts to paths")
    parts = dict(found)
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise _Unfit(f"the adapter names the part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    for name, path in parts.items():
        if path is not None and part_of(block, parts, name) is None:
            raise _Unfit(f"the adapter's {name} is at {path!r}, where the block has no module")
    for name in ("conv2", "bn2"):
        if parts.get(name) is None:
            raise _Unfit(f"the adapter names no {name}")
    return parts


def _check_parts(block: nn.Module, parts: dict[str, str | None]) -> None:
    conv, norm, act = (part_of(block, parts, name) for name in ("conv2", "bn2", "act2"))
    if not _is_conv(conv, 3):
        raise _Unfit(f"{parts['conv2']}, a {type(conv).__name__}, is no 3x3 convolution")
    if conv.groups == 1:
        raise _Unfit(f"{parts['conv2']} has groups=1, so there are no concepts")
    for name in ("bn1", "bn2", "bn3"):
        norm = part_of(block, parts, name)
        # A subclass with a forward of its own may, as timm's BatchNormAct2d, have an activation in it.
        known = is_frozen(norm) or getattr(type(norm), "forward", None) in _NORM_FORWARDS
        if norm is not None and not known:
            raise _Unfit(f"{parts[name]}, a {type(norm).__name__}, is no BatchNorm")
    if "act2" in parts:
        if type(act) is not nn.ReLU:
            raise _Unfit(f"the activation after {parts['bn2']}, {parts['act2']}, is a {type(act).__name__}, not a ReLU")
        if not are_plain(act):
            raise _Unfit(
                f"{parts['act2']} has hooks, or a forward of its own, and would not be called after bn2 any more"
            )
    named = tuple(path for path in parts.values() if path is not None)
    for path, x in (*block.named_parameters(), *block.named_buffers()):
        if nn.parameter.is_lazy(x):
            raise _Unfit(f"{path} is not initialised yet")
        if not path.startswith(tuple(f"{name}." for name in named)):
            raise _Unfit(f"it has {path}, which is in none of its known parts")


def _check_forward(block: nn.Module, parts: dict[str, str | None], converted: type[ConvertedBlock]) -> None:
    """_Unfit unless the block computes what its parts say, on a small map."""
    x = input_for(part_of(block, parts, "conv1") or part_of(block, parts, "conv2"), 8)
    with torch.no_grad():
        try:
            other = shadow(block)
            expected = type(block).forward(other, x.clone())
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise _Unfit(f"its forward can't be tried out on a map {tuple(x.shape)}: {text}") from error
        try:
            got = _plain_forward(other, parts, x)
        except Exception as error:
            raise _Unfit(f"its parts don't fit together: {type(error).__name__}: {error}") from error
    if not same(got, expected):
        raise _Unfit("its forward computes something else than a bottleneck of these parts")
    try:
        other.__class__ = converted
    except TypeError as error:
        raise _Unfit(f"its class can't be changed: {error}") from error


def _change(
    block: nn.Module, adapted: object, sampler: str, edges: str, modulation: str, affine: str, backend: str | None
) -> _Change:
    """All that will be new about a block; _Unfit where it can't be."""
    if "forward" in block.__dict__:
        raise _Unfit("its forward has been replaced on the object")
    for name in (*NEW, *_OPTIONS):
        if hasattr(block, name):
            raise _Unfit(f"it has an attribute {name!r} already")
    parts = _bottleneck_parts(block) if adapted is None else _adapted_parts(block, adapted)
    _check_parts(block, parts)
    try:
        converted = _converted_class(type(block))
    except TypeError as error:
        raise _Unfit(f"its class can't be extended: {error}") from error
    _check_forward(block, parts, converted)
    conv = part_of(block, parts, "conv2")
    channels, concepts, weight = conv.out_channels, conv.groups, conv.weight
    with torch.device(weight.device):
        modules: dict[str, nn.Module] = {
            "sampler": ConceptSampler(channels, concepts, sampler=sampler, backend=backend),
            "reasoner": ConceptReasoner(channels, concepts, edges=edges, backend=backend),
            "modulator": ConceptModulator(channels, concepts, affine=affine, zero_init=True, backend=backend),
        }
    for module in modules.values():
        module.to(dtype=weight.dtype).train(block.training)
    attributes = {
        "modulation": modulation,
        "backend": backend,
        "vcr_parts": parts,
        "vcr_adapted": adapted is not None,
    }
    return _Change(block, converted, attributes, modules)


def _where(path: str) -> str:
    return path or "the model itself"


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else "".join(f"\n  {problem}" for problem in problems)


def convert(
    model: Model,
    *,
    sampler: str = "dynamic",
    edges: str = "dynamic",
    modulation: str = "channel",
    affine: str = "both",
    backend: str | None = "auto",
    adapter: Adapter | None = None,
) -> Model:
    """Make the bottlenecks of a ResNeXt-like network VCR blocks, in place, with the weights that they have.

    The modulators start neutral, so the network computes what it computed before, gradients of the old parameters
    included: to rounding, since the fused ops fold norms in; to the bit where each module is called, as with a hook on
    all modules.

    Every block stays the object that it is, with its parameters, buffers, training flags, ``requires_grad``, attributes
    and methods; its class becomes a subclass of VCRBlock and of its own class, and gets ``sampler``, ``reasoner`` and
    ``modulator``, in the type and on the device of the grouped convolution's weight. Its state dict is a VCRBlock's.
    Convert before an optimizer, ``torch.compile`` or DistributedDataParallel looks at the parameters.

    Hooks stay and run, on blocks and on every module in them; but on the ReLU between bn2 and conv3, which becomes part
    of the modulator, they would not run any more, and so they are an error.

    torchvision's and timm's Bottleneck are known by structure: ``conv1``, ``bn1``, ``conv2``, ``bn2``, ``conv3``,
    ``bn3``; ``relu``, or ``act1``, ``act2``, ``act3``, or functional ReLUs; ``downsample`` and ``drop_path``, module or
    None. That a block's forward is what this structure says is tried out, on a small map and a stand-in of the block.

    Args:
        model: any module; blocks at any depth are converted, itself included, shared ones once; VCRBlocks are left be.
        sampler, edges, modulation, affine, backend: as VCRBlock's.
        adapter: for blocks of other names. It is called with every module, and gives None (not such a block) or a
            mapping that says where the parts are, by paths of submodules::

                {"conv1": "a.conv", "bn1": "a.bn", "conv2": "b.conv", "bn2": "b.bn", "conv3": "c.conv", "bn3": "c.bn",
                 "downsample": "shortcut"}

            of ``act3(drop_path(bn3(conv3(act2(bn2(conv2(act1(bn1(conv1(x)))))))) + downsample(x))``. Only conv2 and bn2
            are necessary. A part that is absent is left out, but an activation is a functional ReLU then, and left out
            where it is None.
    Returns:
        The model.
    Raises:
        TypeError: model is no module.
        ValueError: an unknown name; there is nothing to convert; or a bottleneck can't be, then with the paths of all
            such and why: an attention module, anti-aliasing or drop block, ungrouped, no BatchNorm, another activation,
            another forward. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    checks.check_variants(sampler, edges, modulation, affine)
    check_backend(backend or "auto")
    changes, problems = [], []
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{_where(path)} is a DistributedDataParallel; convert the network first, and wrap it then"
            )
        if isinstance(module, VCRBlock | torch.jit.ScriptModule):
            continue
        adapted = None if adapter is None else adapter(module)
        if adapted is None and not _looks_like_a_bottleneck(module):
            continue
        try:
            changes.append(_change(module, adapted, sampler, edges, modulation, affine, backend))
        except _Unfit as error:
            problems.append(f"{_where(path)}, a {type(module).__name__}: {error}")
    if problems:
        raise ValueError(f"the model can't be converted; nothing was changed: {_listed(problems)}")
    if not changes:
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
        text = "; TorchScript can't be, so convert first, and script then" if scripted else ""
        raise ValueError(f"the model, a {type(model).__name__}, has no bottleneck that could be converted{text}")
    for change in changes:
        change.block.__class__ = change.converted
        change.block._modules.update(change.modules)
        change.block.__dict__.update(change.attributes)
    return model


def is_neutral(modulator: Any) -> bool:
    """True where a modulator computes relu(z) whatever the states are: weights 0, scale bias 1, shift bias 0."""
    zero = (modulator.scale_weight, modulator.shift_weight, modulator.shift_bias)
    return bool((modulator.scale_bias == 1).all()) and not any(x is not None and bool(x.any()) for x in zero)


def converted_blocks(model: nn.Module) -> Iterator[tuple[str, ConvertedBlock]]:
    """The blocks that :func:`convert` has made, each once, with their paths."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, ConvertedBlock))


def revert(model: Model) -> Model:
    """Take back what :func:`convert` did, in place, where all modulators are still neutral.

    Every block is then of its class before, with the same parameters and buffers (trained further or not), hooks and
    attributes; its ``sampler``, ``reasoner`` and ``modulator`` are dropped, whatever hooks they have.

    Args:
        model: with blocks that ``convert`` made; VCRBlocks that were made as such have no way back, and are left be.
    Returns:
        The model.
    Raises:
        TypeError: model is no module.
        ValueError: nothing in the model was converted, or a modulator is not neutral (weights 0, scale_bias 1,
            shift_bias 0) or on the meta device, then with the paths of all such. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    blocks = list(converted_blocks(model))
    if not blocks:
        raise ValueError(f"the model, a {type(model).__name__}, has no block that convert made")
    problems = []
    for path, block in blocks:
        where = f"{path}.modulator" if path else "modulator"
        if any(x.is_meta for x in block.modulator.parameters()):
            problems.append(f"{where} is on the meta device, so nobody knows whether it is neutral")
        elif not is_neutral(block.modulator):
            problems.append(
                f"{where} is not neutral (its weights 0, scale_bias 1, shift_bias 0), so the block needs it"
            )
    if problems:
        raise ValueError(f"the model can't be reverted; nothing was changed: {_listed(problems)}")
    for _, block in blocks:
        original = block.original
        for name in NEW:
            del block._modules[name]
        for name in _OPTIONS:
            del block.__dict__[name]
        block.__class__ = original  # type: ignore[assignment]
    return model
