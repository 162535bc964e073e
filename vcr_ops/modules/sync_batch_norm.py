"""Synchronised batch norm that runs where PyTorch's own doesn't, on CPUs with gloo among others."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..collectives import group_of, synced_moments
from ..maps import acc_dtype, without_autocast
from .running_stats import update_running_stats


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm whose batch, in training, is all processes': for any device, and under torch.compile one graph.

    nn.SyncBatchNorm, which is faster on GPUs, refuses CPUs, and so does DistributedDataParallel when it sees one there.
    As a VCR block's ``bn2`` or a reasoner's ``bn`` both are fused. By itself this one is made of PyTorch's ops:
    differentiable twice, and exchanging two numbers per channel twice in each direction.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as nn.BatchNorm's.
        process_group: None for all processes. Where there is only one, this is plain batch norm.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dims, {tuple(input.shape)}; it takes (N, C, *spatial)")

    def forward(self, input: Tensor) -> Tensor:
        """input (N, C, *spatial); N may be 0 where other processes have images."""
        group = group_of(self.process_group) if self.training else None
        if group is None:
            return super().forward(input)
        self._check_input_dim(input)
        dims = (0, *range(2, input.dim()))
        count = input.numel() // input.shape[1]
        with without_autocast(input):
            x, var, mean, unbiased = synced_moments(input.to(acc_dtype(input.dtype)), dims, count, group)
            scale, shape = torch.rsqrt(var + self.eps), (-1, *(1,) * (input.dim() - 2))
            if self.weight is not None:
                scale = scale * self.weight
            x = x * scale.view(shape)
            if self.bias is not None:
                x = x + self.bias.view(shape)
        update_running_stats([(self, mean, unbiased)], False)
        return x.to(input.dtype)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> Any:
        """The module with every nn.BatchNorm in it (and nn.SyncBatchNorm) made one of this class, in place.

        As nn.SyncBatchNorm's method of the same name: parameters, buffers and training flags are the same objects and
        values. Returns the module, or what stands for it where it is a batch norm itself.
        """
        if isinstance(module, _BatchNorm) and not isinstance(module, cls):
            made = cls(module.num_features, module.eps, module.momentum, False, False, process_group, device="meta")
            made.affine, made.track_running_stats = module.affine, module.track_running_stats
            for name in ("weight", "bias"):
                made.register_parameter(name, module._parameters[name])
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                made.register_buffer(name, module._buffers[name])
            return made.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module
