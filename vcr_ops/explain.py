"""What running a block costs, and why: backend, passes over the feature map, bytes, FLOPs, copies."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import checks, cuda_plan, flops, library
from .backend import case_of, choose
from .faster import size_of
from .maps import map_format, positions
from .models.convert import ConvertedBlock
from .modules.batch_norm import uses_batch_statistics
from .modules.block import VCRBlock
from .modules.frozen_batch_norm import is_frozen
from .modules.middle import VisualConceptReasoning, fused_path, path_without_sync, sync_groups
from .ops.vcr_middle import composite
from .ops.vcr_middle.arguments import learned_of
from .ops.vcr_middle.synced import has_steps


@dataclass(frozen=True)
class Pass:
    """One walk over the map: how many map-sized tensors it reads and writes."""

    name: str
    reads: float
    writes: float

    def bytes(self, map_bytes: int) -> int:
        """Bytes moved, for a map of ``map_bytes``."""
        return round((self.reads + self.writes) * map_bytes)


@dataclass(frozen=True)
class Step:
    """A direction of a mode: "training forward", "training backward" or "evaluation"."""

    name: str
    passes: tuple[Pass, ...]
    flops: int

    @property
    def reads(self) -> float:
        """Map-sized tensors read."""
        return sum(each.reads for each in self.passes)

    @property
    def writes(self) -> float:
        """Map-sized tensors written."""
        return sum(each.writes for each in self.passes)


@dataclass(frozen=True)
class Explanation:
    """What ``str`` shows, as values.

    backend, reason: what runs and why. why_not: None, or why it can't run here. path: "whole", "after norm" or
    "modules", as in ``modules.middle.fused_path``. map_bytes: of one map. steps: training forward, training backward,
    evaluation. copies: map-sized copies that strides cause. notes: what else to know.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    map_format: str
    backend: str
    reason: str
    why_not: str | None
    path: str
    map_bytes: int
    steps: tuple[Step, ...]
    copies: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def step(self, name: str) -> Step:
        """The step of a name."""
        return next(step for step in self.steps if step.name == name)

    def bytes(self, name: str) -> int:
        """Bytes that the passes of a step move."""
        return sum(each.bytes(self.map_bytes) for each in self.step(name).passes)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.module}: the middle, on a map {tuple(self.shape)} {dtype} {self.map_format}, "
            f"{self.map_bytes / 1e6:.1f} MB",
            f"  backend   {self.backend}: {self.reason}",
        ]
        if self.why_not is not None:
            lines.append(f"            can't run here: {self.why_not}")
        lines.append(f"  path      {_PATHS[self.path]}")
        lines += [f"  copies    {text}" for text in self.copies or ("none",)]
        lines += [f"  note      {text}" for text in self.notes]
        lines.append(f"  {'pass':34}{'reads':>7}{'writes':>8}{'MB':>9}{'MFLOP':>9}")
        for step in self.steps:
            moved = f"{self.bytes(step.name) / 1e6:9.1f}"
            lines.append(f"  {step.name:34}{step.reads:7.3g}{step.writes:8.3g}{moved}{step.flops / 1e6:9.1f}")
            lines += [
                f"    {each.name:32}{each.reads:7.3g}{each.writes:8.3g}{each.bytes(self.map_bytes) / 1e6:9.1f}"
                for each in step.passes
            ]
        return "\n".join(lines)


_PATHS = {
    "whole": "one op: batch norm, sampler, reasoner and modulator",
    "after norm": "the norm is called, since it isn't a plain nn.BatchNorm; the rest is one op",
    "modules": "each module is called: one has hooks, or is of another class (reasoner.bn included)",
}


