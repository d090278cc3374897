"""Rows of tables: CSV and TSV as text, Parquet and Arrow as columns, each read batch by batch."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from finetune.data.json_rows import Placed
from finetune.formats.example import Fault

if TYPE_CHECKING:
    import pyarrow

BATCH = 1000
ARROW_FILE = b"ARROW1"
SEPARATORS = (";", "\t", ",", "|")  # of cells, in files that are called .csv or .tsv all the same


def separated(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Placed]:
    """Rows of a CSV or TSV file with a header line; every column is text, and an empty cell is an absent column.

    Yields:
        The row's 0-based count, `name:line` of where it begins, and the row or its fault.
    """
    # Bytes that are not UTF-8 come as lone surrogates, so that the row they stand in can be named.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number, line = -1, 1
    while True:
        cells, failure = _next(reader)
        place, line = f"{name}:{line}", reader.line_num + 1
        if failure:
            found = f"broken {'CSV' if delimiter == ',' else 'TSV'} ({failure})"
            fault = Fault("", found, "cells quoted as in RFC 4180", "correct the quotes", place)
            yield -1, place, fault
            return
        if cells is None:
            return
        if header is None:
            header = cells
            if wrong := _bad_header(header, place, delimiter):
                yield -1, place, wrong
                return
        elif cells:
            number += 1
            yield number, place, _row(cells, header, place)


def _next(reader: Any) -> tuple[list[str] | None, str]:
    """The next row's cells, None at the end; and what is wrong. Documents are longer than the module's 128 KiB."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        return next(reader, None), ""
    except csv.Error as error:
        return None, str(error)
    finally:
        csv.field_size_limit(limit)


def _bad_header(header: list[str], place: str, delimiter: str) -> Fault | None:
    fault = _bad_bytes(header, place)
    if fault is not None:
        return fault
    other = next((mark for mark in SEPARATORS if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        found, wanted = f"a header with {other!r} between its names", "commas" if delimiter == "," else "tabs"
        return Fault("", found, wanted, f"save the file with {wanted} between its cells", place)
    if len(set(header)) == len(header) and all(cell.strip() for cell in header):
        return None
    found = f"the header {delimiter.join(header)!r}"
    return Fault("", found, "a name for each column, each once", "correct it", place)


def _row(cells: list[str], header: list[str], place: str) -> dict[str, Any] | Fault:
    """A row's cells by their column."""
    if fault := _bad_bytes(cells, place):
        return fault
    if len(cells) != len(header):
        expected = f"{len(header)} ({', '.join(header)})"
        fix = "quote cells that hold separators or newlines"
        return Fault("", f"{len(cells)} cells", expected, fix, place, raw=cells)
    row = {column: cell for column, cell in zip(header, cells, strict=True) if cell}
    if not row:
        return Fault("", "only empty cells", "at least one that is filled", "remove the row", place, raw=cells)
    return row


def _bad_bytes(cells: list[str], place: str) -> Fault | None:
    """The fault of cells that held bytes which are not UTF-8."""
    if all(cell.isascii() for cell in cells):
        return None
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        found = f"the byte 0x{ord(error.object[error.start]) - 0xDC00:02x}, which is not UTF-8"
        raw = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
        return Fault("", found, "UTF-8 text", "save the file as UTF-8", place, raw=raw)
    return None


def broken() -> tuple[type[Exception], ...]:
    """What reading a damaged Parquet or Arrow file raises."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError


def groups(path: Path, kind: str) -> list[tuple[int, int]] | None:
    """Rows and bytes of each row group of Parquet or record batch of Arrow; None where the file cannot be read."""
    import pyarrow.parquet

    try:
        if kind == "arrow":
            return [(batch.num_rows, batch.nbytes) for batch in arrow_batches(path)]
        with pyarrow.parquet.ParquetFile(path) as file:
            found = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in found]
    except broken():
        return None


def parquet(path: Path, first: int, last: int | None) -> Iterator[dict[str, Any]]:
    """Rows of the row groups [first, last), or of all from `first` on.

    Raises:
        Exception: one of `broken()`, for a file that is not whole.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        end = file.metadata.num_row_groups if last is None else last
        for batch in file.iter_batches(batch_size=BATCH, row_groups=range(first, end)):
            yield from rows_of(batch)


def arrow_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """The record batches of an Arrow file or stream, memory-mapped: nothing is read before it is used.

    Raises:
        Exception: one of `broken()`, for a file that is not whole.
    """
    import pyarrow

    with open(path, "rb") as stream:
        is_file = stream.read(len(ARROW_FILE)) == ARROW_FILE
    with pyarrow.memory_map(str(path)) as source:
        if is_file:
            file = pyarrow.ipc.open_file(source)
            for at in range(file.num_record_batches):
                yield file.get_batch(at)
        else:
            yield from pyarrow.ipc.open_stream(source)


def arrow(path: Path, first: int, last: int | None) -> Iterator[dict[str, Any]]:
    """Rows of the record batches [first, last), or of all from `first` on.

    Raises:
        Exception: one of `broken()`, for a file that is not whole.
    """
    for at, batch in enumerate(arrow_batches(path)):
        if last is not None and at >= last:
            return
        if at >= first:
            batch.validate(full=True)  # Arrow trusts a file's offsets, and damaged ones would crash the process
            for start in range(0, batch.num_rows, BATCH):
                yield from rows_of(batch.slice(start, BATCH))


def rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any]]:
    """A batch's rows without nulls in objects: Arrow gives each object every key that any row has."""
    for values in batch.to_pylist():
        yield absent_dropped(values)


def absent_dropped(value: Any) -> Any:
    """`value` without the keys of objects that are null."""
    if isinstance(value, dict):
        return {
            key: absent_dropped(entry) if isinstance(entry, dict | list) else entry
            for key, entry in value.items()
            if entry is not None
        }
    return [absent_dropped(entry) for entry in value] if isinstance(value, list) else value
