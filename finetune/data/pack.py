"""Units of training: a row by itself, or short rows that share a sequence, decided over all rows at once.

Best fit, longest row first: each row goes where it leaves least room. The open room is a set of integers kept as the
bits of one number, so the best place is found in one shift; 100,000 rows take a fraction of a second. Nothing is
copied: a unit is a list of pieces, a piece is a range of a row's tokens, and rows stay where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Piece = tuple[int, int, int]  # row number, its first token, the token behind its last


@dataclass(frozen=True, eq=False)
class Units:
    """What is never parted: each unit is one sequence of documents, each document a piece of a row.

    Attributes:
        offsets: int64 (units + 1,), where each unit's pieces begin.
        row: int64 (pieces,), row numbers.
        start: int32 (pieces,), the first token taken of the row.
        end: int32 (pieces,), the token behind the last.
    """

    offsets: np.ndarray
    row: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, unit: int) -> list[Piece]:
        """The pieces of a unit."""
        own = slice(int(self.offsets[unit]), int(self.offsets[unit + 1]))
        return list(zip(self.row[own].tolist(), self.start[own].tolist(), self.end[own].tolist(), strict=True))

    @cached_property
    def tokens(self) -> np.ndarray:
        """int64 (units,): tokens of each."""
        return self._sums((self.end - self.start).astype(np.int64))

    @cached_property
    def squares(self) -> np.ndarray:
        """int64 (units,): the sum of squared document lengths of each, what attention costs."""
        return self._sums((self.end - self.start).astype(np.int64) ** 2)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self.offsets[:-1]) if len(self) else np.empty(0, np.int64)


def singles(lengths: np.ndarray) -> Units:
    """Each row by itself.

    Args:
        lengths: integers (rows,), tokens of each row.
    """
    count = len(lengths)
    return Units(
        np.arange(count + 1, dtype=np.int64),
        np.arange(count, dtype=np.int64),
        np.zeros(count, np.int32),
        np.asarray(lengths, np.int32),
    )


def best_fit(lengths: np.ndarray, max_length: int) -> Units:
    """Put whole rows into as few bins as best fit, longest first, finds.

    Args:
        lengths: integers (rows,), tokens of each row.
        max_length: tokens that a bin holds.

    Raises:
        ValueError: a row is empty, or longer than a bin.
    """
    lengths = np.asarray(lengths, np.int64)
    bins = pack(lengths.tolist(), max_length)
    row = np.fromiter((index for content in bins for index in content), np.int64, len(lengths))
    ends = lengths[row].astype(np.int32)
    return Units(_offsets(len(content) for content in bins), row, np.zeros(len(row), np.int32), ends)


def wrapped(lengths: np.ndarray, max_length: int, seed: int) -> Units:
    """Rows in shuffled order as one stream, cut every `max_length` tokens; only the last bin may be short.

    What follows a cut is a document of its own in the next bin: it does not see what stood before.

    Args:
        lengths: integers (rows,), tokens of each row.
        max_length: tokens that a bin holds.
        seed: of the order.
    """
    order = shuffled(len(lengths), seed)
    sizes = np.asarray(lengths, np.int64)[order]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    total = int(ends[-1]) if len(ends) else 0
    borders = np.union1d(starts, np.arange(0, total, max_length))  # of pieces, in the stream
    piece_ends = np.append(borders[1:], total) if total else borders
    row = np.searchsorted(starts, borders, side="right") - 1
    first = np.searchsorted(borders, np.arange(0, total, max_length))
    return Units(
        np.append(first, len(borders)).astype(np.int64),
        order[row],
        (borders - starts[row]).astype(np.int32),
        (piece_ends - starts[row]).astype(np.int32),
    )


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """int64 (count,): the numbers below `count` in an order that the seeds alone decide.

    Sorted by the raw output of PCG64, which numpy keeps the same in all its versions, as it does not its shuffle.
    """
    return np.argsort(np.random.PCG64(list(seeds)).random_raw(count), kind="stable")


def _offsets(sizes: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *sizes], dtype=np.int64)


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put rows into as few bins as best fit finds. No row is split.

    Args:
        lengths: tokens of each row.
        max_length: tokens that a bin holds.

    Returns:
        Row indexes of each bin. Every row stands in exactly one.

    Raises:
        ValueError: a row is empty, or longer than a bin.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> bins that have exactly that
    rooms = 0  # bit r is set when some bin has room r
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[index]
        if not 0 < length <= max_length:
            raise ValueError(f"row {index} has {length} tokens; a bin holds 1 to {max_length}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            place = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, place = max_length, len(bins)
            bins.append([])
        bins[place].append(index)
        if left := room - length:
            with_room.setdefault(left, []).append(place)
            rooms |= 1 << left
    return bins


def density(units: Units, max_length: int) -> float:
    """The share of the units' room that holds tokens, from 0 to 1."""
    return float(units.tokens.sum()) / (len(units) * max_length) if len(units) else 0.0