def explain(module: nn.Module, x: Tensor) -> Explanation:
    """Tell what runs when ``module(x)`` is called, without calling it.

    Args:
        module: VCRBlock or VisualConceptReasoning.
        x: its input, (N, channels, *spatial); only its shape, strides, type and device matter. For a block, the
            explanation is of its middle; the convolutions are PyTorch's.
    Returns:
        An :class:`Explanation`; print it.
    Raises:
        TypeError, ValueError: another module, or an input that doesn't fit it.
    """
    checks.check_map("x", x)
    middle: Any = module
    if isinstance(module, VCRBlock):
        norm, y = _part(module, "bn2"), _convolved(module, x)
    elif isinstance(module, VisualConceptReasoning):
        norm, y = module.bn, x
    else:
        raise TypeError(f"module is a {type(module).__name__}; explain takes a VCRBlock or a VisualConceptReasoning")
    sampler, reasoner, modulator = middle.sampler, middle.reasoner, middle.modulator
    p = sampler.channels // sampler.concepts
    checks.check_concepts("y", y, "sampler.value", sampler.concepts, p)
    case = case_of(x)
    if case.size is not None:  # a block's y has no memory; it is the map that backends are chosen for
        case = case._replace(size=size_of(y, torch.is_grad_enabled()))
    backend, reason = choose(middle.backend, case)
    path = fused_path(norm, sampler, reasoner, modulator)
    groups = sync_groups(path, norm, reasoner)
    synced = [group for group in groups if group is not None]
    if synced and not has_steps(backend.name):
        path = path_without_sync(groups[1])
    strided = map_format(y) == "strided"
    here = not case.fake and case.device != "meta" and backend.why_not(case) is None
    steps, copies, notes = [], [], []
    for training in (True, False):
        arguments = op_arguments(y, norm, middle, path, training)
        if backend.name == "triton":
            forward, backward = _triton_passes(y, arguments, path, training, here, bool(synced))
        elif backend.name == "cuda":
            device = cuda_plan.device_of(case.number) if here else cuda_plan.Device()
            forward, backward = _cuda_passes(y, arguments, path, training, device)
        elif backend.name != "composite":
            forward, backward = _fused_passes(arguments, path, training)
        else:
            forward, backward = _composite_passes(y, arguments, training)
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in arguments]
        steps.append(Step("training forward" if training else "evaluation", forward, _forward_flops(shapes, training)))
        if training:
            steps.append(Step("training backward", backward, _backward_flops(shapes)))
    if strided:
        copies.append("the map's strides fit neither memory format: one dense copy, forward and backward")
    if backend.name == "composite":
        notes.append("reads and writes counted over eager PyTorch ops; compiled code makes fewer")
    else:
        if backend.name == "cpp" and backend.why_not(case) is None:
            notes.append(f"instruction set: {library.active_isa()}")
        if backend.name == "cuda":
            if path != "modules" and all(each.name != "middle_evaluate" for step in steps for each in step.passes):
                notes.append("evaluation is one launch of 1 read and 1 write where an image's tiles fit on chip")
            notes.append("training's later reads come from the L2 cache where its maps fit there")
        elif backend.name == "triton":
            notes.append("evaluation's last read comes from the L2, where the batch's map fits it")
        else:
            notes.append("evaluation's second read comes from cache, where the map of an image fits it")
        if any(each.name == "concept_sample" and each.reads > 1 for step in steps for each in step.passes):
            notes.append("concept_sample reads an image that fits no tile again, from cache what is still there")
    if synced:
        who = "each norm's own passes"
        if has_steps(backend.name):
            again = backend.name == "triton" and steps[0].reads > 3
            who = "the same passes, as ops of their own"
            who += ", the sampler's after one for the images' means" if again else ""
        processes = max(group.size for group in synced)
        notes.append(f"training: batch statistics over {processes} processes, by {who}; small numbers are exchanged")
    if case.size is not None:
        mode = "training" if case.size.mode == "evaluation" else "evaluation"
        other = choose(middle.backend, case._replace(size=case.size._replace(mode=mode)))[0]
        if other is not backend:
            notes.append(f"grad mode decides: in {mode} it is {other.name}, whose passes are not these")
    if path != "whole":
        notes.append("the norm's own passes are not counted")
    return Explanation(
        module=type(module).__name__,
        shape=tuple(y.shape),
        dtype=y.dtype,
        map_format=map_format(y),
        backend=backend.name,
        reason=reason,
        why_not=backend.why_not(case),
        path=path,
        map_bytes=y.numel() * y.element_size(),
        steps=tuple(steps),
        copies=tuple(copies),
        notes=tuple(notes),
    )


