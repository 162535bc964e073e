"""One adapter per op: it makes inputs, calls the op and calls the reference. What they share stands here."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..closeness import MINIMUM_DRAWS, Closeness, Result
from ..extended import fine_result
from ..grid import EVERYTHING, LOW_PRECISION, Case, Choices, arrange, same_images

Tensors = dict[str, Tensor]

# A pre-activation this near to zero (beside its own size) may come out on either side of it in float32, and then a
# gradient is there or not: nothing that an error measures. Such draws are made again, but for bfloat16 and float16:
# there it happens all the time, to plain PyTorch as well.
RELU_MARGIN = 2e-5


class Adapter:
    """What the tests need to know of an op.

    Attributes:
        name: the op's.  maps: its inputs of the map's size and type.  small: its inputs in the accumulation type.
        constants: its inputs that have no gradient.
    """

    name: str
    maps: tuple[str, ...]
    small: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()

    def cases(self, choices: Choices = EVERYTHING) -> list[Case]:
        """The grid."""
        raise NotImplementedError

    def variants(self, **fixed: str) -> list[Case]:
        """Every combination of variants, on one small problem."""
        raise NotImplementedError

    def make(self, case: Case, random: Callable[..., Tensor]) -> Tensors:
        """Inputs in float64, contiguous. ``random(*shape)`` is normal."""
        raise NotImplementedError

    def ours(self, inputs: Tensors, case: Case, backend: str) -> Tensors:
        """Outputs of the op."""
        raise NotImplementedError

    def reference(self, inputs: Tensors, case: Case) -> Tensors:
        """Outputs of the equations, by the same names."""
        raise NotImplementedError

    def dtype_of(self, name: str, case: Case) -> torch.dtype:
        """The type of an input."""
        if name in self.maps:
            return case.feature_dtype
        return case.small_dtype if name in self.small else case.parameter_dtype

    def layout_of(self, name: str, case: Case) -> str | None:
        """The strides of an input; None: as it comes."""
        return case.layout if name in self.maps else None

    def draw(self, case: Case, index: int = 0) -> tuple[Tensors, Tensors]:
        """(inputs, gradients of the outputs), float64, with values that the case's types hold exactly."""
        for attempt in range(200):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{case.id} {index} {attempt}".encode()))

            def random(*shape: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(shape, generator=generator, dtype=torch.float64)

            inputs = {}
            for name, x in self.make(case, random).items():
                inputs[name] = x.to(self.dtype_of(name, case)).double()
                if name in self.maps and case.layout == "expanded":
                    inputs[name] = same_images(inputs[name])
            with relu_margin() as margin, torch.no_grad():
                outputs = self.reference(inputs, case)
            if case.dtype not in LOW_PRECISION and margin[0] < RELU_MARGIN:
                continue
            gradients = {}
            for name in self.differentiable(outputs):
                gradients[name] = random(*outputs[name].shape).to(case.feature_dtype).double()
                if case.grad_layout == "expanded":
                    gradients[name] = same_images(gradients[name])
            return inputs, gradients
        raise RuntimeError(f"{case.id}: no draw keeps its distance from the kink of ReLU")

    def differentiable(self, outputs: Tensors) -> list[str]:
        """The outputs that have gradients: all but statistics."""
        return [name for name in outputs if not name.endswith(("mean", "var"))]

    def leaves(self, inputs: Tensors, case: Case, device: str = "cpu") -> Tensors:
        """The inputs in the case's types and strides, requiring gradients."""
        leaves = {}
        for name, x in inputs.items():
            x = x.to(device, self.dtype_of(name, case))
            layout = self.layout_of(name, case)
            x = x.clone() if layout is None or x.dim() < 3 else arrange(x, layout)
            leaves[name] = x.requires_grad_(name not in self.constants)
        return leaves

    def run(
        self, function: Callable[[Tensors, Case], Tensors], leaves: Tensors, gradients: Tensors, case: Case
    ) -> Result:
        """Outputs of ``function`` and the gradients of all its inputs."""
        outputs = function(leaves, case)
        names = [name for name in gradients if outputs[name].requires_grad]
        wanted = [name for name, x in leaves.items() if x.requires_grad]
        grad_outputs = []
        for name in names:
            gradient = gradients[name].to(outputs[name].device, outputs[name].dtype)
            grad_outputs.append(arrange(gradient, case.grad_layout) if case.grad_layout else gradient)
        found = torch.autograd.grad(
            [outputs[name] for name in names], [leaves[name] for name in wanted], grad_outputs, allow_unused=True
        )
        got = {
            name: torch.zeros_like(leaves[name]) if gradient is None else gradient
            for name, gradient in zip(wanted, found, strict=True)
        }
        return Result({name: x.detach() for name, x in outputs.items()}, got)

    def reference_result(self, inputs: Tensors, gradients: Tensors, case: Case) -> Result:
        """The reference in float64; in long double for float64 itself."""
        if case.dtype == "f64":
            return fine_result(inputs, gradients, case, self.constants)
        exact = case.but(dtype="f64", parameters=None, layout="contiguous", grad_layout=None)
        return self.run(self.reference, self.leaves(inputs, exact), gradients, exact)

    def plain_result(self, inputs: Tensors, gradients: Tensors, case: Case) -> Result:
        """Plain PyTorch in the case's types."""
        return self.run(self.reference, self.leaves(inputs, case), gradients, case)

    def our_result(self, inputs: Tensors, gradients: Tensors, case: Case, backend: str, device: str = "cpu") -> Result:
        return self.run(lambda x, c: self.ours(x, c, backend), self.leaves(inputs, case, device), gradients, case)

    def sensitivity(self, inputs: Tensors, gradients: Tensors, case: Case) -> dict[str, float]:
        """How far each result moves when every input moves by a random 1e-9 of itself; the 2-norm."""
        case = case.but(dtype="f64", parameters=None, layout="contiguous", grad_layout=None)
        generator = torch.Generator().manual_seed(0)
        moved = {}
        for name, x in inputs.items():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            moved[name] = x if name in self.constants else x * (1 + 1e-9 * noise)
        here, there = (
            self.run(self.reference, self.leaves(x, case), gradients, case).tensors() for x in (inputs, moved)
        )
        return {name: float(torch.linalg.vector_norm(there[name] - here[name])) for name in here}

    def closeness(
        self,
        case: Case,
        backend: str,
        change: Callable[[Result, Tensors, Tensors], None] | None = None,
        *,
        inference: bool = False,
        device: str = "cpu",
    ) -> Closeness:
        """Draws enough for the tolerance. ``change`` may put a fault into our result.

        inference: run ours under no_grad, as kernels of their own may do that; outputs alone are judged.
        device: where ours runs; plain PyTorch and the reference stay on the CPU.
        """
        label = f"{case.id}-{backend}"
        closeness = Closeness(case.feature_dtype, label)
        results: list[tuple[Result, Result, Result]] = []

        def add() -> None:
            inputs, gradients = self.draw(case, len(results))
            if inference:
                with torch.no_grad():
                    ours = Result(self.ours(self.leaves(inputs, case, device), case, backend))
            else:
                ours = self.our_result(inputs, gradients, case, backend, device)
            if change is not None:
                change(ours, inputs, gradients)
            plain, reference = (
                self.plain_result(inputs, gradients, case),
                self.reference_result(inputs, gradients, case),
            )
            if inference:
                plain, reference = Result(plain.outputs), Result(reference.outputs)
            results.append((ours, plain, reference))
            closeness.add(*results[-1])

        # The fewer elements, the more draws: a root mean square over few numbers is luck too. Large maps are slow.
        add()
        elements = min(n for n in (math.prod(x.shape) for x in results[0][2].tensors().values()) if n)
        draws = max(MINIMUM_DRAWS, min(20, math.ceil(100 / elements)))
        size = math.prod(case.shape[:3]) * math.prod(case.shape[3])
        if size > 10_000:
            draws = min(draws, 8)
        # The interpreter is slow: it goes on only where the first draws are beyond the limit.
        while len(results) < (MINIMUM_DRAWS if backend == "triton" else draws):
            add()
        while len(results) < draws and closeness.worst_ratio() > 1:
            add()
        # What is a little beyond the limit is looked at closely before it fails: more draws, less those that are badly
        # conditioned. One of these outweighs all the others, and is luck again.
        moves: list[dict[str, float]] = []
        for more in (4, 16):
            if case.dtype in LOW_PRECISION or not 1 < closeness.worst_ratio() < 2 or (size > 4_000 and more > 4):
                break
            while len(results) < more * draws:
                add()
            moves += [self.sensitivity(*self.draw(case, index), case) for index in range(len(moves), len(results))]
            usual = {name: median(move[name] for move in moves) for name in moves[0]}
            closeness = Closeness(case.feature_dtype, label)
            for result, move in zip(results, moves, strict=True):
                if all(move[name] <= 5 * usual[name] for name in usual):
                    closeness.add(*result)
        return closeness


@contextlib.contextmanager
def relu_margin() -> Iterator[list[float]]:
    """How near to zero python_ref's pre-activations came, beside their root mean square: the list's one element."""
    smallest = [math.inf]
    relu = F.relu

    def spy(x: Tensor, inplace: bool = False) -> Tensor:
        if x.numel():
            smallest[0] = min(smallest[0], float(x.abs().amin() / x.square().mean().sqrt().clamp_min(1e-30)))
        return relu(x, inplace)

    with mock.patch.object(F, "relu", spy):
        yield smallest


def adapters() -> dict[str, Adapter]:
    """All of them, by the op's name."""
    from . import concept_modulate, concept_reason, concept_sample, vcr_middle

    return {m.ADAPTER.name: m.ADAPTER for m in (concept_sample, concept_reason, concept_modulate, vcr_middle)}
