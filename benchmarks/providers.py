"""The sides of a comparison. Each is a record that builds itself and says why it can't run where it can't.

To add a backend, add a record to PROVIDERS: nothing else here or in the report knows the names.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cases import CONCEPTS, HALVES, Case, Inputs


@dataclass(frozen=True)
class Provider:
    """One side.

    name: as the command line and the results call it.  title: as the table calls it.
    role: "product" (what is measured), "alternative" (computes the same by other means) or "plain" (what a ResNeXt has
    at this place).
    build: makes the module of a case, not yet with the case's parameters.
    why_not: None where it can run the case, else one line that says what is missing.
    eager: name of the uncompiled provider that it is compiled from; None where it isn't compiled.
    compile_mode: torch.compile's.
    """

    name: str
    title: str
    role: str
    build: Callable[[Case], nn.Module]
    why_not: Callable[[Case], str | None]
    eager: str | None = None
    compile_mode: str | None = None

    def module(self, case: Case, dtype: torch.dtype | None = None) -> nn.Module:
        """The module in the case's mode, dtype and layout, uncompiled; ``load`` gives it its parameters.

        Parameters stay float32 beside a bfloat16 or float16 map, as under autocast.
        """
        with torch.random.fork_rng(devices=[]):
            module = self.build(case)
        dtype = dtype or case.torch_dtype
        module = module.to(dtype=torch.float32 if dtype in HALVES else dtype)
        if case.level != "middle":
            module = module.to(memory_format=case.memory_format)  # type: ignore[call-overload]
        return module.train(case.mode == "train")

    def load(self, module: nn.Module, inputs: Inputs) -> nn.Module:
        """Put the inputs' parameters into a module of this provider's; returns it."""
        own = module.state_dict()
        given = {_name(self, name): value for name, value in inputs.state.items()}
        missing = own.keys() - given.keys()
        if missing:
            raise RuntimeError(
                f"provider {self.name} has parameters that the case doesn't give: {', '.join(sorted(missing))}"
            )
        module.load_state_dict({name: given[name] for name in own})
        return module


def _name(provider: Provider, name: str) -> str:
    """A parameter's name in the provider's module: the plain middle is Sequential(BatchNorm2d, ReLU)."""
    return "0." + name[3:] if provider.role == "plain" and name.startswith("bn.") else name


class Workload:
    """One provider's module on one case's inputs.

    ``step()`` is what is timed: the forward pass without grad mode (evaluation), or forward and backward with the
    gradients of the input (not a network's) and of every parameter (training). Blocks and networks run bfloat16 and
    float16 under autocast.
    """

    def __init__(
        self, case: Case, module: nn.Module, inputs: Inputs, compiled: bool = False, mode: str | None = None
    ) -> None:
        self.case = case
        self.call: Callable[[Tensor], Tensor] = module
        if compiled:
            self.call = torch.compile(module, dynamic=False, mode=mode)
        self.labels, self.grad_out = inputs.labels, inputs.grad_out
        self.autocast = case.level != "middle" and inputs.x.dtype in HALVES
        self.x = inputs.x
        self.names = [name for name, _ in module.named_parameters()]
        self.wanted: list[Tensor] = list(module.parameters())
        if case.mode == "train" and case.level != "network":
            self.x = inputs.x.detach().requires_grad_()
            self.names, self.wanted = ["x", *self.names], [self.x, *self.wanted]

    def forward(self) -> Tensor:
        if not self.autocast:
            return self.call(self.x)
        with torch.autocast(self.x.device.type, self.x.dtype):
            return self.call(self.x)

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output and the gradients, in the order of ``names``."""
        if self.case.mode == "eval":
            with torch.no_grad():
                return self.forward(), ()
        out = self.forward()
        if self.labels is not None:
            return out, torch.autograd.grad(F.cross_entropy(out.float(), self.labels), self.wanted)
        return out, torch.autograd.grad(out, self.wanted, self.grad_out)

    def step(self) -> None:
        self.run()

    def accumulate(self) -> None:
        """A step that leaves nothing behind, through ``backward``: torch's FLOP counter can't follow ``autograd.grad``
        to leaves.
        """
        if self.case.mode == "eval":
            self.step()
            return
        out = self.forward()
        if self.labels is not None:
            F.cross_entropy(out.float(), self.labels).backward()
        else:
            out.backward(self.grad_out)
        for tensor in self.wanted:
            tensor.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The results by name: "output", "d" + the parameter's name."""
        out, gradients = self.run()
        named = zip(self.names, gradients, strict=True) if gradients else ()
        return {"output": out.detach(), **{f"d {name}": gradient for name, gradient in named}}


def _block_arguments(case: Case) -> tuple[int, int]:
    planes = 32 << case.stage
    return 4 * planes, planes


def _vcr(package: Any, case: Case, **options: Any) -> nn.Module:
    if case.level == "middle":
        return package.VisualConceptReasoning(CONCEPTS * case.p, CONCEPTS, **options)
    if case.level == "block":
        return package.VCRBlock(*_block_arguments(case), groups=CONCEPTS, **options)
    return package.vcrnet50(**options)


def _product(backend: str) -> Callable[[Case], nn.Module]:
    def build(case: Case) -> nn.Module:
        import vcr_ops

        return _vcr(vcr_ops, case, backend=backend)

    return build


def _reference(case: Case) -> nn.Module:
    import python_ref

    return _vcr(python_ref, case)


def _plain(case: Case) -> nn.Module:
    import python_ref

    if case.level == "middle":
        return nn.Sequential(nn.BatchNorm2d(CONCEPTS * case.p), nn.ReLU(inplace=True))
    if case.level == "block":
        return python_ref.Bottleneck(*_block_arguments(case), groups=CONCEPTS)
    return python_ref.resnext50()


def _always(case: Case) -> str | None:
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def _backend_missing(backend: str, device: str) -> str | None:
    """Why vcr_ops can't run a backend here, found by running a map of four numbers through it."""
    try:
        import vcr_ops

        middle = vcr_ops.VisualConceptReasoning(4, 1, backend=backend).eval().to(device)
        with torch.no_grad():
            middle(torch.zeros(1, 4, 1, 1, device=device))
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        return _first_line(error)
    return None


def _needs(backend: str, device: str = "cpu") -> Callable[[Case], str | None]:
    return lambda case: _backend_missing(backend, device)


@functools.cache
def _compiler_missing() -> str | None:
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1 turns torch.compile off"
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers if compiler):
        return "torch.compile needs a C++ compiler on the path (or CXX)"
    return None


def _needs_compiler(why_not: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: why_not(case) or _compiler_missing()


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("fused", "vcr_ops C++", "product", _product("cpp"), _needs("cpp")),
        Provider("reference", "python_ref", "alternative", _reference, _always),
        Provider(
            "reference_compiled",
            "python_ref compiled",
            "alternative",
            _reference,
            _needs_compiler(_always),
            "reference",
        ),
        Provider("composite", "composite", "alternative", _product("composite"), _needs("composite")),
        Provider(
            "composite_compiled",
            "composite compiled",
            "alternative",
            _product("composite"),
            _needs_compiler(_needs("composite")),
            "composite",
        ),
        Provider("plain", "plain ResNeXt", "plain", _plain, _always),
        Provider("plain_compiled", "plain compiled", "plain", _plain, _needs_compiler(_always), "plain"),
    )
}
