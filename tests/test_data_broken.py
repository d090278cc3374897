"""Broken rows and files: whatever is done to them, faults come out, with the right line, and nothing else."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from finetune.data.examples import Located, examples
from finetune.formats.example import Fault
from finetune.recipe.sections import Source

FAST, SLOW = 400, 10_000


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _text(draw: random.Random) -> str:
    words = [
        "tea",
        "7 + 5",
        "l'été",
        "茶",
        "🙂",
        '"quoted":',
        "a\\b",
        "line\nbreak",
        "<|im_end|>",
        "{",
        "]",
        "NaN",
        ":",
    ]
    return " ".join(draw.choice(words) for _ in range(draw.randint(1, 6)))


def _chat(draw: random.Random) -> list[dict[str, Any]]:
    turns = [
        {"role": role, "content": _text(draw)} for _ in range(draw.randint(1, 3)) for role in ("user", "assistant")
    ]
    return [{"role": "system", "content": _text(draw)}, *turns] if draw.random() < 0.3 else turns


def _sharegpt(draw: random.Random) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in _chat(draw)]


ROWS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "messages": lambda draw: {"messages": _chat(draw), "score": draw.random()},
    "sharegpt": lambda draw: {"conversations": _sharegpt(draw)},
    "alpaca": lambda draw: {"instruction": _text(draw), "output": _text(draw)},
    "prompt_completion": lambda draw: {"prompt": _text(draw), "completion": _text(draw)},
    "text": lambda draw: {"text": _text(draw), "n": [1, 2.5, None]},
    "preference": lambda draw: {"prompt": _text(draw), "chosen": "a" + _text(draw), "rejected": "b" + _text(draw)},
    "unpaired": lambda draw: {"prompt": _text(draw), "completion": _text(draw), "label": draw.random() < 0.5},
    "prompt": lambda draw: {"prompt": _chat(draw)},
}


def _column(row: dict[str, Any]) -> str:
    return next(iter(row))


def _cut(text: bytes, draw: random.Random) -> bytes:
    return text[: draw.randint(1, len(text) - 1)]


# Each makes a written row one that no format takes.
BREAKS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut short": _cut,
    "not an object": lambda text, draw: b"[" + text + b"]",
    "empty object": lambda text, draw: b"{}",
    "doubled key": lambda text, draw: text[:-1] + b"," + text[1:],
    "NaN": lambda text, draw: text[:-1] + b', "x": NaN}',
    "infinity": lambda text, draw: text[:-1] + b', "x": [-Infinity]}',
    "half a character": lambda text, draw: text[:-1] + b', "x": ["\\ud83d"]}',
    "bad byte": lambda text, draw: text[:-1] + b', "x": "\xff"}',
    "control character": lambda text, draw: text[:-1] + b', "x": "\x01"}',
    "more behind": lambda text, draw: text + b" x",
    "wrong type": lambda text, draw: json.dumps({_column(json.loads(text)): 5}).encode(),
    "null": lambda text, draw: json.dumps({_column(json.loads(text)): None}).encode(),
    "empty list": lambda text, draw: json.dumps({_column(json.loads(text)): []}).encode(),
    "other columns": lambda text, draw: b'{"unknown": "x"}',
    "deep": lambda text, draw: b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "huge number": lambda text, draw: text[:-1] + b', "x": ' + b"9" * 5000 + b"}",
}


def _written(rows: list[bytes], layout: str) -> tuple[bytes, int]:
    """A file's content, and the line its first row is on."""
    if layout == "lines":
        return b"\n".join(rows) + b"\n", 1
    return b"[\n" + b",\n".join(rows) + b"\n]", 2


def _one_broken_row(draw: random.Random) -> None:
    kind = draw.choice(list(ROWS))
    rows = [json.dumps(ROWS[kind](draw), ensure_ascii=draw.random() < 0.5).encode() for _ in range(draw.randint(3, 6))]
    at = draw.randrange(len(rows))
    how = draw.choice(list(BREAKS))
    rows[at] = BREAKS[how](rows[at], draw)
    Path("a.jsonl").write_bytes(_written(rows, "lines")[0])
    found = list(examples(Source(path="a.jsonl", format=kind)))
    told = [item for item in found if isinstance(item, Fault)]
    assert told, (how, rows[at])
    assert {fault.place for fault in told} == {f"a.jsonl:{at + 1}"}, (how, rows[at], [str(fault) for fault in told])
    assert {fault.index for fault in told} == {at}
    assert all(fault.raw is not None for fault in told), (how, rows[at])
    good = [item for item in found if isinstance(item, Located)]
    assert [item.index for item in good] == [number for number in range(len(rows)) if number != at]


# What leaves an array well-formed: reading goes on behind the row. The rest ends the file at its line.
WELL_FORMED = {"empty object", "doubled key", "NaN", "infinity", "half a character", "wrong type", "null", "empty list",
               "other columns", "not an object"}  # fmt: skip
IN_LINE = WELL_FORMED | {"bad byte", "control character", "more behind", "deep", "huge number"}


def _one_broken_element(draw: random.Random) -> None:
    kind = draw.choice(list(ROWS))
    rows = [json.dumps(ROWS[kind](draw), ensure_ascii=draw.random() < 0.5).encode() for _ in range(draw.randint(3, 6))]
    at = draw.randrange(len(rows))
    how = draw.choice(sorted(IN_LINE))
    rows[at] = BREAKS[how](rows[at], draw)
    content, first = _written(rows, "array")
    name = draw.choice(["a.json", "a.jsonl"])
    Path(name).write_bytes(content)
    found = list(examples(Source(path=name, format=kind)))
    told = [item for item in found if isinstance(item, Fault)]
    assert {fault.place for fault in told} == {f"{name}:{at + first}"}, (how, rows[at], [str(fault) for fault in told])
    good = [item.index for item in found if isinstance(item, Located)]
    others = [number for number in range(len(rows)) if number != at]
    before = range(at + (how == "more behind"))  # such a row is whole before what stands behind it
    assert good == (others if how in WELL_FORMED else list(before)), how


