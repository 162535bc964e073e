"""The residual block with visual concept reasoning: split, transform, attend, interact, modulate, merge."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..backend import check_backend
from .batch_norm import CONVOLUTIONS
from .drop_path import DropPath
from .inputs import check_block
from .middle import default_norm, run_middle
from .modulator import ConceptModulator
from .norm_relu import run_drops, run_norm_relu, run_shortcut
from .reasoner import ConceptReasoner
from .sampler import ConceptSampler


class VCRBlock(nn.Module):
    """A ResNeXt bottleneck whose groups are concepts that reason about each other (paper, Figure 1).

    The leading arguments mean what they mean in torchvision's ``Bottleneck``.

    Args:
        inplanes: input channels. planes: output channels / 4.
        stride, dilation: of the grouped 3x3 convolution. groups: C, the concepts. base_width: p is
            int(planes * base_width / 64).
        downsample: the shortcut; None makes a projection where the shape changes.
        norm_layer: makes bn1, bn2, bn3 from a number of channels; default nn.BatchNorm for ``ndim``.
        sampler: "dynamic", "static" or "pool". edges: "dynamic", "static" or "none".
        modulation: "channel" or "pixel" (not with "pool"). affine: "both", "scale" or "shift".
        ndim: 1, 2 or 3 spatial dims.
        zero_init: start as the plain ResNeXt block with the same weights.
        dropout: probability that an element is dropped, at the branch's end (the paper's Places-365 networks: 0.02).
        drop_path: probability that an image's whole branch is dropped (stochastic depth).
        backend: "auto", "cpp", "triton", "cuda" or "composite".
    Raises:
        TypeError, ValueError: an argument is of another type, unknown or out of its range; says which.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 32,
        base_width: int = 4,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        sampler: str = "dynamic",
        edges: str = "dynamic",
        modulation: str = "channel",
        affine: str = "both",
        ndim: int = 2,
        zero_init: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        backend: str | None = "auto",
    ) -> None:
        super().__init__()
        checks.check_variants(sampler, edges, modulation, affine)
        checks.check_probability("dropout", dropout)
        checks.check_probability("drop_path", drop_path)
        counts = dict(inplanes=inplanes, planes=planes, groups=groups, base_width=base_width)
        for name, got in (counts | dict(stride=stride, dilation=dilation)).items():
            checks.check_count(name, got)
        checks.check_module("downsample", downsample)
        checks.check_norm_layer(norm_layer)
        check_backend(backend or "auto")
        norm = norm_layer or default_norm(ndim)
        default_norm(ndim)
        conv = CONVOLUTIONS[ndim]
        p = int(planes * base_width / 64)
        if p < 1:
            raise ValueError(f"planes={planes} and base_width={base_width} leave {p} channels to a concept")
        width, outplanes = p * groups, planes * self.expansion
        self.stride, self.modulation, self.backend = stride, modulation, backend
        self.conv1 = conv(inplanes, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = conv(width, outplanes, 1, bias=False)
        self.bn3 = norm(outplanes)
        self.relu = nn.ReLU(inplace=True)
        if downsample is None and (stride != 1 or inplanes != outplanes):
            downsample = nn.Sequential(conv(inplanes, outplanes, 1, stride, bias=False), norm(outplanes))
        self.downsample = downsample
        self.sampler = ConceptSampler(width, groups, sampler=sampler, backend=backend)
        self.reasoner = ConceptReasoner(width, groups, edges=edges, backend=backend)
        self.modulator = ConceptModulator(width, groups, affine=affine, zero_init=zero_init, backend=backend)
        # The paper doesn't say where in the block its dropout is: here where stochastic depth is.
        self.register_module("dropout", nn.Dropout(dropout) if dropout else None)
        self.register_module("drop_path", DropPath(drop_path) if drop_path else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inplanes, *spatial); returns (N, 4 * planes, *spatial), each spatial dim divided by the stride."""
        m: Any = self._modules  # past nn.Module.__getattr__, which is slow
        check_block(self, x, m.get)
        relu, backend = m["relu"], self.backend
        shortcut, shortcut_bn = run_shortcut(self.downsample, x)
        y = run_norm_relu(m["conv1"](x), m["bn1"], relu, backend, source=m["conv1"])
        y = m["conv2"](y)
        y = run_middle(y, m["bn2"], m["sampler"], m["reasoner"], m["modulator"], self.modulation, backend)
        convolved = m["conv3"](y)
        out, bn = run_drops(convolved, m["bn3"], (m["dropout"], m["drop_path"]))
        source = m["conv3"] if out is convolved else None
        return run_norm_relu(out, bn, relu, backend, shortcut, shortcut_bn, source=source)

    def extra_repr(self) -> str:
        return f"modulation={self.modulation!r}, backend={self.backend!r}"
