"""Convolutional Block Attention Module (Woo, Park, Lee, Kweon; ECCV 2018)."""

import torch
from torch import Tensor, nn

from python_ref.variants import BATCH_NORMS, CONVOLUTIONS


class CBAM(nn.Module):
    """A gate for every channel, then one for every position.

    x' = x ⊙ σ(MLP(mean over positions) + MLP(max over positions)), one MLP of two layers for both;
    x'' = x' ⊙ σ(BN(f([mean over channels; max over channels]))), f a 7 x 7 convolution of two channels into one.

    The reduction of the MLP is 16, as in the paper. Its biases and the batch norm after f aren't in the paper's
    equations, but in the code that its authors published.
    """

    def __init__(self, channels: int, reduction: int = 16, ndim: int = 2, kernel: int = 7) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, channels)
        )
        self.conv = CONVOLUTIONS[ndim](2, 1, kernel, padding=kernel // 2, bias=False)
        self.bn = BATCH_NORMS[ndim](1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, *spatial); returns the same shape."""
        flat = x.flatten(2)
        gate = torch.sigmoid(self.mlp(flat.mean(2)) + self.mlp(flat.amax(2)))
        x = x * gate.view(*gate.shape, *(1,) * (x.dim() - 2))
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.bn(self.conv(pooled)))
