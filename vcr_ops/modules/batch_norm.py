"""Batch norm modules whose work a fused op does: which ones it may take over, and where their statistics come from."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.module_tracker import ModuleTracker

from ..collectives import Group, group_of
from .frozen_batch_norm import FrozenBatchNorm, is_frozen
from .sync_batch_norm import SyncBatchNorm

BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# The classes that can be fused, and the numbers of dims that they take (any, where there are none).
BATCH_NORM_CLASSES: dict[type, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
    nn.SyncBatchNorm: (),
    SyncBatchNorm: (),
    FrozenBatchNorm: (),
}
SYNCHRONISED = (nn.SyncBatchNorm, SyncBatchNorm)


def has_global_hook() -> bool:
    """True where a hook on all modules might look at, or change, what a module gives."""
    if not torch_module._has_any_global_hook():
        return False
    # ModuleTracker only keeps the names of the modules that run, for torch's FLOP counter among others.
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for hooks in (
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
            torch_module._global_backward_hooks,
            torch_module._global_backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def are_plain(*modules: nn.Module) -> bool:
    """True where calling the modules does nothing but their classes' forward: no hooks, no forward of their own."""
    for module in modules:
        own = module.__dict__  # past nn.Module.__getattr__, which makes every look-up slow
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return False
    return True


def is_plain_batch_norm(module: nn.Module | None) -> bool:
    """True for exactly one of the classes known here (a subclass may do more) without hooks."""
    if module is None or not are_plain(module):
        return False
    return type(module) in BATCH_NORM_CLASSES or is_frozen(module)


def learned(bn: Any) -> tuple[Any, Any]:
    """A batch norm's weight and bias; a frozen one's are buffers."""
    own = bn._parameters or bn._buffers
    try:  # past nn.Module.__getattr__, which is slow
        return own["weight"], own["bias"]
    except KeyError:  # kept as plain attributes, as replicas of nn.DataParallel are
        return bn.weight, bn.bias


def check_dims(argument: str, y: Tensor, bn: nn.Module) -> None:
    """ValueError where nn.BatchNorm would refuse the number of dims."""
    dims = BATCH_NORM_CLASSES.get(type(bn), ())
    if dims and y.dim() not in dims:
        raise ValueError(
            f"{argument} has {y.dim()} dims; its batch norm is a {type(bn).__name__}, which takes {dims[-1]}"
        )


def uses_batch_statistics(bn: nn.Module) -> bool:
    """True where the module normalises with the statistics of the batch: training, or no running ones."""
    if not isinstance(bn, _BatchNorm) and is_frozen(bn):
        return False
    if bn.training:
        return True
    buffers = bn._buffers
    return buffers["running_mean"] is None and buffers["running_var"] is None


def sync_group(bn: Any) -> Group | None:
    """The processes over which a SyncBatchNorm takes its statistics now: in training alone, as its own forward does."""
    if type(bn) not in SYNCHRONISED or not bn.training:
        return None
    return group_of(bn.process_group)
