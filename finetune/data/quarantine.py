"""Rows that cannot be used, written aside with their reasons, so that they can be mended or forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.files import disk_errors, write_text
from finetune.formats.example import Fault


def _reason(fault: Fault) -> str:
    where = f"{fault.field}: " if fault.field else ""
    return f"{where}found {fault.found}; expected {fault.expected}; {fault.fix}"


def write(path: Path, faults: Iterable[Fault]) -> int:
    """Write the rows at fault as JSON lines, atomically: place, index, reasons, and the row or its text in `row`.

    Args:
        path: the file to write; without any fault it is empty, and so replaces that of an earlier attempt.
        faults: of rows (`index` at least 0), those of a row next to each other, as `examples` yields them.

    Returns:
        How many rows were written.

    Raises:
        DiskError: the file could not be written.
    """
    written = _lines(faults)
    write_text(path, "".join(f"{line}\n" for line in written))
    return len(written)


def append(path: Path | None, faults: Iterable[Fault]) -> int:
    """Write the rows at fault behind those that are there, and count them.

    Args:
        path: the file; None only counts them.
        faults: as `write` takes them.

    Raises:
        DiskError: the file could not be written.
    """
    written = _lines(faults)
    if path is not None and written:
        with disk_errors(path), open(path, "a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in written))
    return len(written)


def _lines(faults: Iterable[Fault]) -> list[str]:
    """An entry for each row at fault."""
    found: list[str] = []
    for (place, index), group in groupby(faults, key=lambda fault: (fault.place, fault.index)):
        assert index >= 0, f"{place}: the fault of a whole file stops a run; no row can be set aside"
        told = list(group)
        found.append(_line(place, index, [_reason(fault) for fault in told], told[0].raw))
    return found


def _line(place: str, index: int, reasons: list[str], raw: Any) -> str:
    """An entry as JSON; a row that JSON cannot write (NaN from a Parquet file) as Python shows it."""
    told = {"place": place, "index": index, "reasons": reasons}
    try:
        line = json.dumps({**told, "row": raw}, ensure_ascii=False, allow_nan=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        line = json.dumps({**told, "row": repr(raw)}, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace").decode()  # half a character is written as its escape
