"""What is measured: the cases, and the maps and parameters they run on.

The maps are real activations: a batch of photographs goes through ``python_ref.vcrnet50`` and the input of the second
block of each stage (and of that block's middle) is kept. The parameters are that block's, moved a little at random so
that none stands at 0 or 1.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .photographs import images_for

CONCEPTS = 32
LEVELS = ("middle", "block", "network")
MODES = ("train", "eval")
LAYOUTS = ("contiguous", "channels_last")
STAGES = (1, 2, 3, 4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES = (torch.bfloat16, torch.float16)  # maps of these types have float32 parameters beside them, as under autocast
IMAGE_SIZE = 224
DISTINCT = 64  # images; a larger batch repeats them


def check_dtypes(dtypes: Iterable[str], device: str) -> None:
    """Raise ValueError where a dtype has no maps on a device (torch's name of it)."""
    if device == "cpu" and "float16" in dtypes:
        raise ValueError("--dtype float16 is for GPUs: on the CPU maps are float32 or bfloat16")


@dataclass(frozen=True)
class Case:
    """One thing to run.

    level: "middle" (batch norm, sampler, reasoner, modulator on the map Y), "block" (one VCRBlock), "network"
    (vcrnet50).
    mode: "train" (forward and backward, gradients of the input and of all parameters) or "eval" (forward, running
    statistics).
    stage: 1 to 4; 0 for a network.
    """

    level: str
    mode: str
    stage: int
    batch: int
    dtype: str = "float32"
    layout: str = "contiguous"
    image_size: int = IMAGE_SIZE

    def __post_init__(self) -> None:
        for name, allowed in (("level", LEVELS), ("mode", MODES), ("dtype", tuple(DTYPES)), ("layout", LAYOUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.stage not in ((0,) if self.level == "network" else STAGES):
            raise ValueError(f"stage is {self.stage}, expected 1 to 4, or 0 for a network")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, expected at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.layout == "channels_last" else torch.contiguous_format

    @property
    def p(self) -> int:
        """Channels of one concept."""
        return 2 << self.stage if self.stage else 0

    @property
    def height(self) -> int:
        """Height and width of the middle's map."""
        size = self.image_size
        for _ in range(self.stage + 1):  # conv1, the pooling, then each stage's stride but the first's
            size = (size + 1) // 2
        return size if self.stage else self.image_size

    @property
    def map_bytes(self) -> int:
        """Bytes of the middle's map Y; 0 for a network."""
        return self.batch * CONCEPTS * self.p * self.height**2 * self.torch_dtype.itemsize

    @property
    def name(self) -> str:
        place = f"stage {self.stage} (p={self.p}, H={self.height})" if self.stage else "vcrnet50"
        return f"{self.level} {self.mode}, {place}, N={self.batch}, {self.dtype}, {self.layout}"


@dataclass
class Inputs:
    """What a case's step is given: the input, the gradient of its output (a network: labels) and the parameters.

    state: names of the contract -> float64 tensors whose values the case's dtype can hold, so that every side and the
    float64 reference start from the same numbers.
    """

    x: Tensor
    grad_out: Tensor | None
    labels: Tensor | None
    state: dict[str, Tensor]

    def cast(self, dtype: torch.dtype) -> Inputs:
        """The same values with the map in another dtype (the float64 reference's)."""
        return Inputs(
            self.x.to(dtype), None if self.grad_out is None else self.grad_out.to(dtype), self.labels, self.state
        )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator for a block of code and put it back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@functools.lru_cache(maxsize=2)
def _activations(
    count: int, image_size: int, device: str
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """stage -> (the second block's input, its middle's Y); and the network's state, statistics being this batch's."""
    import python_ref

    with seeded(0):
        network = python_ref.vcrnet50(num_classes=1000).to(device)
    for block in (block for stage in STAGES for block in getattr(network, f"layer{stage}")):
        # branches smaller than shortcuts, as in trained networks: otherwise sixteen blocks amplify every rounding
        nn.init.constant_(block.bn3.weight, 0.25)
    kept: dict[int, list[Tensor]] = {}
    hooks = []
    for stage in STAGES:
        block = getattr(network, f"layer{stage}")[1]
        kept[stage] = []
        hooks.append(block.register_forward_pre_hook(lambda _, args, into=kept[stage]: into.append(args[0])))
        hooks.append(block.conv2.register_forward_hook(lambda _m, _a, out, into=kept[stage]: into.append(out)))
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a cumulative average: after one batch, that batch's statistics
    with torch.no_grad():
        network.train()(images_for(device)(count, image_size)[0].to(device))
    for hook in hooks:
        hook.remove()
    state = {
        name: (value.double() if value.is_floating_point() else value).cpu()
        for name, value in network.state_dict().items()
    }
    return {stage: (maps[0].detach(), maps[1].detach()) for stage, maps in kept.items()}, state


def _state_of(case: Case, network_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the network's state that the case's module has, under that module's names."""
    if case.level == "network":
        return dict(network_state)
    prefix = f"layer{case.stage}.1."
    block = {name[len(prefix) :]: value for name, value in network_state.items() if name.startswith(prefix)}
    if case.level == "block":
        return block
    block = {("bn." + name[4:] if name.startswith("bn2.") else name): value for name, value in block.items()}
    return {
        name: value for name, value in block.items() if name.split(".")[0] in ("bn", "sampler", "reasoner", "modulator")
    }


def _perturbed(state: dict[str, Tensor], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Every parameter times 1 + 0.2 n, biases and gains plus 0.1 n (n normal); then rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, value in state.items():
        if value.is_floating_point():
            if "running" not in name:
                noise = torch.randn(2, *value.shape, generator=generator, dtype=value.dtype)
                vector = value.dim() == 1 or name.endswith("_bias")
                value = value * (1 + 0.2 * noise[0]) + (0.1 * noise[1] if vector else 0)
            value = value.to(dtype).double()
        moved[name] = value
    return moved


def inputs_for(
    case: Case, draw: int = 0, images: int | None = None, corner: int | None = None, device: str = "cpu"
) -> Inputs:
    """The case's inputs. Draw 0 is what is timed; other draws have other parameters, gradients and images.

    images, corner: take so many images of the batch and of each a corner so many positions wide: for cheaper checks.
    device: where the maps and labels lie; the state stays on the CPU.
    """
    count = min(max(case.batch, 8 if case.level == "network" else 4), DISTINCT)
    activations, network_state = _activations(count, case.image_size, device)
    chosen = (torch.arange(images or case.batch) + draw * (images or case.batch)) % count
    labels = None
    if case.level == "network":
        x, labels = images_for(device)(count, case.image_size)
        x, labels = x[chosen].to(device), labels[chosen].to(device)
    else:
        x = activations[case.stage][case.level == "middle"][chosen.to(device)]
    if corner is not None:
        x = x[..., :corner, :corner]
    x = x.to(case.torch_dtype, memory_format=case.memory_format, copy=True)
    grad_out = None
    if case.mode == "train" and labels is None:
        generator = torch.Generator(device).manual_seed(1000 + draw)
        grad_out = torch.randn(x.shape, generator=generator, device=device).to(
            case.torch_dtype, memory_format=case.memory_format
        )
    state = _state_of(case, network_state)
    # a whole network's parameters stay as initialised: noise in fifty layers would be a network nobody has
    moved = _perturbed(state, case.torch_dtype, draw) if labels is None else _rounded(state, case.torch_dtype)
    return Inputs(x, grad_out, labels, moved)


def _rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype).double() if value.is_floating_point() else value for name, value in state.items()}


def expand(
    levels: list[str],
    modes: list[str],
    stages: list[int],
    batches: list[int],
    network_batches: list[int],
    dtypes: list[str],
    layouts: list[str],
    image_size: int = IMAGE_SIZE,
) -> list[Case]:
    """All cases of the given choices. Layouts vary fastest: they share one float64 reference."""
    cases = []
    for level in levels:
        for dtype in dtypes:
            for batch in network_batches if level == "network" else batches:
                for mode in modes:
                    for stage in [0] if level == "network" else stages:
                        first = Case(level, mode, stage, batch, dtype, layouts[0], image_size)
                        cases += [replace(first, layout=layout) for layout in layouts]
    return cases
