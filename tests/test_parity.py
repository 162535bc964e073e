"""Proves: every op, variant, dtype and layout stands as near to the float64 reference as plain PyTorch does, outputs
and all gradients, with fresh memory full of NaN."""

import functools

import pytest

from .ops import adapters

ADAPTERS = adapters()
CASES = [case for adapter in ADAPTERS.values() for case in adapter.cases()]
# The composite needs no case of its own for the strides of slices: PyTorch's ops take care of them.
COMPOSITE = [case for case in CASES if case.layout in (None, "contiguous", "channels_last", "permuted")]


def with_backends(cases, composite):
    pairs = [(case, "cpp") for case in cases] + [(case, "composite") for case in composite]
    return functools.partial(
        pytest.mark.parametrize, "case, backend", pairs, ids=[f"{case.id}-{backend}" for case, backend in pairs]
    )()


@with_backends(CASES, COMPOSITE)
def test_close_to_float64(case, backend, nan_memory):
    ADAPTERS[case.op].closeness(case, backend).check()
