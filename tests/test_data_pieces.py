"""A source divided into pieces gives the rows of the whole, in order, whatever the pieces' size; memory stays flat."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune.data.examples import examples, layout_of, piece_examples
from finetune.data.json_document import document
from finetune.data.read import Piece, Row, pieces, read, read_piece
from finetune.formats.example import Fault, Format
from finetune.recipe.sections import Source

LINES = st.lists(
    st.sampled_from(
        ['{"text": "a"}', '{"text": "bb\\n"}', "", "  ", "{", "[1]", '{"text": "茶🙂"}', '{"text": "\xff"}']
    ),
    max_size=12,
)


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def work(source: Source, size: int) -> list[Piece]:
    found = pieces(source, size=size)
    assert not isinstance(found, Fault), str(found)
    return found


def together(source: Source, size: int) -> list[Row | Fault]:
    return [item for piece in work(source, size) for item in read_piece(piece)]


@given(
    rows=LINES,
    size=st.integers(1, 80),
    ended=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
    marked=st.booleans(),
)
def test_pieces_of_json_lines_are_the_whole(
    rows: list[str], size: int, ended: bool, newline: str, marked: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume("".join(rows).lstrip()[:1] != "[")  # such a file may be one array, which is not divided
    path = tmp_path_factory.getbasetemp() / "pieces.jsonl"
    content = newline.join(rows) + (newline if ended else "")
    path.write_bytes((b"\xef\xbb\xbf" if marked else b"") + content.encode("utf-8").replace("ÿ".encode(), b"\xff"))
    source = Source(path=str(path))
    whole = together(source, 1 << 20)
    assert together(source, size) == whole
    expected = [number for number, line in enumerate(rows) if line.strip()]
    assert [item.index for item in whole] == expected
    assert [item.place for item in whole] == [f"{path}:{number + 1}" for number in expected]


@pytest.mark.parametrize("size", [1, 100, 300, 10_000])
def test_pieces_of_columns_are_the_whole(size: int) -> None:
    table = pyarrow.Table.from_pylist([{"text": f"row {number}"} for number in range(50)])
    pyarrow.parquet.write_table(table, "a.parquet", row_group_size=7)
    for name, make in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with make(name, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        source = Source(path=name)
        rows = together(source, size)
        assert [item.values["text"] for item in rows if isinstance(item, Row)] == [f"row {n}" for n in range(50)]
        assert [item.index for item in rows] == list(range(50))
        assert [item.place for item in rows] == [f"{name} row {number + 1}" for number in range(50)]
        assert (len(work(source, size)) > 1) == (size <= 300)
        assert sum(piece.size for piece in work(source, size)) == sum(piece.size for piece in work(source, 1))


class Drops(io.BytesIO):
    """A file that gives a few bytes at a time, so that every cut through it is met."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self.most = most

    def read(self, size: int | None = -1) -> bytes:
        return super().read(self.most)

    read1 = read


WELL = st.sampled_from(
    [
        "{}",
        '{"a": 1234}',
        '{"text": "茶🙂 \\" \\u8336"}',
        '{"a": [true, -1.5e7, {"b": null}]}',
        '{"data": [{"a": 1}]}',
        "12",
        "null",
    ]
)
ILL = st.sampled_from(
    [
        '{"a": nul}',
        '{"a": "x',
        '{"a": 1,}',
        '{"a" 1}',
        "tru",
        '"\xff"',
        '"\xfe"',
        '{"a": "\\ud83d"}',
        '{"a": 1, "a": 2}',
    ]
)
BETWEEN = st.sampled_from([",", ", ", ",\n", "\n,\n\n  ", " "])
OPENINGS = st.sampled_from(
    [("[", "]"), ("[\n ", "\n]\n"), ('{"v": {"rows": 1},\n"rows": [', '], "w": 10}'), ("", ""), ("[", "")]
)


@given(
    items=st.lists(WELL | ILL, min_size=1, max_size=5),
    between=BETWEEN,
    around=OPENINGS,
    most=st.integers(1, 9),
    marked=st.booleans(),
)
def test_a_document_is_read_alike_wherever_it_is_cut(
    items: list[str], between: str, around: tuple[str, str], most: int, marked: bool
) -> None:
    text = ("\ufeff" if marked else "") + around[0] + between.join(items) + around[1]
    content = text.encode().replace("þ".encode(), b"\xe2\x82").replace("ÿ".encode(), b"\xff")
    whole = list(document(lambda: io.BytesIO(content), "a"))
    assert list(document(lambda: Drops(content, most), "a")) == whole


