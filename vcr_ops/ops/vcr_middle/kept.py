"""What the middle keeps for its backward pass, in numbers; known without any backend's kernels."""


def saved_states(n: int, concepts: int, p: int, pt: int) -> int:
    """Where G stands in ``saved`` (triton_saved.states_at)."""
    return (3 + 5 * n) * concepts * p + 2 * n * concepts * pt


def saved_size(n: int, concepts: int, p: int, pt: int, save: bool) -> int:
    """Numbers in ``saved`` (MiddleSaved::size)."""
    channels = concepts * p
    size = 3 * channels + 5 * n * channels + 4 * n * concepts * pt + 3 * n * concepts + 2 * pt
    return size + (n * concepts * concepts + n * channels * pt if save else 0)
