"""All errors of input: TypeError and ValueError that name the argument, what it got and what it takes.

Everything here runs before anything is computed. The C++ binding's own checks only guard memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .backend import INTERPRETED
from .maps import has_autocast
from .variants import AFFINES, EDGES, MODULATIONS, NORMS, SAMPLERS

FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Shape = Sequence[int | str]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What their forward has, and with it parametrized ones and FSDP's.
CONVOLVE = tuple(convolution.forward for convolution in CONVOLUTIONS)
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _names(choices: Sequence[object]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_name(argument: str, got: object, choices: Sequence[str]) -> None:
    """ValueError unless ``got`` is one of ``choices``."""
    if got not in choices:
        raise ValueError(f"{argument} is {got!r}; it takes one of {_names(choices)}")


def check_variants(
    sampler: object = "dynamic", edges: object = "dynamic", modulation: object = "channel", affine: object = "both"
) -> None:
    """ValueError for an unknown name, or for pixel modulation without an attention map."""
    check_name("sampler", sampler, SAMPLERS)
    check_name("edges", edges, EDGES)
    check_name("modulation", modulation, MODULATIONS)
    check_name("affine", affine, AFFINES)
    if modulation == "pixel" and sampler == "pool":
        raise ValueError("modulation is 'pixel', which needs an attention map; sampler='pool' has none")


def check_count(argument: str, got: object, least: int = 1) -> None:
    """TypeError or ValueError unless ``got`` is an int of at least ``least``."""
    if isinstance(got, bool) or not isinstance(got, int):
        raise TypeError(f"{argument} is {got!r}; it takes an int")
    if got < least:
        raise ValueError(f"{argument} is {got}; it takes at least {least}")


def check_norm_layer(got: object, argument: str = "norm_layer") -> None:
    """TypeError unless ``got`` is None or makes norms."""
    if got is not None and (isinstance(got, nn.Module) or not callable(got)):
        raise TypeError(
            f"{argument} is a {type(got).__name__}; it takes a class or function that makes a norm from a number of "
            "channels"
        )


def check_module(argument: str, got: object) -> None:
    """TypeError unless ``got`` is None or a module."""
    if got is not None and not isinstance(got, nn.Module):
        raise TypeError(f"{argument} is {got!r}; it takes an nn.Module or None")


def check_probability(argument: str, got: object) -> None:
    """TypeError or ValueError unless ``got`` is the probability of dropping something, less than all."""
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise TypeError(f"{argument} is {got!r}; it takes a number")
    if not 0 <= got < 1:
        raise ValueError(f"{argument} is {got}; it takes a probability, at least 0 and below 1")


def check_channels(channels: object, concepts: object) -> None:
    """TypeError or ValueError unless ``concepts`` divides ``channels``."""
    check_count("channels", channels)
    check_count("concepts", concepts)
    assert isinstance(channels, int)
    assert isinstance(concepts, int)
    if channels % concepts:
        raise ValueError(f"channels is {channels}, which concepts={concepts} doesn't divide")


def check_tensor(argument: str, got: object) -> None:
    """TypeError unless ``got`` is a dense tensor of a floating-point type that its device has."""
    if not isinstance(got, Tensor):
        raise TypeError(f"{argument} is a {type(got).__name__}; it takes a tensor")
    if got.layout != torch.strided:
        raise TypeError(f"{argument} has layout {got.layout}; it takes a dense tensor (call to_dense() first)")
    if got.dtype not in FEATURE_DTYPES:
        raise TypeError(f"{argument} is {_short(got.dtype)}; it takes {', '.join(map(_short, FEATURE_DTYPES))}")
    if got.dtype == torch.float16 and got.device.type == "cpu" and not INTERPRETED:
        raise TypeError(f"{argument} is float16 on the CPU, where it takes float32, float64 or bfloat16")


def check_map(argument: str, z: object) -> None:
    """TypeError or ValueError unless ``z`` is a feature map (N, C*p, *spatial) with at least one position."""
    check_tensor(argument, z)
    assert isinstance(z, Tensor)
    if z.dim() < 3:
        raise ValueError(
            f"{argument} has {z.dim()} dims, {tuple(z.shape)}; it takes (N, C*p, *spatial), one spatial dim or more"
        )
    if 0 in z.shape[1:]:
        what = "channels" if z.shape[1] == 0 else "positions"
        raise ValueError(f"{argument} has no {what}: its shape is {tuple(z.shape)}; only N may be 0")


def check_input(argument: str, x: Any, conv: Any) -> int | None:
    """TypeError or ValueError unless ``x`` is a map that a convolution, the first module that sees it, takes.

    Returns:
        N; None where nobody can tell: conv is a module of another kind, or a hook gets x first.
    """
    if type(x) is Tensor and type(conv) in CONVOLUTIONS:
        weight, shape, dtype = conv._parameters.get("weight"), x.shape, x.dtype
        if (
            weight is not None
            and dtype is weight.dtype
            and x.device == weight.device
            and x.layout is torch.strided
            and len(shape) == weight.dim()
            and shape[1] == conv.in_channels
            and x.numel() > 0
            and (dtype is not torch.float16 or not x.is_cpu)
        ):
            return shape[0]
    if not isinstance(conv, _ConvNd) or conv.transposed or conv._forward_pre_hooks or "forward" in conv.__dict__:
        return None
    _check_input(argument, x, conv)
    return x.shape[0]


def _check_input(argument: str, x: Any, conv: _ConvNd) -> None:
    if not _is_cast(x):
        check_tensor(argument, x)
    channels, ndim = conv.in_channels, len(conv.kernel_size)
    sizes = {1: "L", 2: "H, W", 3: "T, H, W"}[ndim]
    if x.dim() != ndim + 2:
        raise ValueError(f"{argument} has {x.dim()} dims, {tuple(x.shape)}; it takes (N, {channels}, {sizes})")
    if channels and x.shape[1] != channels:  # a lazy convolution has none yet
        raise ValueError(
            f"{argument} has {x.shape[1]} channels, its shape is {tuple(x.shape)}; it takes (N, {channels}, {sizes})"
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"{argument} has no positions: its shape is {tuple(x.shape)}; only N may be 0")
    weight = conv._parameters.get("weight")
    # Other tensors, sharded or fake ones among them, have their own ideas of a type and a device.
    if type(conv).forward not in CONVOLVE or type(weight) not in (Tensor, nn.Parameter):
        return
    assert weight is not None
    if x.device != weight.device:
        raise ValueError(f"{argument} is on {x.device}; it takes the weights' device, {weight.device}")
    if x.dtype != weight.dtype and not (_is_cast(x) and weight.dtype != torch.float64):
        wanted = _short(weight.dtype)
        raise TypeError(f"{argument} is {_short(x.dtype)}; beside {wanted} weights it takes {wanted}")


def _is_cast(x: Any) -> bool:
    """True where autocast gives a convolution x in its own type."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dtype not in _CAST:
        return False
    return has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def check_concepts(argument: str, z: Tensor, weight: str, concepts: int, p: int) -> None:
    """ValueError unless z's channels are ``concepts`` times ``p``."""
    channels = z.shape[1]
    if concepts == 0 or channels % concepts:
        raise ValueError(f"{argument} has {channels} channels, which {weight}'s {concepts} concepts don't divide")
    if channels != concepts * p:
        raise ValueError(
            f"{weight} is for {concepts} concepts of {p} channels, {concepts * p} in all; "
            f"{argument} has {channels} channels"
        )


