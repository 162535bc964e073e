"""Squeeze-and-Excitation (Hu, Shen, Sun; CVPR 2018)."""

import torch
from torch import Tensor, nn


class SE(nn.Module):
    """Every channel times a gate: x ⊙ σ(W2 ReLU(W1 mean(x) + b1) + b2).

    ``reduction`` is the paper's r, 16 in all of its networks. The biases are those of the networks that its authors
    published.
    """

    def __init__(self, channels: int, reduction: int = 16, ndim: int = 2) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, *spatial); returns the same shape."""
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.flatten(2).mean(2)))))
        return x * gate.view(*gate.shape, *(1,) * (x.dim() - 2))
