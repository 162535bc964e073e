"""The equations once more, in numpy's long double with gradients of their own: the reference of float64 results.

float64 can't judge float64. Where long double is 80 bits (x86) or 128 (Arm under Linux), a rounding of this page's
numbers is 2,000 times smaller than one of float64's. Names and shapes are python_ref's; maps are (N, C, p, S).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .closeness import Result
from .grid import Case

Array = np.ndarray
FINE = np.longdouble


class Node:
    """A value, and how its gradient goes to what it was made of."""

    def __init__(self, value: Array, *parents: tuple[Node, Callable[[Array], Array]]) -> None:
        self.value, self.parents = value, parents
        self.gradient: Array | None = None

    def __add__(self, other: Node | float) -> Node:
        if not isinstance(other, Node):
            return Node(self.value + other, (self, lambda g: g))
        return Node(self.value + other.value, (self, lambda g: g), (other, lambda g: g))

    def __mul__(self, other: Node | float) -> Node:
        if not isinstance(other, Node):
            return Node(self.value * other, (self, lambda g: g * other))
        return Node(self.value * other.value, (self, lambda g: g * other.value), (other, lambda g: g * self.value))

    def __sub__(self, other: Node) -> Node:
        return self + other * FINE(-1)

    def __truediv__(self, other: Node) -> Node:
        return self * other.map(lambda x: 1 / x, lambda x, y: -y * y)

    def map(self, f: Callable[[Array], Array], derivative: Callable[[Array, Array], Array]) -> Node:
        """f of each element; ``derivative(x, f(x))``."""
        y = f(self.value)
        return Node(y, (self, lambda g: g * derivative(self.value, y)))

    def sum(self, *axes: int) -> Node:
        return Node(self.value.sum(axes, keepdims=True), (self, lambda g: np.broadcast_to(g, self.value.shape)))

    def mean(self, *axes: int) -> Node:
        return self.sum(*axes) * (FINE(1) / math.prod(self.value.shape[a] for a in axes))

    def max(self, axis: int) -> Node:
        top = self.value.max(axis, keepdims=True)
        ties = self.value == top
        return Node(top, (self, lambda g: g * ties / ties.sum(axis, keepdims=True)))

    def reshape(self, *shape: int) -> Node:
        return Node(self.value.reshape(shape), (self, lambda g: g.reshape(self.value.shape)))

    def relu(self) -> Node:
        return self.map(lambda x: np.maximum(x, 0), lambda x, y: (x > 0).astype(FINE))

    def backward(self, gradient: Array) -> None:
        order: list[Node] = []
        seen: set[int] = set()

        def visit(node: Node) -> None:
            if id(node) not in seen:
                seen.add(id(node))
                for parent, _ in node.parents:
                    visit(parent)
                order.append(node)

        visit(self)
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        for node in reversed(order):
            if node.gradient is None:
                continue
            for parent, vjp in node.parents:
                g = vjp(node.gradient)
                extra = g.ndim - parent.value.ndim
                g = g.sum(tuple(range(extra)))
                kept = tuple(i for i, n in enumerate(parent.value.shape) if n == 1 and g.shape[i] != 1)
                g = g.sum(kept, keepdims=True)
                parent.gradient = g if parent.gradient is None else parent.gradient + g
            if node.parents:
                node.gradient = None


def einsum(spec: str, a: Node, b: Node) -> Node:
    """A product in which every index of a factor is one of the other factor's or of the result's."""
    inputs, out = spec.split("->")
    i, j = inputs.split(",")
    value = np.einsum(spec, a.value, b.value)
    return Node(
        value,
        (a, lambda g: np.einsum(f"{out},{j}->{i}", g, b.value)),
        (b, lambda g: np.einsum(f"{i},{out}->{j}", a.value, g)),
    )


def softmax(x: Node) -> Node:
    e = (x - Node(x.value.max(-1, keepdims=True))).map(np.exp, lambda x, y: y)
    return e / e.sum(-1)


def batch_norm(
    x: Node, axes: tuple[int, ...], v: dict[str, Node], prefix: str, shape: tuple[int, ...]
) -> tuple[Node, dict]:
    """x normalised over ``axes``, and the statistics of the batch."""
    statistics = {}
    if f"{prefix}mean" in v:
        mean, var = v[f"{prefix}mean"].reshape(*shape), v[f"{prefix}var"].reshape(*shape)
        centred = x - mean
    else:
        mean = x.mean(*axes)
        centred = x - mean
        var = (centred * centred).mean(*axes)
        count = math.prod(x.value.shape[a] for a in axes)
        unbiased = var.value.ravel() * (FINE(count) / (count - 1))
        statistics = {f"{prefix}mean": mean.value.ravel(), f"{prefix}var": unbiased}
    x = centred / (var + FINE(1e-5)).map(np.sqrt, lambda x, y: FINE(0.5) / y)
    if f"{prefix}weight" in v:
        x = x * v[f"{prefix}weight"].reshape(*shape) + v[f"{prefix}bias"].reshape(*shape)
    return x, statistics


def sample(z: Node, v: dict[str, Node], sampler: str | None) -> tuple[Node, Node | None]:
    """h (N, C, p̃) and M (N, C, S) of z (N, C, p, S)."""
    n, concepts, p, _ = z.value.shape
    mean = z.mean(3).reshape(n, concepts, p)
    if sampler == "pool":
        return einsum("ncp,cpk->nck", mean, v["value"]), None
    if sampler == "dynamic":
        q = einsum("ncp,cpk->nck", mean, v["query"])
        K = einsum("ncps,cpk->ncks", z, v["key"])
        logits = einsum("nck,ncks->ncs", q, K) * (1 / np.sqrt(FINE(q.value.shape[2])))
    else:
        logits = einsum("ncps,cp->ncs", z, v["logit"])
    M = softmax(logits)
    return einsum("ncp,cpk->nck", einsum("ncps,ncs->ncp", z, M), v["value"]), M


def reason(h: Node, v: dict[str, Node], edges: str | None, prefix: str) -> tuple[Node, dict]:
    if edges == "dynamic":
        A = einsum("nck,kd->ncd", h, v["edge"]).map(np.tanh, lambda x, y: 1 - y * y)
        h = h + einsum("ncd,ndk->nck", A, h)
    elif edges == "static":
        h = h + einsum("cd,ndk->nck", v["edge"], h)
    x, statistics = batch_norm(h, (0, 1), v, prefix, (1, 1, h.value.shape[2]))
    return x.relu(), statistics


def modulate(z: Node, state: Node, v: dict[str, Node], attention: Node | None) -> Node:
    n, concepts, p, _ = z.value.shape

    def parameter(name: str) -> Node:
        x = v[f"{name}_bias"].reshape(1, concepts, p, 1)
        if f"{name}_weight" not in v:
            return x
        if attention is None:
            return einsum("nck,ckp->ncp", state, v[f"{name}_weight"]).reshape(n, concepts, p, 1) + x
        spread = einsum("ncs,nck->ncks", attention / attention.max(2), state)
        return einsum("ncks,ckp->ncps", spread, v[f"{name}_weight"]) + x

    return (parameter("scale") * z + parameter("shift")).relu()


def fine_result(
    inputs: dict[str, Tensor], gradients: dict[str, Tensor], case: Case, constants: tuple[str, ...]
) -> Result:
    """Outputs and gradients of a case's op, as long double arrays."""
    n, concepts, p, spatial = case.shape
    split = (n, concepts, p, math.prod(spatial))
    v = {name: Node(x.numpy().astype(FINE)) for name, x in inputs.items()}
    outputs: dict[str, Node] = {}
    statistics: dict[str, Array] = {}
    shapes: dict[str, tuple[int, ...]] = {"out": (n, concepts * p, *spatial), "attention": (n, concepts, *spatial)}
    if case.op == "concept_sample":
        outputs["h"], M = sample(v["z"].reshape(*split), v, case.sampler)
        if case.attention == "with":
            assert M is not None
            outputs["attention"] = M
    elif case.op == "concept_reason":
        outputs["state"], statistics = reason(v["h"], v, case.edges, "")
    elif case.op == "concept_modulate":
        attention = v["attention"].reshape(n, concepts, -1) if "attention" in v else None
        outputs["out"] = modulate(v["z"].reshape(*split), v["state"], v, attention)
    else:
        z, norm_statistics = v["y"].reshape(*split), {}
        if case.norm != "none":
            z, norm_statistics = batch_norm(z, (0, 3), v, "norm_", (1, concepts, p, 1))
        h, M = sample(z, v, case.sampler)
        state, statistics = reason(h, v, case.edges, "state_")
        outputs["out"] = modulate(z, state, v, M if case.modulation == "pixel" else None)
        statistics = norm_statistics | statistics
    for name, node in outputs.items():
        if name in gradients:
            node.backward(gradients[name].numpy().astype(FINE).reshape(node.value.shape))
    values = {name: node.value.reshape(shapes.get(name, node.value.shape)) for name, node in outputs.items()}
    found = {}
    for name, node in v.items():
        if name not in constants:
            found[name] = np.zeros_like(node.value) if node.gradient is None else node.gradient
    return Result(values | statistics, found)


def is_fine() -> bool:
    """True where long double is finer than float64."""
    return np.finfo(FINE).eps < torch.finfo(torch.float64).eps / 100
