"""Token rows on disk: written block by block, read through a memory map, chosen from without being copied.

A folder holds `rows.arrow`, an ordinary Arrow IPC file with one line per token row, and `rows.json` with its counts,
its size and its fingerprints. The file is written in record batches of about a million tokens, so writing needs memory
for one of them, and reading maps the file: a row's ids are a view of it, shared between processes by the page cache.

What stays in memory is 4 bytes a row for a part's lengths and 16 for a selection (part, position, length): 1 GB for 50
million rows. Digests (16 bytes a row), raw row numbers (8), turns (4) and counts (4) are read when asked for.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from finetune.data.encode import UNTRAINED
from finetune.errors import DataError
from finetune.files import disk_errors, write_json

ROWS = "rows.arrow"
FACTS = "rows.json"
LAYOUT = 1  # of the two files; raised when older folders cannot be read any more
BATCH_TOKENS = 2**20
SETTING = "data.cache_dir"

SCHEMA = pa.schema(
    [
        pa.field("ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("trained", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("turn", pa.int32(), nullable=False),
        pa.field("digest", pa.binary(16), nullable=False),
        pa.field("cut", pa.bool_(), nullable=False),
        pa.field("trained_count", pa.int32(), nullable=False),
    ]
)
_DTYPES = {
    "ids": np.int32, "lengths": np.int32, "trained": np.int32, "ranges": np.int32, "row": np.int64, "turn": np.int32,
    "digest": np.uint64, "cut": np.bool_,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Block:
    """Some token rows, as one process hands them to another.

    Attributes:
        ids: int32, token ids of all rows end to end.
        lengths: int32 (n,), tokens of each row, at least one.
        trained: int32, start and end of each trained range, end to end: positions within their row, in order.
        ranges: int32 (n,), trained ranges of each row.
        row: int64 (n,), index of the raw row in its source.
        turn: int32 (n,), the last message trained, -1 where the row is its raw row's only one.
        digest: uint64 (n, 2), digest of the raw example's content, equal for all token rows of one example.
        cut: bool (n,), whether data.on_long_row shortened the row.
    """

    ids: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    ranges: np.ndarray
    row: np.ndarray
    turn: np.ndarray
    digest: np.ndarray
    cut: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def check(self) -> None:
        """Refuse arrays that do not fit together, which would mask or mix up rows.

        Raises:
            ValueError: a dtype, a shape, or a range outside its row, empty or out of order.
        """
        for name, dtype in _DTYPES.items():
            if (found := getattr(self, name).dtype) != dtype:
                raise ValueError(f"block: {name} is {found}, not {np.dtype(dtype)}")
        n = len(self)
        for name in ("ranges", "row", "turn", "cut"):
            if getattr(self, name).shape != (n,):
                raise ValueError(f"block: {name} has shape {getattr(self, name).shape}, not ({n},)")
        if self.digest.shape != (n, 2):
            raise ValueError(f"block: digest has shape {self.digest.shape}, not ({n}, 2)")
        if n and (self.lengths.min() < 1 or self.ranges.min() < 0):
            raise ValueError("block: a row is empty, or has fewer than no trained ranges")
        if self.lengths.sum(dtype=np.int64) != len(self.ids):
            raise ValueError(
                f"block: lengths add up to {self.lengths.sum(dtype=np.int64)}, there are {len(self.ids)} ids"
            )
        if 2 * self.ranges.sum(dtype=np.int64) != len(self.trained):
            raise ValueError(f"block: {self.ranges.sum(dtype=np.int64)} trained ranges, {len(self.trained)} edges")
        starts, ends = self._edges()
        room = np.repeat(_ends(self.lengths), self.ranges)
        first = np.repeat(_ends(self.lengths) - self.lengths, self.ranges)
        if (starts >= ends).any() or (starts < first).any() or (ends > room).any() or (starts[1:] < ends[:-1]).any():
            raise ValueError("block: a trained range is empty, out of order or outside its row")

    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of every trained range as int64 positions in `ids`."""
        first = np.repeat(_ends(self.lengths) - self.lengths, self.ranges)
        return self.trained[::2] + first, self.trained[1::2] + first

    def marks(self) -> np.ndarray:
        """uint8, one for each id: 1 where it is trained. The first of a row never is: nothing predicts it."""
        starts, ends = self._edges()
        steps = np.zeros(len(self.ids) + 1, dtype=np.int8)
        steps[starts] += 1  # ranges are neither empty nor overlapping, so no position stands twice in either list
        steps[ends] -= 1
        found = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)
        found[_ends(self.lengths) - self.lengths] = 0
        return found


