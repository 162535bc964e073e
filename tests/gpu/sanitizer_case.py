"""A short round through every op on odd sizes, for compute-sanitizer: ``python -m tests.gpu.sanitizer_case``."""

from tests.ops import adapters

from .machine import DEVICE, backend_for, synchronize

# Tails in every dimension: 5 channels of 3 concepts, 65 positions; one position; a width past a power of two.
SIZES = ("N1C3p5S65", "N3C4p4S1", "N2C2p33S33")


def main() -> None:
    count = 0
    for adapter in adapters().values():
        for size in SIZES:
            for layout in ("contiguous", "channels_last"):
                every = adapter.variants(dtype="f32", size=size, layout=layout)
                for case in (every[0], every[-1]):
                    inputs, gradients = adapter.draw(case)
                    adapter.our_result(inputs, gradients, case, backend_for(case), DEVICE)
                    count += 1
    synchronize()
    print(f"{count} cases ran")


if __name__ == "__main__":
    main()
