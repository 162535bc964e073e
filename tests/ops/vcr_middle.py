"""The fused middle: y and every parameter -> out, and the statistics of the batch."""

import itertools

import python_ref

from .. import grid
from ..grid import Case
from . import Adapter, Tensors

SMALL_SIZES = tuple(name for name in grid.SIZES if name != "N2C3p4S3136")


def well_posed(case: Case) -> bool:
    """False where plain PyTorch has nothing to be measured by.

    Equal images can leave the states of the batch without variance: only rounding errors are normalised. A map far from
    zero that no norm centres overflows float16.
    """
    concepts = case.shape[1]
    if case.dtype == "f16" and case.offset is not None and case.norm == "none":
        return False
    return not (case.state == "batch" and concepts == 1 and case.layout == "expanded")


class VcrMiddle(Adapter):
    name = "vcr_middle"
    maps = ("y",)
    small = ("norm_mean", "norm_var", "state_mean", "state_var")
    constants = small

    def cases(self, choices=grid.EVERYTHING):
        return grid.pairwise(
            self.name,
            {
                "sampler": grid.SAMPLERS,
                "edges": grid.EDGES,
                "modulation": grid.MODULATIONS,
                "affine": grid.AFFINES,
                "norm": grid.NORMS,
                "state": ("batch", "given"),
                "dtype": choices.dtypes,
                "parameters": (None, "f32"),
                "layout": choices.layouts,
                "grad_layout": choices.grad_layouts,
                "offset": (None, "offset"),
                "size": choices.sizes,
            },
            well_posed,
        )

    def variants(self, **fixed):
        every = [
            Case(self.name, sampler=a, edges=b, modulation=c, affine=d, norm=e, state=f, **fixed)
            for a, b, c, d, (e, f) in itertools.product(
                grid.SAMPLERS,
                grid.EDGES,
                grid.MODULATIONS,
                grid.AFFINES,
                (("batch", "batch"), ("given", "given"), ("none", "batch")),
            )
        ]
        return [case for case in every if grid.legal(case)]

    def make(self, case, random):
        n, concepts, p, spatial = case.shape
        pt, channels = max(p // 4, 4), concepts * p
        inputs = {
            "y": random(n, channels, *spatial),
            "value": random(concepts, p, pt) / p**0.5,
            "scale_bias": 1 + 0.2 * random(concepts, p),
            "shift_bias": 0.2 * random(concepts, p),
            "state_weight": 1 + 0.2 * random(pt),
            "state_bias": 0.2 * random(pt),
        }
        centre = 0
        if case.offset is not None:
            centre = 30 * random(channels)
            inputs["y"] += centre.reshape(-1, *(1,) * len(spatial))
        if case.norm != "none":
            inputs |= {"norm_weight": 1 + 0.2 * random(channels), "norm_bias": 0.2 * random(channels)}
        if case.norm == "given":
            inputs |= {"norm_mean": centre + 0.2 * random(channels), "norm_var": 0.5 + random(channels).square()}
        if case.state == "given":
            inputs |= {"state_mean": 0.2 * random(pt), "state_var": 0.5 + random(pt).square()}
        if case.sampler == "dynamic":
            inputs["query"] = 2 * random(concepts, p, pt) / p**0.5
            inputs["key"] = 2 * random(concepts, p, pt) / p**0.5
        if case.sampler == "static":
            inputs["logit"] = 2 * random(concepts, p) / p**0.5
        if case.edges != "none":
            inputs["edge"] = 0.3 * random(*((pt, concepts) if case.edges == "dynamic" else (concepts, concepts)))
        if case.affine != "shift":
            inputs["scale_weight"] = 0.3 * random(concepts, pt, p)
        if case.affine != "scale":
            inputs["shift_weight"] = 0.3 * random(concepts, pt, p)
        return inputs

    @staticmethod
    def call(function, inputs: Tensors, case: Case, **options) -> Tensors:
        inputs = dict(inputs)
        first = [inputs.pop(name) for name in ("y", "value", "scale_bias", "shift_bias")]
        out, norm_mean, norm_var, state_mean, state_var = function(
            *first,
            **inputs,
            norm=case.norm,
            sampler=case.sampler,
            edges=case.edges,
            modulation=case.modulation,
            **options,
        )
        outputs = {"out": out}
        if case.norm == "batch":
            outputs |= {"norm_mean": norm_mean, "norm_var": norm_var}
        if case.state == "batch":
            outputs |= {"state_mean": state_mean, "state_var": state_var}
        return outputs

    def ours(self, inputs, case, backend):
        import vcr_ops

        return self.call(vcr_ops.visual_concept_reasoning, inputs, case, backend=backend)

    def reference(self, inputs, case):
        return self.call(python_ref.visual_concept_reasoning, inputs, case)


ADAPTER = VcrMiddle()