def _ends(counts: np.ndarray) -> np.ndarray:
    """Running totals as int64."""
    return np.cumsum(counts, dtype=np.int64)


def _offsets(counts: np.ndarray) -> np.ndarray:
    """Arrow's int32 offsets of lists that have these lengths."""
    return np.concatenate([np.zeros(1, dtype=np.int64), _ends(counts)]).astype(np.int32)


def joined(blocks: Sequence[Block]) -> Block:
    """Several blocks, at least one, as one."""
    return Block(**{name: np.concatenate([getattr(block, name) for block in blocks]) for name in _DTYPES})


class _Fingerprint:
    """SHA-256 of rows that does not depend on how they were cut into blocks.

    `content` covers what is trained on: lengths, ids, and which of them are trained, in order, as little-endian
    integers (int32, int32, uint8), each hashed on its own and the three digests together. `places` covers the rest.
    """

    def __init__(self) -> None:
        self._content = [hashlib.sha256() for _ in range(3)]
        self._places = [hashlib.sha256() for _ in range(4)]

    def add(self, block: Block) -> None:
        content = (block.lengths.astype("<i4"), block.ids.astype("<i4"), block.marks())
        places = (block.row.astype("<i8"), block.turn.astype("<i4"), block.digest.astype("<u8"), block.cut)
        for digest, array in zip((*self._content, *self._places), (*content, *places), strict=True):
            digest.update(np.ascontiguousarray(array).data)

    def facts(self) -> dict[str, str]:
        def together(digests: Sequence[Any]) -> str:
            return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()

        return {"content": together(self._content), "places": together(self._places)}


class RowsWriter:
    """Writes a folder of token rows, in the order in which blocks are added.

    `rows.json` is written last, by `close`: a folder without it is unfinished. As a context manager it closes at the
    end of the block, and leaves the folder unfinished when the block raises.
    """

    def __init__(self, folder: Path) -> None:
        """Begin the files of an existing folder.

        Raises:
            DiskError: the folder cannot be written.
        """
        self._folder = folder
        self._waiting: list[Block] = []
        self._tokens_waiting = 0
        self._rows = self._tokens = self._trained = 0
        self._fingerprint = _Fingerprint()
        with disk_errors(folder / ROWS, SETTING):
            self._stream = open(folder / ROWS, "wb")  # noqa: SIM115 - closed by close()
            self._writer = pa.ipc.new_file(self._stream, SCHEMA)

    def add(self, block: Block) -> None:
        """Add rows.

        Raises:
            ValueError: the block's arrays do not fit together.
            DiskError: the disk is full or failed.
        """
        block.check()
        self._waiting.append(block)
        self._tokens_waiting += len(block.ids)
        if self._tokens_waiting >= BATCH_TOKENS:
            self._write()

    def close(self) -> None:
        """Write what is left and make it durable.

        Raises:
            DiskError: the disk is full or failed.
        """
        self._write()
        with disk_errors(self._folder / ROWS, SETTING):
            self._writer.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())
            size = self._stream.tell()
            self._stream.close()
            counts = {"rows": self._rows, "tokens": self._tokens, "trained_tokens": self._trained}
            facts = {"layout": LAYOUT, "bytes": size, **counts, **self._fingerprint.facts()}
            write_json(self._folder / FACTS, facts)

    def __enter__(self) -> RowsWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stream.close()

    def _write(self) -> None:
        """Write the waiting rows as one record batch."""
        if not self._waiting:
            return
        block = joined(self._waiting)
        self._waiting, self._tokens_waiting = [], 0
        totals = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(block.marks(), dtype=np.int64)])
        ends = _ends(block.lengths)
        counts = (totals[ends] - totals[ends - block.lengths]).astype(np.int32)
        arrays = [
            _lists(_offsets(block.lengths), block.ids),
            _lists(_offsets(2 * block.ranges), block.trained),
            _array(pa.int64(), block.row),
            _array(pa.int32(), block.turn),
            _array(pa.binary(16), block.digest),
            pa.Array.from_buffers(
                pa.bool_(), len(block), [None, pa.py_buffer(np.packbits(block.cut, bitorder="little"))]
            ),
            _array(pa.int32(), counts),
        ]
        batch = pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)
        with disk_errors(self._folder / ROWS, SETTING):
            self._writer.write_batch(batch)
        self._fingerprint.add(block)
        self._rows += len(block)
        self._tokens += len(block.ids)
        self._trained += int(totals[-1])


