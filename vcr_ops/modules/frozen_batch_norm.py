"""Batch norm that is constant, for fine-tuning on few images at a time; and who else's are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks

# Classes of other packages, which are not imported for that.
_OTHERS = ("torchvision.ops.misc.FrozenBatchNorm2d", "detectron2.layers.batch_norm.FrozenBatchNorm2d")


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, weight and bias, in training as in evaluation; for any number of dims.

    All four are buffers: no optimizer sees them, and ``train()`` changes nothing. State dicts of nn.BatchNorm load; the
    counter num_batches_tracked is dropped. As a VCR block's ``bn2`` or a reasoner's ``bn`` it is fused, and so is
    torchvision's and detectron2's FrozenBatchNorm2d as ``bn2``.

    Args:
        num_features: channels. eps: is added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        checks.check_count("num_features", num_features)
        checks.check_eps("eps", eps)
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, input: Tensor) -> Tensor:
        """input (N, C, *spatial)."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def is_frozen(bn: object) -> bool:
    """True for batch norms that are constant whatever mode they are in: ours and others'."""
    kind = type(bn)
    return kind is FrozenBatchNorm or f"{kind.__module__}.{kind.__qualname__}" in _OTHERS


def freeze_batch_norm(model: nn.Module) -> Any:
    """Make every nn.BatchNorm and SyncBatchNorm in a model a FrozenBatchNorm, in place, the reasoners' included.

    timm's ``freeze_batch_norm_2d`` leaves these out, since they normalise rows, and they go on learning; blocks are
    right, and fused, with that, too.

    Returns:
        The model, or what stands for it where it is a batch norm itself.
    Raises:
        TypeError: model is no module.
        ValueError: a batch norm has no running statistics, with the paths of all such; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it takes an nn.Module")
    norms = [(path, m) for path, m in model.named_modules() if isinstance(m, _BatchNorm)]
    without = [path or "the model" for path, m in norms if m.running_mean is None or m.running_var is None]
    if without:
        raise ValueError(f"batch norms without running statistics can't be frozen: {', '.join(without)}")
    made = {id(m): _frozen(m) for _, m in norms}
    if id(model) in made:
        return made[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in made:
                module._modules[name] = made[id(child)]
    return model


def _frozen(bn: _BatchNorm) -> FrozenBatchNorm:
    with torch.device("meta"):
        made = FrozenBatchNorm(bn.num_features, bn.eps)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    made.running_mean, made.running_var = bn.running_mean, bn.running_var
    made.weight = torch.ones_like(bn.running_mean) if bn.weight is None else bn.weight.detach()
    made.bias = torch.zeros_like(bn.running_mean) if bn.bias is None else bn.bias.detach()
    return made.train(bn.training)
