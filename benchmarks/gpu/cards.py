"""The memory bandwidth that a card's data sheet promises."""

from __future__ import annotations

# Words that must all be in the card's name, and GB/s; the first match counts.
CARDS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H200",), 4800.0),
    (("H100", "NVL"), 3900.0),
    (("H100", "PCIe"), 2000.0),
    (("H100",), 3350.0),
    (("A100", "40GB"), 1555.0),
    (("A100", "80GB"), 2039.0),
    (("A100",), 1555.0),
)


def peak_gbps(name: str, memory_clock_khz: int = 0, bus_bits: int = 0) -> float | None:
    """GB/s of a card by its name; of an unknown one by memory clock (two transfers a cycle) and bus width, if given."""
    for words, gbps in CARDS:
        if all(word.lower() in name.lower() for word in words):
            return gbps
    if memory_clock_khz and bus_bits:
        return round(2 * memory_clock_khz * 1e3 * bus_bits / 8 / 1e9, 1)
    return None
