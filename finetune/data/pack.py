"""Several short rows in one sequence: which rows go together, decided over all rows at once.

Best fit, longest row first: each row goes where it leaves least room. The open room is a set of integers kept as the
bits of one number, so the best place is found in one shift; 100,000 rows take a fraction of a second.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from finetune.data.encode import UNTRAINED


def pack(lengths: Sequence[int], max_length: int, seed: int = 42) -> list[list[int]]:
    """Put rows into as few bins as best fit finds. No row is split.

    Args:
        lengths: tokens of each row.
        max_length: tokens that a bin holds.
        seed: order of the bins, which would otherwise run from long rows to short.

    Returns:
        Row indexes of each bin. Every row stands in exactly one.

    Raises:
        ValueError: a row is empty, or longer than a bin.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> bins that have exactly that
    rooms = 0  # bit r is set when some bin has room r
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
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
    random.Random(seed).shuffle(bins)
    return bins


def density(lengths: Sequence[int], bins: Sequence[Sequence[int]], max_length: int) -> float:
    """The share of the bins' room that holds tokens, from 0 to 1."""
    return sum(lengths) / (len(bins) * max_length) if bins else 0.0


def join(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """One packed row of several token rows.

    The first label of each is -100: its prediction would come from the end of another row.

    Returns:
        `input_ids`, `labels`, and `seq_lengths` (tokens of each row, in order).
    """
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in (UNTRAINED, *row["labels"][1:])],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
    }


def packed(rows: datasets.Dataset, max_length: int, seed: int = 42) -> datasets.Dataset:
    """Token rows packed into sequences of at most `max_length` tokens.

    Returns:
        Columns `input_ids`, `labels`, `seq_lengths`, and of each row that went in: `source`, `row`, `turn` (lists).
    """
    bins = pack([len(ids) for ids in rows["input_ids"]], max_length, seed)

    def joined() -> Any:
        for indexes in bins:
            parts = [rows[at] for at in indexes]
            yield {**join(parts), **{key: [part[key] for part in parts] for key in ("source", "row", "turn")}}

    integers = datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        dict.fromkeys(("input_ids", "labels", "seq_lengths", "row", "turn"), integers)
        | {"source": datasets.List(datasets.Value("string"))}
    )
    return datasets.Dataset.from_list(list(joined()), features=features)
