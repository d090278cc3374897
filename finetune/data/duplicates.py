"""Rows that stand in the data twice, or in training and validation both: exactly, or nearly.

Exact copies have one content digest. Near copies share most of their shingles, the runs of SHINGLE consecutive token
ids: MinHash (Broder 1997) estimates the Jaccard similarity of their sets from PERMUTATIONS hashes, with a standard
error of at most 0.045, and locality-sensitive hashing proposes the pairs to compare, nineteen of twenty at the
threshold and nearly all above it. That takes about 8 kB of memory for each example kept; looking for exact copies takes
about 100 bytes a row.

What many rows begin with (the template's first marks, a system prompt) is left out of the comparison, or short chats
under one long system prompt would all be near copies. Rows that differ only after it are compared by the rest alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from finetune.data.rows import Rows

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

SHINGLE = 5  # tokens
PERMUTATIONS = 128
RECALL = 0.95  # of pairs at the threshold, in locality-sensitive hashing: proposed pairs are compared, others are not
AT_ONCE = 2**16  # shingles hashed at once: 32 MB for 128 permutations
SAMPLED = 1000  # examples among which common beginnings are looked for
COMMON = 10  # sampled examples that must share a beginning
BEGINNING = 4096  # tokens of the longest beginning looked for
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0 modulo 2^64


@dataclass(frozen=True, eq=False)
class Copies:
    """Token rows that are copies of others.

    Attributes:
        rows: where the copies are.
        among: where the originals are: the same rows, or the training rows that validation rows are copies of.
        at: int64 (k,) positions in `rows` of the copies, ascending. All token rows of an example are copies, or none.
        of: int64 (k,) positions in `among`: the first token row of the earliest example that each is a copy of.
    """

    rows: Rows
    among: Rows
    at: np.ndarray
    of: np.ndarray

    def __len__(self) -> int:
        """How many raw examples are copies."""
        copies = self.rows.take(self.at)
        return len(np.unique(np.stack([copies.part, copies.column("row")]), axis=1).T) if len(self.at) else 0

    def without(self) -> Rows:
        """The rows that are no copies, in order."""
        kept = np.ones(len(self.rows), dtype=bool)
        kept[self.at] = False
        return self.rows.take(kept)

    def named(self) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
        """Each copied example and its original, as name of the source and raw row from 0, in order."""
        last = None
        for at, of in zip(self.at.tolist(), self.of.tolist(), strict=True):
            found = _name(self.rows, at), _name(self.among, of)
            if found != last:
                yield found
            last = found


def _name(rows: Rows, i: int) -> tuple[str, int]:
    part = rows.parts[rows.part[i]]
    return part.name, part.place(int(rows.at[i]))[0]


def copies(rows: Rows, threshold: float | None = None) -> Copies:
    """Examples that are copies of an earlier one; the first in order is the original.

    Args:
        rows: each row once, as they are before mixing.
        threshold: estimated Jaccard similarity from which examples count as near copies; None looks for exact ones.
    """
    of = _first_alike(rows.column("digest"))
    raw = rows.column("row")
    of[(raw == raw[of]) & (rows.part == rows.part[of])] = -1  # token rows of one example are no copies of each other
    if threshold is not None and len(rows):
        example = _examples(rows)
        kept = of[example.first] < 0
        originals: dict[int, int] = {}
        index = _Index(threshold)
        for number, sketch in _sketches(rows, example, np.flatnonzero(kept), _SharedBeginnings(rows, example)):
            if (earlier := index.find(sketch)) is not None:
                originals[number] = earlier
            else:
                index.add(number, sketch)
        for number, earlier in originals.items():
            of[example.rows(number)] = example.first[earlier]
        # An exact copy of a near copy is a near copy of the same original.
        through = np.flatnonzero(of >= 0)
        further = of[of[through]]
        of[through[further >= 0]] = further[further >= 0]
    at = np.flatnonzero(of >= 0)
    return Copies(rows, rows, at, of[at])


def leaks(train: Rows, validation: Rows, threshold: float | None = None) -> Copies:
    """Validation examples that are trained on too: same content, same token ids in any row, or nearly the same.

    Args:
        train: training rows, each at least once.
        validation: validation rows.
        threshold: as `copies`; None looks for exact copies only.
    """
    example = _examples(validation)
    of = _among(validation.column("digest"), train.column("digest"))
    same = _same_ids(validation, train)
    of = np.where(of < 0, same, of)
    if threshold is not None and len(train) and len(validation):
        trained = _examples(train)
        common = _SharedBeginnings(train, trained)
        index = _Index(threshold)
        for number, sketch in _sketches(train, trained, np.arange(len(trained.first)), common):
            index.add(number, sketch)
        clean = np.bincount(example.number, of >= 0, len(example.first)) == 0
        for number, sketch in _sketches(validation, example, np.flatnonzero(clean), common):
            if (earlier := index.find(sketch)) is not None:
                of[example.first[number]] = trained.first[earlier]
    # One leaked token row makes the example leaked: the earliest original counts for all its rows.
    earliest = np.full(len(example.first), len(train), dtype=np.int64)
    found = np.flatnonzero(of >= 0)
    np.minimum.at(earliest, example.number[found], of[found])
    of = earliest[example.number]
    at = np.flatnonzero(of < len(train))
    return Copies(validation, train, at, of[at])


@dataclass(frozen=True, eq=False)
class _Examples:
    """Which token rows belong to one raw example.

    Attributes:
        number: int64 (n,) the example of each token row, numbered in order of first appearance.
        first: int64 (m,) the first token row of each example.
        order: int64 (n,) token rows sorted by example.
        starts: int64 (m + 1,) where each example begins in `order`.
    """

    number: np.ndarray
    first: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def rows(self, number: int) -> np.ndarray:
        return self.order[self.starts[number] : self.starts[number + 1]]


def _examples(rows: Rows) -> _Examples:
    raw = rows.column("row").astype(np.int64, copy=False)
    order = np.lexsort((raw, rows.part))
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (raw[order][1:] != raw[order][:-1]) | (rows.part[order][1:] != rows.part[order][:-1])
    group = np.empty(len(rows), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    first = order[new]  # the sort is stable, so this is the first of each
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    number = rank[group]
    order = np.argsort(number, kind="stable")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(number, minlength=len(first)))])
    return _Examples(number, np.sort(first), order, starts)


def _first_alike(digests: np.ndarray) -> np.ndarray:
    """For each of n digests (uint64, (n, 2)) the position of the first that is equal: int64 (n,)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    new = np.ones(len(digests), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    found = np.empty(len(digests), dtype=np.int64)
    found[order] = order[new][np.cumsum(new) - 1]
    return found


def _among(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each of n digests the position of the first equal one among `known`, or -1: int64 (n,)."""
    found = _first_alike(np.concatenate([known, digests]))[len(known) :]
    return np.where(found < len(known), found, -1)


def _same_ids(validation: Rows, train: Rows) -> np.ndarray:
    """For each validation row the first training row with the same token ids, or -1: int64 (n,).

    Only rows of a length that occurs on both sides are read.
    """
    found = np.full(len(validation), -1, dtype=np.int64)
    here = np.flatnonzero(np.isin(validation.lengths, train.lengths))
    there = np.flatnonzero(np.isin(train.lengths, validation.lengths))
    if len(here) and len(there):
        same = _among(_id_digests(validation, here), _id_digests(train, there))
        found[here] = np.where(same >= 0, there[same], -1)
    return found


def _id_digests(rows: Rows, positions: np.ndarray) -> np.ndarray:
    """uint64 (k, 2) digests of rows' token ids."""
    from xxhash import xxh3_128_digest

    found = b"".join(xxh3_128_digest(rows.ids(i).data) for i in positions.tolist())
    return np.frombuffer(found, dtype="<u8").reshape(-1, 2)


class _Index:
    """datasketch's index of MinHash sketches, which keeps the sketches for an exact comparison of candidates."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._lsh: MinHashLSH = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
        self._sketches: dict[int, np.ndarray] = {}  # 512 bytes each

    def add(self, number: int, sketch: MinHash) -> None:
        self._lsh.insert(number, sketch, check_duplication=False)
        self._sketches[number] = sketch.hashvalues

    def find(self, sketch: MinHash) -> int | None:
        """The smallest number with at least the threshold's similarity."""
        for number in sorted(self._lsh.query(sketch)):
            if np.count_nonzero(self._sketches[number] == sketch.hashvalues) >= self._threshold * PERMUTATIONS:
                return int(number)
        return None


def _bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many hashes: the widest bands, so fewest false proposals, that reach RECALL.

    A pair of similarity s agrees in one of b bands of r hashes with probability 1 - (1 - s^r)^b.
    """
    for width in range(PERMUTATIONS // 2, 1, -1):
        bands = PERMUTATIONS // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return PERMUTATIONS, 1


def _sketches(
    rows: Rows, examples: _Examples, numbers: np.ndarray, common: _SharedBeginnings
) -> Iterator[tuple[int, MinHash]]:
    """A MinHash of all shingles of each example: one object, valid until the next."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
    for number in numbers.tolist():
        sketch.clear()  # makes new values; those of earlier examples stay as they are
        for i in examples.rows(number).tolist():
            shingles = _shingles(rows.ids(i), common)
            for start in range(0, len(shingles), AT_ONCE):
                sketch.update_batch(shingles[start : start + AT_ONCE].tolist())
        yield number, sketch


def _shingles(ids: np.ndarray, common: _SharedBeginnings) -> np.ndarray:
    """uint32 hashes of every run of SHINGLE ids (of all ids, where there are fewer) after a common beginning."""
    width = min(SHINGLE, len(ids))
    values = ids[min(common.length(ids), len(ids) - width) :].astype(np.uint64) + np.uint64(1)
    mixed = np.zeros(len(values) - width + 1, dtype=np.uint64)
    for place in range(width):
        mixed = mixed * _FACTOR + values[place : len(values) - width + 1 + place]
    mixed *= _FACTOR
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _beginnings(ids: np.ndarray) -> np.ndarray:
    """uint64 hashes of the first one, two, ... ids, BEGINNING at most: entry p covers ids[: p + 1]."""
    values = ids[:BEGINNING].astype(np.uint64) + np.uint64(1)
    return np.cumsum(values * _POWERS[: len(values)], dtype=np.uint64)


_POWERS = np.cumprod(np.full(BEGINNING, _FACTOR), dtype=np.uint64)


class _SharedBeginnings:
    """Beginnings that a hundredth of the examples share, and at least COMMON of those looked at."""

    def __init__(self, rows: Rows, examples: _Examples) -> None:
        count = len(examples.first)
        sampled = examples.first[np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64))]
        found = [_beginnings(rows.ids(i)) for i in sampled.tolist()]
        hashes, counts = np.unique(np.concatenate(found), return_counts=True)
        common = hashes[counts >= COMMON]
        self._hashes = frozenset(common.tolist())
        self._longest = max((int(np.isin(beginnings, common).sum()) for beginnings in found), default=0)

    def length(self, ids: np.ndarray) -> int:
        """How many of the first ids are such a beginning. Every beginning of a common one is common."""
        beginnings = _beginnings(ids[: self._longest])
        return bisect_left(beginnings, True, key=lambda value: int(value) not in self._hashes)