# Buffers are handed to and taken from Arrow as they are: pa.array and to_numpy would import pandas, 0.5 s and 60 MB.


def _array(kind: pa.DataType, values: np.ndarray) -> pa.Array:
    """An Arrow array over the memory of numpy values, one entry for each of the first axis."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    """Lists of int32: list i is values[offsets[i] : offsets[i + 1]]."""
    kind = SCHEMA.field("ids").type
    child = _array(pa.int32(), values)
    return pa.Array.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(offsets)], children=[child])


def _values(array: pa.Array, dtype: Any, entries: int) -> np.ndarray:
    """The first so many values of an array's last buffer, as a view."""
    buffer = array.buffers()[-1]
    return np.frombuffer(buffer, dtype, entries) if entries else np.empty(0, dtype)


class _Batch:
    """Views of one record batch; nothing is copied but `cut`, which Arrow keeps as bits."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        n = batch.num_rows
        ids, trained = batch.column("ids"), batch.column("trained")
        self.ids = _values(ids.values, np.int32, len(ids.values))
        self.starts = np.frombuffer(ids.buffers()[1], np.int32, n + 1)
        self.trained = _values(trained.values, np.int32, len(trained.values))
        self.edges = np.frombuffer(trained.buffers()[1], np.int32, n + 1)
        self.row = _values(batch.column("row"), np.int64, n)
        self.turn = _values(batch.column("turn"), np.int32, n)
        self.trained_counts = _values(batch.column("trained_count"), np.int32, n)
        self.digest = _values(batch.column("digest"), np.uint64, 2 * n).reshape(n, 2)
        self._cut = _values(batch.column("cut"), np.uint8, (n + 7) // 8)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def cut(self) -> np.ndarray:
        return np.unpackbits(self._cut, count=len(self.row), bitorder="little").view(np.bool_)

    def block(self) -> Block:
        return Block(
            ids=self.ids, lengths=self.lengths, trained=self.trained, ranges=np.diff(self.edges) // 2, row=self.row,
            turn=self.turn, digest=self.digest, cut=self.cut,
        )  # fmt: skip


def _opened(batch: pa.RecordBatch) -> _Batch:
    batch.validate()  # sizes against sizes: a damaged file must not be read beyond its end
    return _Batch(batch)


class SourceRows:
    """The token rows of one source, memory-mapped from a folder that RowsWriter wrote.

    Attributes:
        folder: where they are.
        name: the source's name. It is given on opening, since the same prepared rows may be called otherwise later.
        facts: counts and fingerprints, from rows.json.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        """Open a folder. Sizes and counts are compared; contents only by `faults`.

        Raises:
            DataError: the folder is unfinished, damaged, or of another layout.
        """
        self.folder, self.name = folder, name
        self.facts = _facts(folder)
        path = folder / ROWS
        try:
            if (size := path.stat().st_size) != self.facts["bytes"]:
                raise _damaged(folder, f"{ROWS} has {size:,} bytes, {self.facts['bytes']:,} were written")
            # The map outlives the reader: every view of a row keeps it.
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if not reader.schema.equals(SCHEMA):
                raise _damaged(folder, f"{ROWS} has other columns than were written")
            self._batches = [_opened(reader.get_batch(number)) for number in range(reader.num_record_batches)]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise _damaged(folder, f"{ROWS} cannot be read ({error})") from error
        self._first = [0, *np.cumsum([len(batch.row) for batch in self._batches], dtype=np.int64).tolist()]
        if self._first[-1] != self.facts["rows"]:
            raise _damaged(folder, f"{ROWS} has {self._first[-1]:,} rows, {self.facts['rows']:,} were written")

    def __len__(self) -> int:
        return self._first[-1]

    def __reduce__(self) -> tuple[type[SourceRows], tuple[Path, str]]:
        return SourceRows, (self.folder, self.name)  # another process maps the same file

    def _column(self, name: str, dtype: Any, *shape: int) -> np.ndarray:
        if len(self._batches) == 1:
            found: np.ndarray = getattr(self._batches[0], name)
            return found
        return np.concatenate([np.empty((0, *shape), dtype), *(getattr(batch, name) for batch in self._batches)])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 (n,), tokens of each row."""
        return self._column("lengths", np.int32)

    @property
    def row(self) -> np.ndarray:
        """int64 (n,), index of the raw row in its source."""
        return self._column("row", np.int64)

    @property
    def turn(self) -> np.ndarray:
        """int32 (n,), the last message trained, or -1."""
        return self._column("turn", np.int32)

    @property
    def digest(self) -> np.ndarray:
        """uint64 (n, 2), digest of the raw example's content."""
        return self._column("digest", np.uint64, 2)

    @property
    def cut(self) -> np.ndarray:
        """bool (n,), whether data.on_long_row shortened the row."""
        return self._column("cut", np.bool_)

    @property
    def trained_counts(self) -> np.ndarray:
        """int32 (n,), trained tokens of each row."""
        return self._column("trained_counts", np.int32)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over lengths, ids and trained marks in order; computed when the rows were written."""
        return str(self.facts["content"])

    def _find(self, i: int) -> tuple[_Batch, int]:
        """The batch of row `i`, and its place there."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        number = bisect_right(self._first, i) - 1
        return self._batches[number], i - self._first[number]

    def ids(self, i: int) -> np.ndarray:
        """int32 token ids of row `i`: a read-only view of the file."""
        batch, at = self._find(i)
        return batch.ids[batch.starts[at] : batch.starts[at + 1]]

    def trained(self, i: int) -> list[tuple[int, int]]:
        """Trained ranges [start, end) of row `i`, in order."""
        batch, at = self._find(i)
        edges = batch.trained[batch.edges[at] : batch.edges[at + 1]].tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def labels(self, i: int) -> np.ndarray:
        """int32 labels of row `i`: its ids where trained, else -100; the first is never trained."""
        return labels_of(self.ids(i), self.trained(i))

    def place(self, i: int) -> tuple[int, int]:
        """Raw row and turn of row `i`."""
        batch, at = self._find(i)
        return int(batch.row[at]), int(batch.turn[at])

    def blocks(self) -> Iterator[Block]:
        """All rows in order, about a million tokens at a time, as views of the file."""
        return (batch.block() for batch in self._batches)

    def faults(self) -> list[str]:
        """What differs from what was written, found by reading everything; empty when the rows are whole."""
        found = _Fingerprint()
        for block in self.blocks():
            try:
                block.check()
            except ValueError as error:
                return [f"{self.folder / ROWS}: {error}"]
            found.add(block)
        facts = found.facts()
        return [
            f"{self.folder / ROWS}: {name} differs from its hash" for name in facts if facts[name] != self.facts[name]
        ]


