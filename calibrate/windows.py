"""The three window schedules of inter-layer sliding (SliderQuant, arXiv 2603.25284): pure functions."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """Decoder blocks ``first..last``, both included, that are optimised together."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


def shallow_windows(blocks: int, size: int) -> list[Window]:
    """Progressively expanded from the first block: [0] [0,1] ... [0..size-1]."""
    return [Window(0, last) for last in range(min(size, blocks))]


def intermediate_windows(first: int, last: int, size: int, stride: int) -> list[Window]:
    """Fixed-size windows that slide from ``first`` and end no later than ``last``."""
    return [Window(start, start + size - 1) for start in range(first, last - size + 2, stride)]


def deep_windows(blocks: int, size: int) -> list[Window]:
    """Progressively contracted onto the last block: [L-size..L-1] ... [L-1]."""
    return [Window(first, blocks - 1) for first in range(max(blocks - size, 0), blocks)]


def schedule(blocks: int, shallow: int = 4, deep: int = 4, size: int = 2, stride: int = 1) -> list[Window]:
    """All windows of a model of ``blocks`` decoder blocks, in the order in which they are optimised.

    The intermediate part shares ``stride`` blocks with the shallow one and one block with the deep one. For any
    number of blocks the schedule covers every block, never steps back and ends on the last block.

    Raises:
        ValueError: a size that is no size, or a stride that would jump over blocks.
    """
    if blocks < 1:
        raise ValueError(f"blocks: expected at least 1, found {blocks}")
    if min(shallow, deep) < 0 or size < 1 or not 1 <= stride <= size:
        raise ValueError(
            "windows: expected shallow >= 0, deep >= 0 and 1 <= stride <= size, found "
            f"shallow={shallow}, deep={deep}, size={size}, stride={stride}"
        )
    last_intermediate = max(blocks - max(deep, 1), 0)
    windows = shallow_windows(blocks, shallow)
    windows += intermediate_windows(max(shallow - stride, 0), last_intermediate, size, stride)
    covered = windows[-1].last + 1 if windows else 0
    if covered < (last_intermediate if deep else blocks):
        start = windows[-1].first + stride if windows else 0
        windows.append(Window(min(start, covered), last_intermediate))
    windows += deep_windows(blocks, deep)
    return list(dict.fromkeys(windows))
