"""concept_reason: h, edge, weight, bias (and given statistics) -> state, mean, var."""

import itertools

import python_ref

from .. import grid
from ..grid import Case
from . import Adapter, Tensors


class ConceptReason(Adapter):
    name = "concept_reason"
    maps = ()
    small = ("h", "mean", "var")
    constants = ("mean", "var")

    def cases(self, choices=grid.EVERYTHING):
        return grid.pairwise(
            self.name,
            {
                "edges": grid.EDGES,
                "state": ("batch", "given"),
                "dtype": ("f32", "f64"),
                "layout": (None,),
                "size": tuple(name for name in choices.sizes if name != "N2C3p4S3136"),
            },
        )

    def variants(self, **fixed):
        fixed = {"layout": None} | {name: x for name, x in fixed.items() if name not in ("layout", "grad_layout")}
        return [
            Case(self.name, edges=edges, state=state, **fixed)
            for edges, state in itertools.product(grid.EDGES, ("batch", "given"))
        ]

    def make(self, case, random):
        n, concepts, p, _ = case.shape
        pt = max(p // 4, 4)
        inputs = {"h": random(n, concepts, pt), "weight": 1 + 0.2 * random(pt), "bias": 0.2 * random(pt)}
        if case.edges != "none":
            inputs["edge"] = 0.3 * random(*((pt, concepts) if case.edges == "dynamic" else (concepts, concepts)))
        if case.state == "given":
            inputs |= {"mean": 0.2 * random(pt), "var": 0.5 + random(pt).square()}
        return inputs

    @staticmethod
    def call(function, inputs: Tensors, case: Case, **options) -> Tensors:
        rest = {name: x for name, x in inputs.items() if name not in ("h", "edge")}
        out = function(inputs["h"], inputs.get("edge"), **rest, edges=case.edges, **options)
        outputs = {"state": out.state}
        return outputs | {"mean": out.mean, "var": out.var} if case.state == "batch" else outputs

    def ours(self, inputs, case, backend):
        import vcr_ops

        return self.call(vcr_ops.concept_reason, inputs, case, backend=backend)

    def reference(self, inputs, case):
        return self.call(python_ref.concept_reason, inputs, case)


ADAPTER = ConceptReason()
