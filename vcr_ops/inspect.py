"""What the concepts of a network see and say: attention, edges and states of every block (paper, Figures 4 and 5)."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .maps import acc_dtype, positions, without_autocast
from .modules.block import VCRBlock
from .modules.middle import VisualConceptReasoning
from .modules.sampler import ConceptSampler
from .ops.concept_reason.composite import edge_matrix


class Concepts(NamedTuple):
    """One block's concepts on a batch of N images; float32 (float64 for float64 features), on the model's device.

    attention: (N, C, *spatial), sums to 1 over an image's positions (Eq. 1; uniform for the pool sampler).
    states: (N, C, pt), what each concept sampled (Eq. 2).
    edges: (N, C, C), row c being what concept c takes from the others (A of Eq. 3; the learned matrix for static
        edges, the same for every image); None without edges.
    updated: (N, C, pt), the states after the exchange, from which the block is modulated (Eq. 3).
    """

    attention: Tensor
    states: Tensor
    edges: Tensor | None
    updated: Tensor


def inspect(model: nn.Module, images: Tensor, *, blocks: Sequence[str] | None = None) -> dict[str, Concepts]:
    """Run a model on images and return what the concepts of its blocks did, by the blocks' paths in the model.

    The model runs in evaluation, without gradients, whatever mode it is in, and is left as it was: training flags,
    running statistics and hooks are the same afterwards, also after an error. Nothing is kept or slowed otherwise. The
    stages run one by one for the time of the call, which gives the same values as the fused block to rounding, and the
    samplers run a second time where their attention isn't asked for anyway. A compiled model runs uncompiled.

    Args:
        model: any module with VCRBlocks (converted ones, too) or VisualConceptReasoning in it, or one of them itself.
        images: (N, 3, *spatial) for a network, or whatever else the model takes, on the model's device.
        blocks: paths of the blocks to look at; None: all. A path is what ``model.named_modules()`` gives; ``""`` is the
            model itself.
    Returns:
        Paths to :class:`Concepts`, in the order in which the blocks ran. Blocks that didn't run are left out.
    Raises:
        TypeError: model is no module, or images no tensor.
        ValueError: the model has no block to look at; a path in ``blocks`` is none of a block; a block runs more than
            once in a forward pass, so that there is no one answer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; it takes a tensor (N, 3, *spatial)")
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    found = {path: m for path, m in model.named_modules() if isinstance(m, (VCRBlock, VisualConceptReasoning))}
    if not found:
        raise ValueError(f"model, a {type(model).__name__}, has no VCRBlock or VisualConceptReasoning in it")
    unknown = [path for path in blocks or () if path not in found]
    if unknown:
        raise ValueError(f"blocks has {unknown[0]!r}, which is no block of the model; it takes {', '.join(found)}")
    seen: dict[str, Concepts] = {}
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as undo, torch.no_grad():
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import the compiler
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for path, block in found.items():
            if blocks is None or path in blocks:
                _watch(path, block, seen, undo)
        for module, mode in modes:
            undo.callback(setattr, module, "training", mode)
            module.training = False
        model(images)
    return seen


def _watch(path: str, block: Any, seen: dict[str, Concepts], undo: ExitStack) -> None:
    """Have the block's stages put into ``seen`` what they do, until ``undo``."""
    sampled: list[Tensor] = []

    def after_sampler(sampler: ConceptSampler, args: tuple[Tensor, ...], output: Any) -> None:
        sampled[:] = output if isinstance(output, tuple) else (output, _attention(sampler, args[0]))

    def after_reasoner(reasoner: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        if path in seen:
            raise ValueError(f"the block {path!r} runs more than once in a forward pass")
        states, attention = sampled
        edges = None
        if reasoner.edge is not None:
            with without_autocast(states):
                edges = edge_matrix(states, reasoner.edge.to(states.dtype), reasoner.edges)
            edges = edges.expand(len(states), -1, -1)
        seen[path] = Concepts(attention, states, edges, output)

    undo.callback(block.sampler.register_forward_hook(after_sampler).remove)
    undo.callback(block.reasoner.register_forward_hook(after_reasoner).remove)


def _attention(sampler: ConceptSampler, z: Tensor) -> Tensor:
    if sampler.sampler == "pool":
        shape = (len(z), sampler.concepts, *z.shape[2:])
        return torch.full(shape, 1 / positions(z), dtype=acc_dtype(z.dtype), device=z.device)
    _, attention = sampler.forward(z, return_attention=True)  # past its hooks, of which this is one
    return attention
