"""A short round through every op on odd sizes, for compute-sanitizer: ``python -m tests.gpu.sanitizer_case``; with the
backends that the GPU tests have.
"""

import itertools

import torch

from tests.grid import MANY
from tests.ops import adapters

from .machine import BACKENDS, DEVICE, prepare, ready, synchronize

# Tails in every dimension: 5 channels of 3 concepts, 65 positions; one position; a width past a power of two.
SIZES = ("N1C3p5S65", "N3C4p4S1", "N2C2p33S33")


def main() -> None:
    prepare()
    count = 0
    rounds = itertools.product(BACKENDS, adapters().values(), (*SIZES, *MANY), ("contiguous", "channels_last"))
    for backend, adapter, size, layout in rounds:
        every = adapter.variants(dtype="f32", size=size, layout=layout)
        evaluated = [case for case in every if case.norm in (None, "given", "none") and case.state in (None, "given")]
        for case in (every[0], every[-1]) if size not in MANY else ():
            inputs, gradients = adapter.draw(case)
            adapter.our_result(inputs, gradients, case, ready(backend, case), DEVICE)
            count += 1
        for case in (evaluated[0], evaluated[-1]):
            inputs, _ = adapter.draw(case)
            with torch.no_grad():
                adapter.ours(adapter.leaves(inputs, case, DEVICE), case, ready(backend, case))
            count += 1
    synchronize()
    print(f"{count} cases ran, with {' and '.join(BACKENDS)}")


if __name__ == "__main__":
    main()
