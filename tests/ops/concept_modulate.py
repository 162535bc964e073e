"""concept_modulate: z, state, the two affine maps (and an attention map) -> out."""

import itertools

import torch

import python_ref

from .. import grid
from ..grid import Case
from . import Adapter, Tensors


class ConceptModulate(Adapter):
    name = "concept_modulate"
    maps = ("z",)
    small = ("state", "attention")

    def cases(self, choices=grid.EVERYTHING):
        return grid.pairwise(
            self.name,
            {
                "modulation": grid.MODULATIONS,
                "affine": grid.AFFINES,
                "dtype": choices.dtypes,
                "parameters": (None, "f32"),
                "layout": choices.layouts,
                "grad_layout": choices.grad_layouts,
                "size": choices.sizes,
            },
        )

    def variants(self, **fixed):
        return [
            Case(self.name, modulation=modulation, affine=affine, **fixed)
            for modulation, affine in itertools.product(grid.MODULATIONS, grid.AFFINES)
        ]

    def make(self, case, random):
        n, concepts, p, spatial = case.shape
        pt = max(p // 4, 4)
        inputs = {
            "z": random(n, concepts * p, *spatial),
            "state": random(n, concepts, pt).relu(),
            "scale_bias": 1 + 0.2 * random(concepts, p),
            "shift_bias": 0.2 * random(concepts, p),
        }
        if case.affine != "shift":
            inputs["scale_weight"] = 0.3 * random(concepts, pt, p)
        if case.affine != "scale":
            inputs["shift_weight"] = 0.3 * random(concepts, pt, p)
        if case.modulation == "pixel":
            logits = 2 * random(n, concepts, *spatial)
            inputs["attention"] = torch.softmax(logits.flatten(2), 2).reshape(logits.shape)
        return inputs

    @staticmethod
    def call(function, inputs: Tensors, case: Case, **options) -> Tensors:
        inputs = dict(inputs)
        first = [inputs.pop(name) for name in ("z", "state", "scale_bias", "shift_bias")]
        return {"out": function(*first, **inputs, **options)}

    def ours(self, inputs, case, backend):
        import vcr_ops

        return self.call(vcr_ops.concept_modulate, inputs, case, backend=backend)

    def reference(self, inputs, case):
        return self.call(python_ref.concept_modulate, inputs, case)


ADAPTER = ConceptModulate()
