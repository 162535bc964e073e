"""How often each kernel walks the map, from the sizes that its launcher goes by; needs neither Triton nor a GPU.

A pass is (kernel, reads, writes), in units of the map's bytes. The attention that the ops hand on, (N, C, positions) in
the accumulation type, counts as the fraction of a map that it is. tests/test_passes.py holds the kernels to this.
"""

from torch import Tensor

from ..maps import acc_dtype, map_format, positions
from .configs import arch
from .maps import MapView
from .sizes import Sizes, sample_config, sampler_splits, splits_of

Passes = list[tuple[str, float, float]]


def sizes_as_if(y: Tensor, concepts: int, p: int, pt: int, here: bool) -> Sizes:
    """The sizes of a case that is only looked at. ``here``: its kernels can run on y's device."""
    view = MapView(y, 0, 0, 0, map_format(y) == "channels_last")
    return Sizes(y.shape[0], concepts, p, pt, positions(y), y.element_size(), view, arch(y.device) if here else "")


def sweeps(sampler: str, one_tile: bool, known: bool) -> int:
    """Reads of a sampler. A query that is made of the map's mean must have it first; ``known``: it is there."""
    if sampler == "pool":
        return 0 if known else 1
    return 2 if sampler == "dynamic" and not known and not one_tile else 1


def middle_forward(size: Sizes, batch: bool, sampler: str, save: bool) -> Passes:
    """The op ``vcr_middle``. batch: the norm takes the batch's statistics. save: in training."""
    found = sample_config(size, save)
    splits = sampler_splits(size, found, save)
    known = batch or splits > 1
    reads = sweeps(sampler, splits == 1 and found["BS"] >= size.S, known)
    return [
        *([("channel_stats", 1, 0)] if known else []),
        *([("concept_sample", reads, 0)] if reads else []),
        ("concept_modulate", 1, 1),
    ]


def synced_forward(size: Sizes, batch: bool, sampler: str) -> Passes:
    """The steps of a synchronised middle (ops/vcr_middle/synced.py), whose sampler is given the norm's statistics and
    not the images' means. batch: the norm takes those of all processes."""
    found = dict.fromkeys(["channel_stats"], (1.0 if batch else 0.0, 0.0))
    for name, reads, writes in middle_forward(size, False, sampler, True):
        before = found.get(name, (0, 0))
        found[name] = (before[0] + reads, before[1] + writes)
    return [(name, reads, writes) for name, (reads, writes) in found.items() if reads or writes]


def middle_backward() -> Passes:
    """The op ``vcr_middle_backward``."""
    return [("modulate_backward_sums", 2, 0), ("middle_input_grad", 2, 1)]


def ops_forward(size: Sizes, sampler: str, pixel: bool, save: bool) -> Passes:
    """The ops one by one: the sampler's, and the modulator's. pixel: attention goes from one to the other."""
    one_tile = sample_config(size, save)["BS"] >= size.S
    reads: float = sweeps(sampler, one_tile, False)
    attention = attention_of(size) if pixel else 0
    if pixel and not one_tile:
        reads += 1  # the softmax's sum is known at the end of a sweep
    chunks = splits_of(size.config("concept_modulate"), size.S)  # each of them looks for the largest attention
    return [
        ("concept_sample", reads, attention),
        ("concept_modulate", 1 + (chunks + 1) * attention, 1),
    ]


def ops_backward(size: Sizes, sampler: str, pixel: bool) -> Passes:
    """Their backward passes, and PyTorch's sum of the map's two gradients."""
    a = attention_of(size) if pixel else 0
    return [
        ("concept_modulate_backward", 2 + 2 * a, 1 + a),
        *([("attention_gradient", 5 * a, a), ("attention_sums", 1 + a, 0)] if pixel else []),
        ("sample_input_grad", 0 if sampler == "pool" else 1 + a, 1),
        ("sum of both input gradients", 2, 1),
    ]


def attention_of(size: Sizes) -> float:
    """One number a concept and position, in units of the map's bytes."""
    return acc_dtype(size.view.tensor.dtype).itemsize / (size.p * size.itemsize)
