"""Sources become rows, each with its place. One pass finds every bad row of every source; nothing here needs torch."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.json_rows import CUT_SHORT, document, line_at, lines, undecodable
from finetune.data.source import HubDataset, LocalFile, locate
from finetune.errors import DataError, EnvironmentFault
from finetune.formats.example import Fault, describe
from finetune.recipe.sections import Source

Placed = tuple[str, dict[str, Any] | Fault]
BATCH = 1000
MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"PAR1": "Parquet data",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "zstd data",
}
LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Row:
    """One raw row.

    Attributes:
        values: its columns.
        index: 0-based count within the source, blank lines aside.
        place: `file:line` where lines mean something, else `file row N` counted from 1.
    """

    values: dict[str, Any]
    index: int
    place: str


def read(source: Source) -> Iterator[Row | Fault]:
    """Read a source from the start; a broken row yields a fault and reading goes on where it can.

    Raises:
        EnvironmentFault: a hub data set cannot be reached.
        DataError: a hub data set does not exist or lacks the split.
    """
    where = locate(source)
    if isinstance(where, Fault):
        yield where
        return
    found = _file(where, source.path) if isinstance(where, LocalFile) else _hub(where)
    index = -1
    for index, (place, row) in enumerate(found):
        yield row if isinstance(row, Fault) else Row(row, index, place)
    if index < 0:
        yield Fault("", "no rows", "at least one row", "fill the file or remove the source", source.path)


def _file(where: LocalFile, name: str) -> Iterator[Placed]:
    """Rows of a local file; what its bytes or the disk make impossible becomes one fault."""
    place = name
    try:
        if where.kind == "parquet":
            yield from _parquet(where.path, name)
            return
        with _open(where) as stream:
            fault = _not_text(stream.peek(4096)[:4096], name)  # type: ignore[attr-defined]
            if fault:
                yield name, fault
            elif where.kind == "jsonl":
                for place, row in lines(stream, name):
                    yield place, row
            elif where.kind == "json":
                yield from document(stream.read(), name)
            else:
                yield from _csv(stream.read(), name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield name, Fault("", f"damaged gzip data after {place} ({error})", "a whole gzip file", CUT_SHORT, name)
    except PermissionError as error:
        yield name, Fault("", f"a file that may not be read ({error.strerror})", "read permission", "chmod it", name)
    except OSError as error:
        fix = "check the disk and the path"
        yield name, Fault("", f"a file that cannot be read ({error.strerror or error})", "a readable file", fix, name)


def _open(where: LocalFile) -> BinaryIO:
    return gzip.open(where.path, "rb") if where.packed else open(where.path, "rb")  # type: ignore[return-value]


def _not_text(head: bytes, name: str) -> Fault | None:
    """The fault of a file whose first bytes are not text of the kind its name says."""
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return Fault("", what, "text, as the file's name says", "give the file its right suffix", name)
    if head.startswith(LFS):
        return Fault("", "a git-lfs pointer", "the file itself", "run git lfs pull", name)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Fault("", "UTF-16 text", "UTF-8 text", "save the file as UTF-8", name)
    if b"\0" in head:
        return Fault("", "binary data", "text, as the file's name says", "name a data file", name)
    return None


def _csv(raw: bytes, name: str) -> Iterator[Placed]:
    """Rows of a CSV file with a header line; every column is text, and an empty cell is an absent column."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{name}:{line_at(raw, error.start)}"
        yield place, undecodable(error, place)
        return
    limit = csv.field_size_limit(max(len(text), 1))  # documents are longer than the csv module's 128 KiB
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows: list[tuple[int, list[str]]] = []
        failure: Fault | None = None
        line = 1
        try:
            for cells in reader:
                rows.append((line, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            place = f"{name}:{line}"
            failure = Fault("", f"broken CSV ({error})", "cells quoted as in RFC 4180", "correct the quotes", place)
    finally:
        csv.field_size_limit(limit)
    header = rows[0][1] if rows else []
    if len(set(header)) < len(header) or not all(cell.strip() for cell in header):
        place = f"{name}:1"
        found = f"the header {','.join(header)!r}"
        yield place, Fault("", found, "a name for each column, each once", "correct it", place)
        return
    for number, cells in rows[1:]:
        place = f"{name}:{number}"
        if len(cells) == len(header):
            yield place, {column: cell for column, cell in zip(header, cells, strict=True) if cell}
        elif cells:
            expected = f"{len(header)} ({', '.join(header)})"
            yield place, Fault("", f"{len(cells)} cells", expected, "quote cells that hold commas or newlines", place)
    if failure:
        yield failure.place, failure


def _parquet(path: Path, name: str) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{name} row {number}", _absent_dropped(values)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        yield name, Fault("", f"Parquet that cannot be read ({reason})", "a whole Parquet file", "make it again", name)


def _absent_dropped(value: Any) -> Any:
    """`value` without nulls in objects: Arrow gives each object every key that any row has."""
    if isinstance(value, dict):
        return {key: _absent_dropped(entry) for key, entry in value.items() if entry is not None}
    return [_absent_dropped(entry) for entry in value] if isinstance(value, list) else value


def _hub(where: HubDataset) -> Iterator[Placed]:
    """Rows of a hub data set; the only place that may use the network."""
    import datasets

    try:
        loaded = datasets.load_dataset(where.name, split=where.split, revision=where.revision)
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise DataError(
            f"{where.name}: no such local file, and the Hugging Face hub gives no data set for it "
            f"(split {where.split!r}, revision {where.revision or 'default'!r}): {_reason(error)}; correct path, "
            "split or revision; a private or gated one needs a token in HF_TOKEN"
        ) from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise EnvironmentFault(
            f"{where.name}: no such local file, and the Hugging Face hub cannot be reached: {_reason(error)}; "
            "name a local file, or try again with a connection"
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{where.name}: the split {where.split!r} gave {describe(loaded)}; name one split")
    for number, values in enumerate(loaded, 1):
        yield f"{where.name}[{where.split}] row {number}", _absent_dropped(values)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
