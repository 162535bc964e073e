"""Global Context block (Cao, Xu, Lin, Wei, Hu: GCNet; ICCV workshops 2019)."""

import torch
from torch import Tensor, nn

from python_ref.variants import CONVOLUTIONS


class GC(nn.Module):
    """One attention map for all channels; what it finds is transformed and added at every position.

    x_i + W2 ReLU(LN(W1 c + b1)) + b2, with c = sum_j a_j x_j, a = softmax over positions of (w_k x_j + b_k).

    ``reduction`` is the paper's r, 16. W2 and b2 start at 0, as in the code that its authors published: the block
    begins as the one without.
    """

    def __init__(self, channels: int, reduction: int = 16, ndim: int = 2) -> None:
        super().__init__()
        self.attend = CONVOLUTIONS[ndim](channels, 1, 1)
        self.down = nn.Linear(channels, channels // reduction)
        self.norm = nn.LayerNorm(channels // reduction)
        self.up = nn.Linear(channels // reduction, channels)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, *spatial); returns the same shape."""
        a = self.attend(x).flatten(2).softmax(2)
        context = torch.bmm(x.flatten(2), a.transpose(1, 2)).squeeze(2)
        change = self.up(torch.relu(self.norm(self.down(context))))
        return x + change.view(*change.shape, *(1,) * (x.dim() - 2))
