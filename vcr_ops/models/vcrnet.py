"""VCRNet: ResNeXt with visual concept reasoning in every block (paper, Table 1); with and without a classifier."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..modules.batch_norm import CONVOLUTIONS
from ..modules.block import VCRBlock
from ..modules.inputs import check_network
from ..modules.middle import default_norm
from ..modules.norm_relu import run_norm_relu
from ..modules.running_stats import no_running_stats_update
from .features import FeatureInfo, OutIndices, take_indices
from .pool import global_pool as make_pool

_MAX_POOLS: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_STAGES = ("layer1", "layer2", "layer3", "layer4")
_DILATED = {32: (False, False, False), 16: (False, False, True), 8: (False, True, True)}


class VCRNet(nn.Module):
    """Stem, four stages of VCRBlocks, average pool and classifier, by torchvision's names and conventions, and timm's.

    Args:
        layers: blocks of each of the four stages. num_classes: width of ``fc``; 0 leaves it out.
        zero_init_residual: start every bn3 with weight 0, so that blocks start as their shortcut.
        groups: C. width_per_group: p of the first stage.
        replace_stride_with_dilation: for stages 2 to 4, dilate instead of stride.
        norm_layer: makes every norm of a map from a number of channels; default nn.BatchNorm for ``ndim``. Reasoners
            have nn.BatchNorm1d, of states: convert_sync_batchnorm and freeze_batch_norm take them along.
        ndim: 2 for images (N, 3, H, W), 3 for video (N, 3, T, H, W).
        in_chans: channels of the input. output_stride: 32, 16 or 8, timm's word for ``replace_stride_with_dilation``.
        global_pool: "avg", "max", "avgmax" (their mean), "catavgmax" (both), or "" for none, with num_classes=0.
        drop_rate: dropout before ``fc``. drop_path_rate: stochastic depth's probability for the last block's branch;
            it grows from 0 at the first block in equal steps, as timm's. Dropout in branches is VCRBlock's ``dropout``.
        options: VCRBlock's sampler, edges, modulation, affine, zero_init, dropout, backend.
    Attributes:
        feature_info: a dict for each of the five levels, as timm has them: num_chs, reduction, module.
        num_features: channels of the last stage. head_hidden_size: what ``fc`` takes.
    Raises:
        TypeError, ValueError: an argument is of another type, unknown or out of its range; says which.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    fc: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 32,
        width_per_group: int = 4,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        ndim: int = 2,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_layers(layers)
        checks.check_count("num_classes", num_classes, 0)
        checks.check_count("in_chans", in_chans)
        checks.check_count("width_per_group", width_per_group)
        checks.check_norm_layer(norm_layer)
        checks.check_probability("drop_rate", drop_rate)
        checks.check_probability("drop_path_rate", drop_path_rate)
        dilate = _dilate(replace_stride_with_dilation, output_stride)
        norm = norm_layer or default_norm(ndim)
        default_norm(ndim)
        self.ndim, self.drop_rate, self.grad_checkpointing = ndim, drop_rate, False
        self.backend: str | None = options.get("backend", "auto")
        self.conv1 = CONVOLUTIONS[ndim](in_chans, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = _MAX_POOLS[ndim](3, 2, 1)
        levels: list[dict[str, Any]] = [{"num_chs": 64, "reduction": 2, "module": "relu"}]
        inplanes, dilation, reduction, place = 64, 1, 4, 0
        for stage, (planes, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            stride = 1 if stage == 0 else 2
            first_dilation = dilation
            if stage > 0 and dilate[stage - 1]:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            blocks = []
            for index in range(count):
                blocks.append(
                    VCRBlock(
                        inplanes,
                        planes,
                        stride if index == 0 else 1,
                        groups=groups,
                        base_width=width_per_group,
                        dilation=first_dilation if index == 0 else dilation,
                        norm_layer=norm_layer,
                        ndim=ndim,
                        drop_path=drop_path_rate * place / max(sum(layers) - 1, 1),
                        **options,
                    )
                )
                inplanes, place = planes * VCRBlock.expansion, place + 1
            setattr(self, _STAGES[stage], nn.Sequential(*blocks))
            levels.append({"num_chs": inplanes, "reduction": reduction, "module": _STAGES[stage]})
        self.feature_info = FeatureInfo(levels)
        self.num_features = inplanes
        self._make_head(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, VCRBlock):
                weight = module.bn3.weight
                if isinstance(weight, Tensor):
                    nn.init.zeros_(weight)

    def _make_head(self, num_classes: int, kind: str) -> None:
        pool = make_pool(kind, self.ndim)
        if kind == "" and num_classes:
            raise ValueError(f"global_pool is '', which takes num_classes=0; num_classes is {num_classes}")
        self.num_classes, self.pool_type, self.avgpool = num_classes, kind, pool
        self.head_hidden_size = self.num_features * (2 if kind == "catavgmax" else 1)
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return stage(x)
        for block in stage:
            x = checkpoint(block, x, use_reentrant=False, context_fn=_recompute)
        return x

    def _stem(self, x: Tensor, stages: Sequence[str] = _STAGES) -> Tensor:
        check_network(self, x, stages)
        return run_norm_relu(self.conv1(x), self.bn1, self.relu, self.backend, source=self.conv1)

    def forward_features(self, x: Tensor) -> Tensor:
        """x (N, in_chans, *spatial) to the last stage's map, (N, num_features, *smaller)."""
        x = self.maxpool(self._stem(x))
        for name in _STAGES:
            x = self._stage(name, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last stage's map to logits (N, num_classes); pre_logits: to what ``fc`` takes, (N, head_hidden_size)."""
        x = self.avgpool(x)
        if self.pool_type:
            x = torch.flatten(x, 1)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in_chans, *spatial) to logits (N, num_classes); without classes, to what ``fc`` would take."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: OutIndices | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of several levels, as timm's method of the same name.

        Args:
            x: (N, in_chans, *spatial). indices: which of the five levels (0: the stem before its max pool), in their
                order in the network; a number means the last so many, None all.
            norm: of no effect, since every level is normalised. stop_early: leave out the stages that aren't asked for.
            output_fmt: "NCHW". intermediates_only: without the last map.
        Returns:
            (last map, list of maps), or the list.
        """
        checks.check_name("output_fmt", output_fmt, ("NCHW",))
        taken = take_indices("indices", indices, len(self.feature_info))
        stages = _STAGES[: max(taken)] if stop_early else _STAGES
        x = self._stem(x, stages)
        maps = [x] if 0 in taken else []
        x = self.maxpool(x)
        for index, name in enumerate(stages, 1):
            x = self._stage(name, x)
            if index in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: OutIndices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages after the last level of ``indices`` and, with prune_head, the classifier, as timm's method.

        Returns:
            The levels.
        """
        taken = take_indices("indices", indices, len(self.feature_info))
        for name in _STAGES[max(taken) :]:
            setattr(self, name, nn.Sequential())
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self, name_only: bool = False) -> Any:
        """``fc``, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new ``fc`` of another width (0: none), and another pool where one is named."""
        checks.check_count("num_classes", num_classes, 0)
        reference: Any = self.conv1.weight
        with torch.device(reference.device):
            self._make_head(num_classes, self.pool_type if global_pool is None else global_pool)
        self.fc.to(dtype=reference.dtype).train(self.training)
        self.avgpool.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep no activations within blocks and compute them again in backward. Statistics of norms in
        fused ops (bn2, the reasoner's; on CPUs bn1 and bn3) move once; the others, being PyTorch's own, move twice.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of parameters' names by depth, for timm's layer-wise learning rates."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


class VCRPyramid(VCRNet):
    """VCRNet without a head, whose forward gives the maps of several levels: a backbone for detection, segmentation.

    Its state dict is a VCRNet's, less ``fc`` and the stages after the last level.

    Args:
        layers: blocks of each stage. out_indices: which of the five levels (0: the stem, before its max pool), in their
            order in the network; a number means the last so many.
        options: VCRNet's arguments but for num_classes and global_pool.
    Attributes:
        feature_info: ``channels()``, ``reduction()`` and ``module_name()`` are those of the levels that are given.
    """

    def __init__(self, layers: Sequence[int], out_indices: OutIndices = (0, 1, 2, 3, 4), **options: Any) -> None:
        super().__init__(layers, 0, global_pool="", **options)
        taken = sorted(set(take_indices("out_indices", out_indices, len(self.feature_info))))
        self.feature_info = FeatureInfo(self.feature_info, taken)
        self.prune_intermediate_layers(taken)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """x (N, in_chans, *spatial) to the maps of the levels, largest first."""
        return self.forward_intermediates(x, self.feature_info.out_indices, stop_early=True, intermediates_only=True)


def _recompute() -> Any:
    return nullcontext(), no_running_stats_update()


def _check_layers(layers: object) -> None:
    if not isinstance(layers, Sequence) or isinstance(layers, str) or len(layers) != len(_STAGES):
        raise ValueError(f"layers is {layers!r}; it takes the numbers of blocks of four stages")
    for index, count in enumerate(layers):
        checks.check_count(f"layers[{index}]", count)


def _dilate(dilate: Any, output_stride: Any) -> Sequence[bool]:
    checks.check_count("output_stride", output_stride)
    if output_stride not in _DILATED:
        raise ValueError(f"output_stride is {output_stride!r}; it takes 32, 16 or 8")
    if dilate is None:
        return _DILATED[output_stride]
    text = f"replace_stride_with_dilation is {dilate!r}; it takes None or three booleans"
    if not isinstance(dilate, Sequence) or not all(isinstance(x, bool) for x in dilate):
        raise TypeError(text)
    if len(dilate) != 3:
        raise ValueError(text)
    if output_stride != 32:
        raise ValueError("output_stride and replace_stride_with_dilation say the same; give one of them")
    return dilate


def _build(
    layers: Sequence[int],
    num_classes: int,
    features_only: bool,
    out_indices: OutIndices | None,
    options: dict[str, Any],
) -> VCRNet:
    if features_only:
        return VCRPyramid(layers, (0, 1, 2, 3, 4) if out_indices is None else out_indices, **options)
    checks.check_absent("out_indices", out_indices, "features_only=False")
    return VCRNet(layers, num_classes, **options)


def vcrnet50(
    num_classes: int = 1000, *, features_only: bool = False, out_indices: OutIndices | None = None, **options: Any
) -> VCRNet:
    """VCRNet-50, 25.26 M parameters.

    Args:
        num_classes: of no use with features_only. options: VCRNet's arguments and VCRBlock's keywords.
        features_only, out_indices: True for a :class:`VCRPyramid`, which gives the maps of these levels (all five).
    """
    return _build((3, 4, 6, 3), num_classes, features_only, out_indices, options)


def vcrnet101(
    num_classes: int = 1000, *, features_only: bool = False, out_indices: OutIndices | None = None, **options: Any
) -> VCRNet:
    """VCRNet-101, 44.60 M parameters. Arguments as :func:`vcrnet50`'s."""
    return _build((3, 4, 23, 3), num_classes, features_only, out_indices, options)