def test_small_pieces_are_many_and_know_their_size() -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(100)))
    found = work(Source(path="a.jsonl"), 1000)
    assert len(found) >= 10
    assert sum(piece.size for piece in found) == Path("a.jsonl").stat().st_size
    assert len(work(Source(path="a.jsonl"), 1 << 20)) == 1


def _folder() -> Source:
    """Every kind of file, each with two or three rows and some with what makes counting hard."""
    Path("rows/deep").mkdir(parents=True)
    rows = [{"text": "one"}, {"text": "two"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path("rows/a.csv").write_text('text\none\n\n"tw\no"\n')
    Path("rows/b.json").write_text(json.dumps([*rows, 5], indent=1))
    Path("rows/c.jsonl").write_text(f"\n{text}\n{{\n")
    Path("rows/d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    Path("rows/deep/e.txt").write_text("three")
    Path("rows/deep/f.jsonl").write_text(text.rstrip("\n"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows/g.parquet")
    Path("rows/h.jsonl").write_text(text)
    return Source(path="rows")


@pytest.mark.parametrize("size", [1, 20, 1 << 20])
def test_indexes_of_later_files_follow_those_of_earlier_ones(size: int) -> None:
    source = _folder()
    rows = together(source, size)
    assert [(item.place.removeprefix("rows/"), item.index) for item in rows] == [
        ("a.csv:2", 0), ("a.csv:4", 1),
        ("b.json:2", 2), ("b.json:5", 3), ("b.json:8", 4),
        ("c.jsonl:2", 6), ("c.jsonl:3", 7), ("c.jsonl:5", 9),
        ("d.jsonl.gz:1", 10), ("d.jsonl.gz:2", 11),
        ("deep/e.txt:1", 12),
        ("deep/f.jsonl:1", 13), ("deep/f.jsonl:2", 14),
        ("g.parquet row 1", 15), ("g.parquet row 2", 16),
        ("h.jsonl:1", 17), ("h.jsonl:2", 18),
    ]  # fmt: skip
    assert list(read(source)) == rows


def _converted(piece: Piece, source: Source, layout: Format) -> list[Any]:
    return list(piece_examples(piece, source, layout))


def test_other_processes_convert_pieces_to_the_same_examples() -> None:
    source = _folder()
    layout = layout_of(source)
    assert isinstance(layout, Format)
    parts = work(source, 20)
    assert pickle.loads(pickle.dumps((parts, source, layout))) == (parts, source, layout)  # noqa: S301 - our own bytes
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_converted, piece, source, layout) for piece in parts]
        found = [item for future in futures for item in future.result()]
    assert found == list(examples(source))
    assert len(found) == 17


def _peak(path: str) -> int:
    """Bytes of the highest mark while a file's rows are read and let go."""
    tracemalloc.start()
    try:
        count = sum(isinstance(item, Row) for item in read(Source(path=path)))
        assert count >= 100
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "c.json", "a.jsonl.gz", "a.csv"])
def test_memory_does_not_grow_with_the_file(name: str) -> None:
    def content(count: int) -> bytes:
        rows = [{"text": f"{number} " + "tea " * 2000} for number in range(count)]
        match name:
            case "a.json":
                return json.dumps(rows).encode()
            case "b.json":
                return json.dumps({"v": 1, "data": rows}, indent=2).encode()
            case "c.json":
                return b"\n".join(json.dumps(row).encode() for row in rows)
            case "a.csv":
                return b"text\n" + b"\n".join(row["text"].encode() for row in rows)
        text = b"\n".join(json.dumps(row).encode() for row in rows)
        return gzip.compress(text, 1) if name.endswith(".gz") else text

    Path(name).write_bytes(content(1_500))
    small = _peak(name)
    Path(name).write_bytes(content(6_000))
    large = _peak(name)
    assert large < small * 1.2
    assert large < 12 * 2**20
