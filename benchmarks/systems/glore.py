"""Global Reasoning unit (Chen, Rohrbach, Yan, Yan, Feng, Kalantidis; CVPR 2019)."""

import torch
from torch import Tensor, nn

from python_ref.variants import BATCH_NORMS, CONVOLUTIONS

# Stage -> the blocks (from 1) that a unit follows: two in the second stage and three in the third, whatever the depth,
# as in the networks that the unit's authors published.
PLACES: dict[int, dict[int, tuple[int, ...]]] = {
    50: {2: (1, 3), 3: (1, 3, 5)},
    101: {2: (1, 3), 3: (6, 12, 18)},
}


class GloRe(nn.Module):
    """Positions are pooled into nodes of a graph, which exchange messages and go back to the positions.

    With X (channels, S): B = θ(X) (nodes, S), V = φ(X) Bᵀ (states, nodes), Z = W_g ReLU(V (I + A_g)), and the output
    is X + BN(ψ(Z B)). θ, φ, ψ are 1 x 1 convolutions; A_g is learned, and the sum over nodes has a bias.

    nodes = channels / 4, states = channels / 2, biases where they are, and a last batch norm that starts at weight 0:
    as in the code that the unit's authors published.
    """

    def __init__(self, channels: int, nodes: int | None = None, ndim: int = 2) -> None:
        super().__init__()
        conv = CONVOLUTIONS[ndim]
        nodes = nodes or channels // 4
        states = 2 * nodes
        self.reduce = conv(channels, states, 1)
        self.project = conv(channels, nodes, 1)
        self.adjacency = nn.Linear(nodes, nodes)
        self.update = nn.Linear(states, states, bias=False)
        self.extend = conv(states, channels, 1, bias=False)
        self.bn = BATCH_NORMS[ndim](channels, eps=1e-4)
        nn.init.zeros_(self.bn.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, *spatial); returns the same shape."""
        b = self.project(x).flatten(2)
        v = torch.bmm(self.reduce(x).flatten(2), b.transpose(1, 2))
        v = torch.relu(v + self.adjacency(v))
        z = self.update(v.transpose(1, 2)).transpose(1, 2)
        y = torch.bmm(z, b).view(x.shape[0], -1, *x.shape[2:])
        return x + self.bn(self.extend(y))
