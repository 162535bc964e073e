"""concept_sample: z, value, query, key, logit -> h, attention."""

import itertools

import python_ref

from .. import grid
from ..grid import Case
from . import Adapter, Tensors


class ConceptSample(Adapter):
    name = "concept_sample"
    maps = ("z",)

    def cases(self, choices=grid.EVERYTHING):
        return grid.pairwise(
            self.name,
            {
                "sampler": grid.SAMPLERS,
                "attention": ("with", "without"),
                "dtype": choices.dtypes,
                "parameters": (None, "f32"),
                "layout": choices.layouts,
                "size": choices.sizes,
            },
        )

    def variants(self, **fixed):
        every = [
            Case(self.name, sampler=sampler, attention=attention, **fixed)
            for sampler, attention in itertools.product(grid.SAMPLERS, ("with", "without"))
        ]
        return [case for case in every if grid.legal(case)]

    def make(self, case, random):
        n, concepts, p, spatial = case.shape
        pt = max(p // 4, 4)
        inputs = {"z": random(n, concepts * p, *spatial), "value": random(concepts, p, pt) / p**0.5}
        if case.sampler == "dynamic":
            inputs["query"] = 2 * random(concepts, p, pt) / p**0.5
            inputs["key"] = 2 * random(concepts, p, pt) / p**0.5
        if case.sampler == "static":
            inputs["logit"] = 2 * random(concepts, p) / p**0.5
        return inputs

    @staticmethod
    def call(function, inputs: Tensors, case: Case, **options) -> Tensors:
        with_attention = case.attention == "with"
        rest = {name: x for name, x in inputs.items() if name not in ("z", "value")}
        out = function(
            inputs["z"], inputs["value"], **rest, sampler=case.sampler, return_attention=with_attention, **options
        )
        return {"h": out[0], "attention": out[1]} if with_attention else {"h": out}

    def ours(self, inputs, case, backend):
        import vcr_ops

        return self.call(vcr_ops.concept_sample, inputs, case, backend=backend)

    def reference(self, inputs, case):
        return self.call(python_ref.concept_sample, inputs, case)


ADAPTER = ConceptSample()