def _convolved(block: VCRBlock, x: Tensor) -> Tensor:
    """What conv2 gives, as a meta tensor of the same strides; norms and ReLU in between change neither."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = mode.from_tensor(x)
        for name in ("conv1", "conv2"):
            conv = _part(block, name)
            y = y if conv is None else conv(y)
    return _like(y)


def _part(block: VCRBlock, name: str) -> Any:
    """A submodule by VCRBlock's name of it; a converted block may have it elsewhere."""
    return block.part(name) if isinstance(block, ConvertedBlock) else getattr(block, name)


def _like(y: Tensor) -> Tensor:
    """A stand-in without memory that says it is on y's device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)


def op_arguments(y: Tensor, norm: Any, middle: Any, path: str, training: bool) -> tuple[Any, ...]:
    """The arguments of the middle's op in a mode."""
    sampler, reasoner, modulator = middle.sampler, middle.reasoner, middle.modulator

    def batch(bn: Any) -> bool:
        if is_frozen(bn):
            return False
        if training and middle.training:
            return uses_batch_statistics(bn)  # one of them may be frozen
        return training or getattr(bn, "running_mean", None) is None

    kind, statistics, weights, eps = "none", (None, None), (None, None), 0.0
    if path == "whole":
        kind, weights, eps = ("batch" if batch(norm) else "given"), (norm.weight, norm.bias), norm.eps
        if kind == "given":
            statistics = (norm.running_mean, norm.running_var)
    bn = reasoner.bn
    state = (None, None) if batch(bn) else (bn.running_mean, bn.running_var)
    return (
        y,
        *statistics,
        *weights,
        *(sampler.value, sampler.query, sampler.key, sampler.logit, reasoner.edge),
        *state,
        *(getattr(bn, "weight", None), getattr(bn, "bias", None)),
        *(modulator.scale_weight, modulator.shift_weight, modulator.scale_bias, modulator.shift_bias),
        *(kind, eps, getattr(bn, "eps", 0.0), sampler.sampler, reasoner.edges, middle.modulation),
    )


def _forward_flops(shapes: list[Any], save: bool) -> int:
    arguments: Any = (*shapes, save)
    return flops.vcr_middle(*arguments)


def _backward_flops(shapes: list[Any]) -> int:
    y, norm, state_mean, variant = shapes[0], shapes[18], shapes[10], shapes[21:]
    saved = None
    arguments: Any = (y, y, *learned_of(shapes), saved, norm, state_mean is None, *variant)
    return flops.vcr_middle_backward(*arguments)