def labels_of(ids: np.ndarray, trained: list[tuple[int, int]]) -> np.ndarray:
    """int32 labels of a row: its ids where they are trained, else -100; the first never is."""
    labels = np.full(len(ids), UNTRAINED, dtype=np.int32)
    for start, end in trained:
        labels[start:end] = ids[start:end]
    labels[0] = UNTRAINED
    return labels


def _facts(folder: Path) -> dict[str, Any]:
    """What rows.json says."""
    path = folder / FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        layout = facts["layout"]
        if layout == LAYOUT:
            for name, kind in (("bytes", int), ("rows", int), ("tokens", int), ("content", str), ("places", str)):
                if not isinstance(facts[name], kind):
                    raise ValueError(f"{name} is {facts[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{FACTS} is missing or unreadable ({error})") from error
    if layout != LAYOUT:
        raise _damaged(folder, f"{FACTS} has layout {layout}, this version reads {LAYOUT}")
    return facts


def _damaged(folder: Path, found: str) -> DataError:
    return DataError(f"{folder}: these prepared rows are damaged: {found}; remove this folder and prepare them again")


@dataclass(frozen=True, eq=False)
class Rows(Sequence[dict[str, Any]]):
    """What training is fed: rows of several sources, chosen and ordered by two arrays of numbers.

    Attributes:
        parts: the sources.
        part: int32 (n,), which source each row is from.
        at: int64 (n,), its position there. Rows may stand more than once.
    """

    parts: tuple[SourceRows, ...]
    part: np.ndarray
    at: np.ndarray

    @classmethod
    def of(cls, parts: Sequence[SourceRows]) -> Rows:
        """All rows of all sources, in order."""
        counts = [len(part) for part in parts]
        at = [np.arange(count, dtype=np.int64) for count in counts]
        return cls(
            tuple(parts),
            np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            np.concatenate([np.empty(0, np.int64), *at]),
        )

    def __len__(self) -> int:
        return len(self.part)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> dict[str, Any] | Rows:
        """A row, or the rows of a slice.

        Returns:
            `input_ids` (int32 array, a read-only view of the file), `labels` (int32 array, -100 where untrained),
            `source` (its name), `row` (0-based within the source), `turn` (the last message trained, or -1).
        """
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        part, at = self._find(i)
        ids = part.ids(at)
        row, turn = part.place(at)
        labels = labels_of(ids, part.trained(at))
        return {"input_ids": ids, "labels": labels, "source": part.name, "row": row, "turn": turn}

    def _find(self, i: int) -> tuple[SourceRows, int]:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self.parts[self.part[i]], int(self.at[i])

    def ids(self, i: int) -> np.ndarray:
        """int32 token ids of row `i`: a read-only view of the file."""
        part, at = self._find(i)
        return part.ids(at)

    def labels(self, i: int) -> np.ndarray:
        """int32 labels of row `i`, -100 where untrained."""
        part, at = self._find(i)
        return part.labels(at)

    def take(self, order: np.ndarray) -> Rows:
        """The rows at these positions, in this order; positions may repeat. A bool array of n chooses in place."""
        return Rows(self.parts, self.part[order], self.at[order])

    def column(self, name: str) -> np.ndarray:
        """A column of SourceRows (lengths, row, turn, digest, cut, trained_counts) for the rows chosen, in order."""
        if len(self.parts) == 1:
            found: np.ndarray = getattr(self.parts[0], name)[self.at]
            return found
        dtype = np.int32 if name == "trained_counts" else _DTYPES[name]
        found = np.empty((len(self), 2) if name == "digest" else len(self), dtype)
        for number, part in enumerate(self.parts):
            here = self.part == number
            found[here] = getattr(part, name)[self.at[here]]
        return found

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 (n,), tokens of each row."""
        return self.column("lengths").astype(np.int32, copy=False)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def trained_tokens(self) -> int:
        """Trained tokens of all rows."""
        return int(self.column("trained_counts").sum(dtype=np.int64))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the contents of the sources that rows are chosen from, and over the choice, in order.

        Equal for equal training data from equal sources; nothing but the choice is read for it.
        """
        used = np.flatnonzero(np.bincount(self.part, minlength=len(self.parts)))
        numbers = np.zeros(len(self.parts), dtype="<i4")
        numbers[used] = np.arange(len(used))
        digest = hashlib.sha256()
        for number in used:
            digest.update(bytes.fromhex(self.parts[number].fingerprint))
        digest.update(numbers[self.part].data)
        digest.update(np.ascontiguousarray(self.at.astype("<i8", copy=False)).data)
        return digest.hexdigest()
