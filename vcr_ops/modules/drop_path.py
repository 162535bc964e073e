"""Stochastic depth: a residual block's branch is left out at random, image by image."""

from torch import Tensor, nn

from .. import checks


class DropPath(nn.Module):
    """In training, x's images (dim 0) become 0 with probability p, and what is left is scaled by 1 / (1 - p).

    Huang, Sun, Liu, Sedra, Weinberger: Deep Networks with Stochastic Depth (ECCV 2016); as timm's of the same name.

    Args:
        p: a probability, at least 0 and below 1.
    Raises:
        TypeError, ValueError: p is no such number.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        checks.check_probability("p", p)
        self.p = float(p)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, ...) to the same shape."""
        if not self.training or self.p == 0.0:
            return x
        keep = 1 - self.p
        return x * x.new_empty((x.shape[0], *(1,) * (x.dim() - 1))).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"p={self.p}"
