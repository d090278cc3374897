"""Rows of JSON files, each with its line; strict, so that nothing ambiguous is trained. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.formats.example import Fault, describe, shorten

CONTAINERS = ("data", "rows", "examples")
BLANK = " \t\r\n"
CUT_SHORT = "the compressed file ends early or is damaged; copy or make it again"


class _Refused(ValueError):
    """JSON that parses, but says something no reader agrees on."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {double!r} twice in one object")
    for key, item in pairs:
        if not key.isascii() or (isinstance(item, str) and not item.isascii()):
            _refuse_half_pairs(key, item)
    return value


def _refuse_half_pairs(key: str, item: Any) -> None:
    """JSON may escape half of a surrogate pair, as a cut through an emoji leaves; no tokenizer takes it."""
    try:
        f"{key}{item if isinstance(item, str) else ''}".encode()
    except UnicodeEncodeError as error:
        raise _Refused(f"half of a character (\\u{ord(error.object[error.start]):04x}) in {key!r}") from None


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name}, which JSON does not have")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def broken(error: ValueError | RecursionError, text: str, place: str) -> Fault:
    """What is wrong with a piece of JSON."""
    if isinstance(error, _Refused):
        return Fault("", str(error), "unambiguous JSON", "correct it", place)
    if isinstance(error, json.JSONDecodeError):
        near = text[max(0, error.pos - 10) : error.pos + 20].strip()
        at = f"column {error.colno}" + (f" near {shorten(near)}" if near else "")
        return Fault("", f"broken JSON at {at} ({error.msg})", "one JSON object", "correct or remove it", place)
    return Fault("", f"JSON that cannot be read ({error})", "one JSON object", "correct or remove it", place)


def row_or_fault(value: Any, place: str) -> dict[str, Any] | Fault:
    """`value` if it is a non-empty object, else the fault that it is not."""
    if isinstance(value, dict) and value:
        return value
    return Fault("", describe(value), "an object with columns", "write each row as {...}", place)


def undecodable(error: UnicodeDecodeError, place: str) -> Fault:
    """Bytes that are not UTF-8."""
    found = f"the byte 0x{error.object[error.start]:02x} at position {error.start + 1}, which is not UTF-8"
    return Fault("", found, "UTF-8 text", "save the file as UTF-8", place)


def lines(stream: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Rows of JSON lines: one object per line, blank lines skipped.

    Only \\n ends a line: a JSON string may hold other characters that some readers take for line ends.

    Yields:
        `name:line` and the row or its fault.
    """
    for number, raw in enumerate(stream, 1):
        place = f"{name}:{number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip(BLANK)
        except UnicodeDecodeError as error:
            yield place, undecodable(error, place)
            continue
        if not text:
            continue
        try:
            yield place, row_or_fault(DECODER.decode(text), place)
        except (ValueError, RecursionError) as error:
            yield place, broken(error, text, place)


def document(raw: bytes, name: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Rows of a JSON file: an array of objects, `{"data": [...]}`, one object, or JSON lines under the wrong name.

    Yields:
        `name:line` of where the row begins, and the row or its fault.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{name}:{line_at(raw, error.start)}"
        yield place, undecodable(error, place)
        return
    start = _skip(text, 0)
    if start < len(text) and text[start] == "[":
        yield from _array(text, start, name)
    elif start < len(text):
        yield from _object(text, start, raw, name)


def line_at(content: str | bytes, position: int) -> int:
    """The 1-based line that `position` lies in."""
    return (content.count("\n", 0, position) if isinstance(content, str) else content.count(b"\n", 0, position)) + 1


def _skip(text: str, position: int) -> int:
    """The first position from `position` on that is not blank."""
    while position < len(text) and text[position] in BLANK:
        position += 1
    return position


def _object(text: str, start: int, raw: bytes, name: str) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Rows of a file that does not begin with an array."""
    place = f"{name}:{line_at(text, start)}"
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        first = text[start:].split("\n", 1)
        if len(first) > 1 and first[1].strip(BLANK) and first[1].lstrip(BLANK)[:1] == "{":
            yield from lines(raw.split(b"\n"), name)
            return
        line = line_at(text, getattr(error, "pos", start))
        yield f"{name}:{line}", broken(error, text, f"{name}:{line}")
        return
    if _skip(text, end) < len(text):
        yield from lines(raw.split(b"\n"), name)
        return
    container = next((key for key in CONTAINERS if isinstance(value, dict) and isinstance(value.get(key), list)), None)
    if container is None:
        yield place, row_or_fault(value, place)
        return
    # The value is known to be whole and its keys unique, so the array begins after the key at depth one.
    position = _skip(text, start + 1)
    while True:
        key, position = DECODER.raw_decode(text, position)
        position = _skip(text, _skip(text, position) + 1)
        if key == container:
            yield from _array(text, position, name, alone=False)
            return
        position = _skip(text, _skip(text, DECODER.raw_decode(text, position)[1]) + 1)


def _array(text: str, start: int, name: str, *, alone: bool = True) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Elements of the array at `start`; after broken JSON the rest of it cannot be told apart, so reading stops."""
    position, line, counted = _skip(text, start + 1), 1, 0
    if position < len(text) and text[position] == "]":
        position += 1
    else:
        while True:
            line, counted = line + text.count("\n", counted, position), position
            place = f"{name}:{line}"
            try:
                value, position = DECODER.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                at = line + text.count("\n", counted, getattr(error, "pos", counted))
                yield f"{name}:{at}", broken(error, text, f"{name}:{at}")
                if isinstance(error, json.JSONDecodeError | RecursionError):
                    return
                # A refused object is well-formed: step over it and go on.
                value, position = json.JSONDecoder().raw_decode(text, position)
            else:
                yield place, row_or_fault(value, place)
            position = _skip(text, position)
            mark = text[position : position + 1]
            if mark == "]":
                position += 1
                break
            if mark != ",":
                spot = f"{name}:{line_at(text, position)}"
                found = f"{shorten(mark)} after a row" if mark else "the end of the file inside the array"
                yield spot, Fault("", found, "',' or ']'", "correct the JSON", spot)
                return
            position = _skip(text, position + 1)
    rest = _skip(text, position)
    if alone and rest < len(text):
        spot = f"{name}:{line_at(text, rest)}"
        yield spot, Fault("", f"{shorten(text[rest : rest + 20])} after the array", "the end", "correct the JSON", spot)