def _one_changed_byte(draw: random.Random) -> None:
    kind = draw.choice(list(ROWS))
    rows = [json.dumps(ROWS[kind](draw)).encode() for _ in range(4)]
    at = draw.randrange(len(rows))
    row = bytearray(rows[at])
    for _ in range(draw.randint(1, 3)):
        spot = draw.randrange(len(row))
        byte = draw.choice([*b'{}[]":,\\ \t\r\0', *range(128, 256, 17)])
        row[spot : spot + draw.randint(0, 2)] = bytes([byte] * draw.randint(0, 2))
        row = row or bytearray(b"x")
    rows[at] = bytes(row)
    Path("a.jsonl").write_bytes(_written(rows, "lines")[0])
    found = list(examples(Source(path="a.jsonl", format=kind)))
    whole = [item for item in found if isinstance(item, Fault) and item.index < 0]
    if b"\0" in rows[at] or (at == 0 and rows[0][:1] == b"["):
        return  # binary data, or an array, as a whole
    assert not whole, [str(fault) for fault in whole]
    assert {item.index for item in found if isinstance(item, Fault)} <= {at}
    assert {item.index for item in found if isinstance(item, Located)} >= set(range(4)) - {at}


def _file(kind: str, draw: random.Random) -> tuple[str, bytes]:
    """A whole file of some kind."""
    rows = [ROWS["prompt_completion"](draw) for _ in range(draw.randint(1, 30))]
    table = pyarrow.Table.from_pylist(rows)
    plain = "\n".join(json.dumps(row) for row in rows).encode()
    match kind:
        case "jsonl.gz":
            return kind, gzip.compress(plain)
        case "jsonl.bz2":
            return kind, bz2.compress(plain)
        case "jsonl.xz":
            return kind, lzma.compress(plain)
        case "json.zst":
            return kind, zstandard.compress(json.dumps(rows, indent=1).encode())
        case "json":
            return kind, json.dumps(
                draw.choice([rows, {"data": rows}, {"v": 1, "rows": rows, "n": [{}]}]), indent=1
            ).encode()
        case "csv" | "tsv":
            mark = "," if kind == "csv" else "\t"
            cells = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in rows)]
            return kind, "\r\n".join(mark.join(_quoted(cell) for cell in line) for line in cells).encode()
        case "parquet":
            sink = pyarrow.BufferOutputStream()
            pyarrow.parquet.write_table(table, sink, row_group_size=7)
            return kind, sink.getvalue().to_pybytes()
        case "arrow":
            sink = pyarrow.BufferOutputStream()
            make = pyarrow.ipc.new_file if draw.random() < 0.5 else pyarrow.ipc.new_stream
            with make(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
            return kind, sink.getvalue().to_pybytes()
    return "txt", plain


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


KINDS = ("jsonl.gz", "jsonl.bz2", "jsonl.xz", "json.zst", "json", "csv", "tsv", "parquet", "arrow", "txt")


def _one_damaged_file(draw: random.Random) -> None:
    suffix, content = _file(draw.choice(KINDS), draw)
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        spot = draw.randrange(len(damaged)) if damaged else 0
        match draw.randrange(4):
            case 0:
                damaged[spot : spot + 1] = bytes([draw.randrange(256)])
            case 1:
                del damaged[spot : spot + draw.randint(1, 50)]
            case 2:
                damaged[spot:spot] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 5)))
            case 3:
                damaged = damaged[:spot] if draw.random() < 0.5 else damaged
    name = f"a.{suffix}"
    Path(name).write_bytes(damaged)
    layout = draw.choice(["auto", "prompt_completion"])
    total = damaged.count(b"\n") + damaged.count(b"\r") + 1
    for item in examples(Source(path=name, format=layout)):
        assert isinstance(item, Located | Fault)
        assert item.place.startswith(name)
        line = item.place.removeprefix(name).removeprefix(":")
        if suffix in ("json", "csv", "tsv", "txt") and line:
            assert 1 <= int(line) <= total


def _many(case: Callable[[random.Random], None], count: int) -> None:
    for number in range(count):
        draw = random.Random(number)
        try:
            case(draw)
        except Exception as error:
            raise AssertionError(f"{case.__name__}(random.Random({number}))") from error


CASES = [_one_broken_row, _one_broken_element, _one_changed_byte, _one_damaged_file]


@pytest.mark.parametrize("case", CASES)
def test_broken_rows_and_files_give_faults_at_their_line(case: Callable[[random.Random], None]) -> None:
    _many(case, FAST)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_broken_rows_and_files_give_faults_at_their_line(case: Callable[[random.Random], None]) -> None:
    _many(case, SLOW)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_that_are_damaged_are_whole_before(kind: str) -> None:
    suffix, content = _file(kind, random.Random(1))
    Path(f"a.{suffix}").write_bytes(content)
    found = list(examples(Source(path=f"a.{suffix}")))
    assert len(found) >= 1
    assert not [str(item) for item in found if isinstance(item, Fault)]


@pytest.mark.parametrize("kind", ROWS)
def test_the_rows_that_are_broken_are_whole_before(kind: str) -> None:
    draw = random.Random(1)
    Path("a.jsonl").write_bytes(b"\n".join(json.dumps(ROWS[kind](draw)).encode() for _ in range(20)))
    found = list(examples(Source(path="a.jsonl")))
    assert [type(item) for item in found] == [Located] * 20