def check_like(argument: str, got: object, shape: Shape, like: Tensor, name: str) -> None:
    """TypeError or ValueError unless ``got`` has a shape, and device and type (or float32) of ``like``, ``name``."""
    check_tensor(argument, got)
    assert isinstance(got, Tensor)
    if got.dim() != len(shape) or any(isinstance(b, int) and a != b for a, b in zip(got.shape, shape, strict=True)):
        wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{argument} has shape {tuple(got.shape)}; it takes {wanted}")
    if got.device != like.device:
        raise ValueError(f"{argument} is on {got.device}; it takes {name}'s device, {like.device}")
    if got.dtype not in (like.dtype, torch.float32):
        allowed = dict.fromkeys((_short(like.dtype), "float32"))
        raise TypeError(
            f"{argument} is {_short(got.dtype)}; beside {_short(like.dtype)} {name} it takes {' or '.join(allowed)}"
        )


def check_absent(argument: str, got: object, why: str) -> None:
    """ValueError unless ``got`` is None."""
    if got is not None:
        raise ValueError(f"{argument} is given, but {why} takes none")


def check_present(argument: str, got: object, why: str) -> None:
    """ValueError where ``got`` is None."""
    if got is None:
        raise ValueError(f"{argument} is None, but {why} takes a tensor")


