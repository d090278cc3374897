"""Which rows an epoch holds, and which are held out: chosen from prepared rows by number, never copied.

Every choice is made by hashes of the seed and of row numbers, not by a random generator whose stream a library might
change: the same seed chooses the same rows everywhere, whatever the number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from finetune.data.rows import Rows
from finetune.errors import DataError

By = Literal["epochs", "rows", "tokens"]
Stopping = Literal["first_exhausted", "all_exhausted"]


def split(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Training and validation rows, told apart by a hash of what each raw example says.

    The hash is the first half of the example's digest, read as a fraction: below `share` it is held out. So copies of
    an example and all its token rows stay together, and neither adding, removing nor reordering rows moves another.

    Args:
        rows: all rows.
        share: of the raw examples for validation, from 0 to below 1; the share reached differs by chance.
    """
    held_out = rows.column("digest")[:, 0] < np.uint64(math.floor(share * 2**64)) if len(rows) else np.zeros(0, bool)
    return rows.take(~held_out), rows.take(held_out)


def mixed(
    rows: Rows,
    weights: Sequence[float],
    by: By = "epochs",
    stopping_strategy: Stopping = "first_exhausted",
    seed: int = 42,
) -> Rows:
    """The rows of one epoch, source by source, each source in its own order; the trainer shuffles them.

    Args:
        rows: the rows to choose from, without repetitions: all of each source, or what splitting and removing
            duplicates left.
        weights: one for each of `rows.parts`, above 0.
        by: `epochs`: the weight is how often a source is seen. 2.0 is each row twice; 0.5 a half of the raw rows,
            with all token rows of each. `rows` or `tokens`: the weight, over the sum of weights, is the source's share
            of the epoch's token rows or tokens, to within one row.
        stopping_strategy: with `rows` and `tokens`, `first_exhausted` makes the epoch as long as it can be without
            repeating any row; `all_exhausted` makes it as short as it can be with every row in it, so smaller sources
            repeat: whole passes, and a chosen part of one.
        seed: which rows a part of a pass holds.

    Raises:
        DataError: with `rows` and `tokens`, a source has no rows, so that no epoch could have its shares.
    """
    assert len(weights) == len(rows.parts), f"{len(weights)} weights for {len(rows.parts)} sources"
    places = [np.flatnonzero(rows.part == number) for number in range(len(rows.parts))]
    if by == "epochs":
        chosen = [
            _epochs(rows, here, Fraction(weight), f"{seed}:{number}")
            for number, (here, weight) in enumerate(zip(places, weights, strict=True))
        ]
        return rows.take(np.concatenate([np.empty(0, np.int64), *chosen]))
    sizes = [rows.lengths[here].astype(np.int64) if by == "tokens" else np.ones(len(here), np.int64) for here in places]
    totals = [int(size.sum()) for size in sizes]
    for part, total in zip(rows.parts, totals, strict=True):
        if not total:
            raise DataError(
                f"{part.name}: no row of this source is left, so it cannot have its share of the {by}; remove the "
                "source, or set data.weight_by to epochs"
            )
    lengths = [Fraction(total) / Fraction(weight) for total, weight in zip(totals, weights, strict=True)]
    length = (min if stopping_strategy == "first_exhausted" else max)(lengths, default=Fraction(0))
    chosen = [
        _amount(here, size, Fraction(weight) * length, f"{seed}:{number}")
        for number, (here, size, weight) in enumerate(zip(places, sizes, weights, strict=True))
    ]
    return rows.take(np.concatenate([np.empty(0, np.int64), *chosen]))


def _epochs(rows: Rows, here: np.ndarray, weight: Fraction, seed: str) -> np.ndarray:
    """Positions of one source's rows, as often as `weight` says."""
    copies, part = divmod(weight, 1)
    if not part:
        return np.tile(here, copies)
    raw, of = np.unique(rows.take(here).column("row"), return_inverse=True)
    drawn = np.zeros(len(raw), dtype=bool)
    drawn[_drawn_order(raw, seed)[: round(part * len(raw))]] = True
    return np.concatenate([np.tile(here, copies), here[drawn[of]]])


def _amount(here: np.ndarray, size: np.ndarray, target: Fraction, seed: str) -> np.ndarray:
    """Positions of one source's rows whose sizes add up to `target`, to within half of a row's size.

    Args:
        here: int64 (n,) positions of the source's rows.
        size: int64 (n,) what each counts.
        target: what they shall add up to: whole passes, then rows of a drawn order until the nearest sum.
        seed: of the drawn order.
    """
    copies, left = divmod(target, int(size.sum()))
    if not left:
        return np.tile(here, copies)
    order = _drawn_order(np.arange(len(here)), seed)
    sums = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(size[order])])
    count = int(np.searchsorted(sums, float(left)))  # sums[count - 1] < left <= sums[count]
    if count and left - int(sums[count - 1]) <= int(sums[count]) - left:
        count -= 1
    return np.concatenate([np.tile(here, copies), here[np.sort(order[:count])]])


def _drawn_order(numbers: np.ndarray, seed: str) -> np.ndarray:
    """Positions of `numbers` in an order that looks random and depends on `seed` and the numbers alone.

    Each number is sent through the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    start = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    mixing = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixing = (mixing ^ (mixing >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(mixing ^ (mixing >> np.uint64(31)), kind="stable")