def _triton_passes(
    y: Tensor, arguments: tuple[Any, ...], path: str, training: bool, here: bool, synced: bool
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of the Triton kernels, by the sizes that these go by."""
    from .triton_common import passes

    concepts, p, pt = arguments[5].shape
    size = passes.sizes_as_if(y, concepts, p, pt, here)
    sampler, pixel = arguments[21], arguments[23] == "pixel"
    if path == "modules":
        forward, backward = (
            passes.ops_forward(size, sampler, pixel, training),
            passes.ops_backward(size, sampler, pixel),
        )
    elif synced and training:
        forward, backward = passes.synced_forward(size, arguments[18] == "batch", sampler), passes.middle_backward()
    else:
        forward = passes.middle_forward(size, arguments[18] == "batch", sampler, training)
        backward = passes.middle_backward()
    return tuple(Pass(*each) for each in forward), tuple(Pass(*each) for each in backward) if training else ()


def _cuda_passes(
    y: Tensor, arguments: tuple[Any, ...], path: str, training: bool, device: cuda_plan.Device
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of the CUDA kernels, by the sizes that their launchers go by."""
    concepts, p, pt = arguments[5].shape
    size = cuda_plan.Sizes(
        y.shape[0], concepts, p, pt, positions(y), y.element_size(), map_format(y) == "channels_last"
    )
    batch, pool, given_states = arguments[18] == "batch", arguments[21] == "pool", arguments[10] is not None
    whole = path != "modules" and not batch and given_states and not training
    if whole and cuda_plan.evaluates_at_once(device, size, arguments[22]):
        return (Pass("middle_evaluate", 1, 1),), ()
    reads = 0 if batch and pool else 1  # the pool sampler takes the mean from the batch's statistics
    if not batch and not pool and not cuda_plan.samples_at_once(device, size, training):
        reads = 2  # the images' means first
    return _fused_passes(arguments, path, training, reads)


def _fused_passes(
    arguments: tuple[Any, ...], path: str, training: bool, sampler_reads: int = 1
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of the fused kernels, C++ or CUDA C++, which their sources describe under the same names."""
    attend = [Pass("concept_sample", sampler_reads, 0)] if sampler_reads else []
    if arguments[18] == "batch":
        attend.insert(0, Pass("channel_stats", 1, 0))
    forward = (*attend, Pass("concept_modulate", 1, 1))
    backward = [Pass("modulate_backward_sums", 2, 0), Pass("middle_input_grad", 2, 1)]
    if path == "modules":
        backward = [
            Pass("modulate_backward_sums", 2, 0),
            Pass("modulate_input_grad", 2, 1),
            Pass("sample_input_grad", 1, 1),
            Pass("sum of both input gradients", 2, 1),
        ]
    return forward, tuple(backward) if training else ()


class _Traffic(TorchDispatchMode):
    """Counts the map-sized tensors that PyTorch ops read and write, in units of one map's bytes."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.elements, self.unit = y.numel(), y.numel() * y.element_size()
        self.reads: dict[str, float] = {}
        self.writes: dict[str, float] = {}

    def _size(self, tensors: Iterable[Any]) -> float:
        total = 0
        for tensor in tensors:
            for each in tensor if isinstance(tensor, (list, tuple)) else (tensor,):
                # An expanded tensor is as small as the memory behind it.
                if isinstance(each, Tensor) and each.numel() >= self.elements > 0 and 0 not in each.stride():
                    total += each.numel() * each.element_size()
        return total / max(self.unit, 1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "view" not in func.name() and func.name() != "aten::detach":
            name = func.name().removeprefix("aten::").split(".")[0]
            reads, writes = self._size(args), self._size([out])
            if reads or writes:
                self.reads[name] = self.reads.get(name, 0) + reads
                self.writes[name] = self.writes.get(name, 0) + writes
        return out

    def passes(self) -> tuple[Pass, ...]:
        return tuple(Pass(name, reads, self.writes[name]) for name, reads in self.reads.items())


def _composite_passes(
    y: Tensor, arguments: tuple[Any, ...], training: bool
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """What the composite does in eager mode, counted on tensors without memory."""

    def meta(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return like.requires_grad_(training and (x is y or isinstance(x, nn.Parameter)))

    inputs = [meta(x) for x in arguments]
    forward, backward = _Traffic(y), _Traffic(y)
    with nullcontext() if training else torch.no_grad():
        with forward:
            out = composite.vcr_middle(*inputs)[0]
        if training:
            grad = torch.empty_like(out)
            with backward:
                torch.autograd.grad(out, [x for x in inputs if isinstance(x, Tensor) and x.requires_grad], grad)
    return forward.passes(), backward.passes()