def check_eps(argument: str, got: object) -> None:
    """TypeError or ValueError unless ``got`` is a number, not negative."""
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise TypeError(f"{argument} is {got!r}; it takes a number")
    if not got >= 0:
        raise ValueError(f"{argument} is {got}; it takes a number that is not negative")


def _check_statistics(prefix: str, mean: object, var: object, size: int, like: Tensor, name: str) -> None:
    for argument, got, other in ((f"{prefix}mean", mean, var), (f"{prefix}var", var, mean)):
        if got is None:
            if other is not None:
                raise ValueError(f"{argument} is None; {prefix}mean and {prefix}var are given both or not at all")
            continue
        _check_buffer(argument, got, size, like, name)


def _check_buffer(argument: str, got: object, size: int, like: Tensor, name: str) -> None:
    check_tensor(argument, got)
    assert isinstance(got, Tensor)
    if tuple(got.shape) != (size,):
        raise ValueError(f"{argument} has shape {tuple(got.shape)}; it takes ({size},)")
    if got.device != like.device:
        raise ValueError(f"{argument} is on {got.device}; it takes {name}'s device, {like.device}")
    if got.requires_grad:
        raise ValueError(f"{argument} requires grad; statistics that are given are constants: pass {argument}.detach()")


def check_batch(argument: str, count: int, what: str) -> None:
    """ValueError where a batch's variance would be taken over one value, as nn.BatchNorm does."""
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training: {argument} has {what}")


def _check_sampler_weights(
    z: Tensor, name: str, value: object, query: object, key: object, logit: object, sampler: object
) -> tuple[int, int, int]:
    check_name("sampler", sampler, SAMPLERS)
    check_like("value", value, ("C", "p", "pt"), z, name)
    assert isinstance(value, Tensor)
    concepts, p, pt = value.shape
    check_concepts(name, z, "value", concepts, p)
    if pt == 0:
        raise ValueError("value has shape (C, p, 0); states need at least one column")
    why = f"sampler={sampler!r}"
    for argument, got in (("query", query), ("key", key)):
        if sampler == "dynamic":
            check_present(argument, got, why)
            check_like(argument, got, (concepts, p, pt), z, name)
        else:
            check_absent(argument, got, why)
    if sampler == "static":
        check_present("logit", logit, why)
        check_like("logit", logit, (concepts, p), z, name)
    else:
        check_absent("logit", logit, why)
    return concepts, p, pt


def _check_edge(edge: object, edges: object, concepts: int, pt: int, like: Tensor, name: str) -> None:
    check_name("edges", edges, EDGES)
    if edges == "none":
        check_absent("edge", edge, "edges='none'")
    else:
        check_present("edge", edge, f"edges={edges!r}")
        check_like("edge", edge, (pt if edges == "dynamic" else concepts, concepts), like, name)


def _check_modulator_weights(
    z: Tensor,
    name: str,
    scale_weight: object,
    shift_weight: object,
    scale_bias: object,
    shift_bias: object,
    pt: int | str,
    concepts: int | str = "C",
    p: int | str = "p",
) -> None:
    check_like("scale_bias", scale_bias, (concepts, p), z, name)
    assert isinstance(scale_bias, Tensor)
    check_concepts(name, z, "scale_bias", *scale_bias.shape)
    concepts, p = scale_bias.shape
    check_like("shift_bias", shift_bias, (concepts, p), z, name)
    for argument, got in (("scale_weight", scale_weight), ("shift_weight", shift_weight)):
        if got is not None:
            check_like(argument, got, (concepts, pt, p), z, name)


def check_concept_sample(
    z: object, value: object, query: object, key: object, logit: object, sampler: object, need_attention: object
) -> None:
    """Errors of :func:`vcr_ops.concept_sample`'s arguments."""
    check_map("z", z)
    assert isinstance(z, Tensor)
    _check_sampler_weights(z, "z", value, query, key, logit, sampler)
    if need_attention and sampler == "pool":
        raise ValueError("return_attention is True, but sampler='pool' has no attention map")


