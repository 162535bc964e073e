"""What a network's stages give, for pyramids: their names, channels and reductions, and which of them are wanted."""

from collections.abc import Sequence
from typing import Any

from .. import checks

OutIndices = int | Sequence[int]


class FeatureInfo(list[dict[str, Any]]):
    """One dict for each level, as timm has them: num_chs, reduction (input size / output size) and module (its path).

    Args:
        levels: of the whole network, from the stem on. out_indices: the levels that a pyramid gives.
    """

    def __init__(self, levels: Sequence[dict[str, Any]], out_indices: Sequence[int] | None = None) -> None:
        super().__init__(dict(level, index=index) for index, level in enumerate(levels))
        self.out_indices = tuple(range(len(self))) if out_indices is None else tuple(out_indices)

    def _of(self, key: str) -> list[Any]:
        return [self[index][key] for index in self.out_indices]

    def channels(self) -> list[int]:
        """The channels of each level that is given."""
        return self._of("num_chs")

    def reduction(self) -> list[int]:
        """How many times smaller than the input each level is that is given."""
        return self._of("reduction")

    def module_name(self) -> list[str]:
        """The module that makes each level that is given."""
        return self._of("module")


def take_indices(argument: str, got: object, count: int) -> list[int]:
    """The levels that are asked for: None is all of ``count``, a number the last so many, negative ones from the end.

    Raises:
        TypeError, ValueError: no int, sequence of ints or None; none at all; or one that isn't there.
    """
    if got is None:
        return list(range(count))
    if isinstance(got, int) and not isinstance(got, bool):
        checks.check_count(argument, got)
        if got > count:
            raise ValueError(f"{argument} is {got}, the last so many levels; there are {count}")
        return list(range(count - got, count))
    if not isinstance(got, Sequence) or isinstance(got, str):
        raise TypeError(f"{argument} is {got!r}; it takes an int, a sequence of ints or None")
    if not got:
        raise ValueError(f"{argument} is empty; it takes at least one level")
    for index in got:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"{argument} is {got!r}; it takes an int, a sequence of ints or None")
        if not -count <= index < count:
            raise ValueError(f"{argument} is {got!r}; the levels are 0 to {count - 1}")
    return [index % count for index in got]
