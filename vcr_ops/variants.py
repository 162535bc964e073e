"""The legal choices of each variant, by the names that cross the op boundary; csrc/common/variants.h holds the same."""

SAMPLERS = ("dynamic", "static", "pool")
EDGES = ("dynamic", "static", "none")
MODULATIONS = ("channel", "pixel")
AFFINES = ("both", "scale", "shift")
NORMS = ("batch", "given", "none")
"""Where the first batch norm's statistics come from: this batch, the caller, or there is no batch norm at all."""


def state_width(p: int) -> int:
    """p̃, the width of a concept's state, for p channels per concept.

    ``max`` where the paper prints ``min``: only ``max`` reproduces the parameter counts of its tables.
    """
    return max(p // 4, 4)