def check_concept_reason(
    h: object,
    edge: object,
    mean: object,
    var: object,
    weight: object,
    bias: object,
    eps: object,
    edges: object,
    *,
    synced: bool = False,
) -> None:
    """Errors of :func:`vcr_ops.concept_reason`'s arguments. Statistics that are synced go over more than h."""
    check_tensor("h", h)
    assert isinstance(h, Tensor)
    if h.dim() != 3 or 0 in h.shape[1:]:
        raise ValueError(f"h has shape {tuple(h.shape)}; it takes (N, C, pt)")
    n, concepts, pt = h.shape
    _check_edge(edge, edges, concepts, pt, h, "h")
    _check_statistics("", mean, var, pt, h, "h")
    for argument, got in (("weight", weight), ("bias", bias)):
        if got is not None:
            check_like(argument, got, (pt,), h, "h")
    check_eps("eps", eps)
    if mean is None and not synced:
        check_batch("h", n * concepts, f"N*C = 1 state, {tuple(h.shape)}")


def check_concept_modulate(
    z: object,
    state: object,
    scale_weight: object,
    shift_weight: object,
    scale_bias: object,
    shift_bias: object,
    attention: object,
) -> None:
    """Errors of :func:`vcr_ops.concept_modulate`'s arguments."""
    check_map("z", z)
    assert isinstance(z, Tensor)
    _check_modulator_weights(z, "z", scale_weight, shift_weight, scale_bias, shift_bias, "pt")
    assert isinstance(scale_bias, Tensor)
    check_like("state", state, (z.shape[0], scale_bias.shape[0], "pt"), z, "z")
    assert isinstance(state, Tensor)
    for argument, got in (("scale_weight", scale_weight), ("shift_weight", shift_weight)):
        if isinstance(got, Tensor) and got.shape[1] != state.shape[2]:
            raise ValueError(
                f"{argument} has shape {tuple(got.shape)}; state's {state.shape[2]} columns take "
                f"(C, {state.shape[2]}, p)"
            )
    if attention is not None:
        check_like("attention", attention, (z.shape[0], scale_bias.shape[0], *z.shape[2:]), z, "z")


def check_vcr_middle(
    y: object,
    norm_mean: object,
    norm_var: object,
    norm_weight: object,
    norm_bias: object,
    value: object,
    query: object,
    key: object,
    logit: object,
    edge: object,
    state_mean: object,
    state_var: object,
    state_weight: object,
    state_bias: object,
    scale_weight: object,
    shift_weight: object,
    scale_bias: object,
    shift_bias: object,
    norm: object,
    norm_eps: object,
    state_eps: object,
    sampler: object,
    edges: object,
    modulation: object,
    *,
    norm_synced: bool = False,
    state_synced: bool = False,
) -> None:
    """Errors of :func:`vcr_ops.visual_concept_reasoning`'s arguments. Synced statistics go over more than y."""
    check_map("y", y)
    assert isinstance(y, Tensor)
    check_variants(sampler, edges, modulation)
    concepts, p, pt = _check_sampler_weights(y, "y", value, query, key, logit, sampler)
    check_name("norm", norm, NORMS)
    channels = concepts * p
    why = f"norm={norm!r}"
    for argument, got in (("norm_mean", norm_mean), ("norm_var", norm_var)):
        if norm == "given":
            check_present(argument, got, why)
            _check_buffer(argument, got, channels, y, "y")
        else:
            check_absent(argument, got, why)
    for argument, got in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if norm == "none":
            check_absent(argument, got, why)
        elif got is not None:
            check_like(argument, got, (channels,), y, "y")
    check_eps("norm_eps", norm_eps)
    _check_edge(edge, edges, concepts, pt, y, "y")
    _check_statistics("state_", state_mean, state_var, pt, y, "y")
    for argument, got in (("state_weight", state_weight), ("state_bias", state_bias)):
        if got is not None:
            check_like(argument, got, (pt,), y, "y")
    check_eps("state_eps", state_eps)
    _check_modulator_weights(y, "y", scale_weight, shift_weight, scale_bias, shift_bias, pt, concepts, p)
    if norm == "batch" and not norm_synced:
        check_batch("y", y.numel() // channels, f"N*S = 1 value per channel, {tuple(y.shape)}")
    if state_mean is None and not state_synced:
        check_batch("y", y.shape[0] * concepts, f"one image of C = 1 concept, {tuple(y.shape)}")
