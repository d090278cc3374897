"""What a source's path may stand for: compressed files, folders, globs, saved data sets, and columns by other names."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from finetune.data.examples import examples
from finetune.data.read import Row, read
from finetune.data.source import SUFFIXES, HubDataset, LocalFiles, locate
from finetune.formats.example import Conversation, Fault, PromptCompletion, Text
from finetune.recipe.sections import Source

ROWS = [{"text": "one"}, {"text": "two, with a comma"}, {"text": "三\nthree"}]
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(path: str, **more: Any) -> list[str]:
    found = list(read(Source(path=path, **more)))
    assert not [str(item) for item in found if isinstance(item, Fault)]
    return [item.values["text"] for item in found if isinstance(item, Row)]


def fault(path: str, **more: Any) -> str:
    found = list(examples(Source(path=path, **more)))
    assert all(isinstance(item, Fault) for item in found), found
    assert len(found) == 1
    return str(found[0])


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.csv", 'text\none\n"two, with a comma"\n"三\nthree"\n'),
        ("a.tsv", 'text\tn\none\t1\ntwo, with a comma\t2\n"三\nthree"\t3\n'),
    ],
)
def test_compressed_files_hold_the_same_rows(name: str, content: str, packing: str) -> None:
    Path(f"{name}.{packing}").write_bytes(PACK[packing](content.encode()))
    assert texts(f"{name}.{packing}") == [row["text"] for row in ROWS]


@pytest.mark.parametrize("packing", PACK)
def test_cut_off_compressed_files_tell_how_far_they_could_be_read(packing: str) -> None:
    rows = [{"text": f"{number * 7919} {number**5}"} for number in range(60_000)]
    text = json_lines(rows).encode()
    content = lzma.compress(text, preset=0) if packing == "xz" else PACK[packing](text)
    name = {"gz": "gzip", "bz2": "bzip2", "xz": "xz", "zst": "zstd"}[packing]
    Path(f"a.jsonl.{packing}").write_bytes(content[: len(content) * 3 // 4])
    found = list(read(Source(path=f"a.jsonl.{packing}")))
    told = [item for item in found if isinstance(item, Fault)][-1]
    assert told.found.startswith(f"damaged {name} data after a.jsonl.{packing}:")
    assert told.index == -1
    assert len(found) > 1000
    Path(f"a.jsonl.{packing}").write_bytes(b"nothing of the kind")
    assert f"damaged {name} data" in fault(f"a.jsonl.{packing}")


def test_several_zstd_frames_are_one_file() -> None:
    frames = [zstandard.compress(json_lines([row]).encode()) for row in ROWS]
    Path("a.jsonl.zst").write_bytes(b"".join(frames))
    assert texts("a.jsonl.zst") == [row["text"] for row in ROWS]


def test_zstd_without_its_package_says_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl.zst").write_bytes(zstandard.compress(b"{}"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert fault("a.jsonl.zst") == (
        "a.jsonl.zst: found zstd data, and the package zstandard is not installed; expected a package that reads it; "
        "pip install zstandard"
    )


def test_a_text_file_is_one_row() -> None:
    Path("a.txt").write_bytes("\ufefffirst line\r\n\r\nsecond line\n".encode())
    assert texts("a.txt") == ["first line\r\n\r\nsecond line\n"]
    (item,) = examples(Source(path="a.txt"))
    assert not isinstance(item, Fault)
    assert item.example == Text("first line\r\n\r\nsecond line\n")
    Path("a.txt").write_text("")
    assert fault("a.txt").startswith("a.txt: found no rows")
    Path("a.txt").write_bytes(b"one\ntwo \xe9\n")
    assert fault("a.txt").startswith("a.txt:2: found the byte 0xe9 at position 9, which is not UTF-8")


def test_json_lines_named_file_that_holds_an_array_is_read() -> None:
    for content in (json.dumps(ROWS), json.dumps(ROWS, indent=1), "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"):
        Path("a.jsonl").write_text(content)
        assert texts("a.jsonl") == [row["text"] for row in ROWS]


def test_folder_gives_all_its_data_files_in_order() -> None:
    Path("rows/b/.hidden").mkdir(parents=True)
    Path("rows/__pycache__").mkdir()
    for place in ("rows/b/2.jsonl", "rows/.x.jsonl", "rows/b/.hidden/3.jsonl", "rows/__pycache__/4.jsonl"):
        Path(place).write_text(json_lines([{"text": place}]))
    Path("rows/b/1.json").write_text(json.dumps([{"text": "rows/b/1.json"}]))
    Path("rows/a.txt").write_text("rows/a.txt")
    Path("rows/c.parquet").write_bytes(b"")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "rows/c.parquet"}]), "rows/c.parquet")
    Path("rows/README.md").write_text("About the rows.")
    Path("rows/dataset_info.json").write_text("{}")
    assert texts("rows") == ["rows/a.txt", "rows/b/1.json", "rows/b/2.jsonl", "rows/c.parquet"]
    assert texts("rows/") == texts("rows")
    where = locate(Source(path="rows"))
    assert isinstance(where, LocalFiles)
    assert where.ignored == ("rows/README.md", "rows/dataset_info.json")


def test_folder_without_data_is_a_fault() -> None:
    Path("rows").mkdir()
    Path("rows/README.md").write_text("x")
    assert fault("rows").startswith("rows: found a folder with 1 file, none of them a data file; expected a data file")


def test_what_is_no_file_is_named_and_never_waited_for() -> None:
    os.mkfifo("a.jsonl")
    assert fault("a.jsonl") == (
        "a.jsonl: found a pipe or a device; expected a file, which can be read more than once; write what comes from "
        "it to a file first"
    )
    Path("folder").mkdir()
    os.mkfifo("folder/b.jsonl")
    assert fault("folder").startswith("folder/b.jsonl: found a pipe or a device")


def test_link_to_nothing_is_told_as_that() -> None:
    Path("a.jsonl").symlink_to("gone.jsonl")
    Path("b.jsonl").write_text(json_lines(ROWS))
    assert fault("a.jsonl") == (
        f"a.jsonl: found a link to gone.jsonl, which does not exist; expected a data file ({SUFFIXES}); did you mean "
        "b.jsonl?"
    )


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_git_lfs_pointers_are_told_as_that(name: str) -> None:
    Path(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert fault(name) == f"{name}: found a git-lfs pointer; expected the file itself; run git lfs pull"


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ",")])
@pytest.mark.parametrize("cell", ["plain", '"quoted"'])
def test_another_separator_is_told_as_that(name: str, mark: str, cell: str) -> None:
    Path(name).write_text(f"prompt{mark}completion\n{cell}{mark}{cell}\n")
    wanted = "commas" if name == "a.csv" else "tabs"
    assert fault(name) == (
        f"{name}:1: found a header with {mark!r} between its names; expected {wanted}; save the file with {wanted} "
        "between its cells"
    )


def test_files_of_several_formats_are_to_be_sources_of_their_own() -> None:
    Path("folder").mkdir()
    Path("folder/a.jsonl").write_text(json_lines([{"text": "x"}]))
    Path("folder/b.jsonl").write_text(json_lines([{"prompt": "x", "completion": "y"}]))
    assert fault("folder").endswith(
        "they fit prompt_completion (folder/b.jsonl:1) and text (folder/a.jsonl:1): make the rows of each format a "
        "source of their own"
    )


def test_folder_that_mixes_training_and_held_out_files_is_refused() -> None:
    Path("rows").mkdir()
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        Path("rows", name).write_text(json_lines(ROWS))
    assert fault("rows") == (
        "rows: found files of training and of held-out rows (train-00000-of-00001.jsonl, test-00000-of-00001.jsonl); "
        "expected files of one split; name those to read, as rows/**/train*"
    )
    assert len(texts("rows/**/train*")) == 3
    assert len(texts("rows/*.jsonl")) == 6


@pytest.mark.parametrize("pattern", ["rows/*.jsonl", "rows/part-?.jsonl", "rows/part-[12].jsonl", "r*/**/*.jsonl"])
def test_globs_give_the_files_they_match(pattern: str) -> None:
    Path("rows").mkdir()
    for number in (2, 1):
        Path(f"rows/part-{number}.jsonl").write_text(json_lines([{"text": str(number)}]))
    Path("rows/other.csv").write_text("text\n3\n")
    assert texts(pattern) == ["1", "2"]


def test_glob_without_a_match_names_the_nearest() -> None:
    Path("rows").mkdir()
    Path("rows/train-1.jsonl").write_text(json_lines(ROWS))
    assert fault("rows/trian-*.jsonl") == (
        "rows/trian-*.jsonl: found a pattern that nothing matches; expected a data file (jsonl, ndjson, json, txt, "
        "csv, tsv (each also .gz, .bz2, .xz or .zst), parquet or arrow); the nearest are rows/train-1.jsonl"
    )
    Path("rows/notes.md").write_text("x")
    assert "found 1 match of which none is a data file" in fault("rows/*.md")


def test_file_whose_name_holds_a_bracket_is_that_file() -> None:
    Path("rows[1].jsonl").write_text(json_lines(ROWS))
    assert len(texts("rows[1].jsonl")) == 3


def test_what_datasets_saved_is_read_back_in_its_order() -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": str(number), "more": {"n": number}} for number in range(20)])
    rows.select(range(19, -1, -1)).save_to_disk("saved", num_shards=3)
    assert texts("saved") == [str(number) for number in range(19, -1, -1)]
    assert "split 'test' of a local folder" in fault("saved", split="test")
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk("both")
    assert len(texts("both")) == 20
    assert texts("both", split="test") == ["0"]
    assert fault("both", split="dev") == (
        "both: split: found no split 'dev'; expected a split of the saved data set; set split to one of test, train"
    )
    Path("saved/data-00001-of-00003.arrow").unlink()
    assert "a saved data set whose files are not all there" in fault("saved")


def test_saved_data_set_is_read_as_its_state_says() -> None:
    Path("saved").mkdir()
    for name, text in (("data-1.arrow", "b"), ("data-0.arrow", "a"), ("cache-1.arrow", "c")):
        table = pyarrow.table({"text": [text]})
        with pyarrow.ipc.new_stream(f"saved/{name}", table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]
    Path("saved/state.json").write_text(json.dumps({"_data_files": files}))
    assert texts("saved") == ["b", "a"]
    Path("saved/state.json").write_text("{}")
    assert "a state.json that does not list the data files" in fault("saved")


def test_hub_data_set_without_a_revision_says_so() -> None:
    assert HubDataset("a/b", "train", "abc").note() is None
    told = HubDataset("a/b", "train", None).note()
    assert told == "a/b: no revision is pinned, so a later run may read other rows; set the source's revision"


def test_hub_rows_are_streamed_lazily_and_a_broken_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from finetune.errors import EnvironmentFault

    taken: list[int] = []

    def rows() -> Any:
        for number in range(5):
            taken.append(number)
            if number == 3:
                raise ConnectionError("gone")
            yield {"text": str(number), "none": None}

    def load(name: str, **asked: Any) -> Any:
        assert (name, asked) == ("a/b", {"split": "train", "revision": "abc", "streaming": True})
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read(Source(path="a/b", revision="abc"), streaming=True)
    assert next(found) == Row({"text": "0"}, 0, "a/b[train] row 1")
    assert len(taken) <= 2
    with pytest.raises(EnvironmentFault, match="a/b: the Hugging Face hub broke off after row 3: gone; try again"):
        list(found)


def test_renamed_columns_are_read_under_the_formats_names() -> None:
    row = {"question": "a", "answer": "b", "prompt": "not this"}
    Path("a.jsonl").write_text(json_lines([row]))
    columns = {"prompt": "question", "completion": "answer"}
    (item,) = examples(Source(path="a.jsonl", columns=columns))
    assert not isinstance(item, Fault)
    assert item.example == PromptCompletion("a", "b")
    Path("a.jsonl").write_text(json_lines([{"prompt": "a", "completion": "b"}]))
    (item,) = examples(Source(path="a.jsonl", columns={"prompt": "completion", "completion": "prompt"}))
    assert not isinstance(item, Fault)
    assert item.example == PromptCompletion("b", "a")


def test_faults_of_renamed_columns_name_the_files_columns() -> None:
    bad = {"chat": [{"role": "user", "content": 1}, {"role": "assistant", "content": "x"}]}
    Path("a.jsonl").write_text(json_lines([bad]))
    found = list(examples(Source(path="a.jsonl", columns={"messages": "chat"})))
    assert [item.field for item in found if isinstance(item, Fault)] == ["chat[0].content"]
    assert [item.raw for item in found if isinstance(item, Fault)] == [bad]


def test_renamed_column_that_no_row_has_is_a_fault_with_the_nearest() -> None:
    Path("a.jsonl").write_text(json_lines([{"question": "a", "completion": "b"}]))
    assert fault("a.jsonl", columns={"prompt": "qestion"}) == (
        "a.jsonl: columns: found no column 'qestion' in any row; expected a column of the file; did you mean "
        "'question'?"
    )


def test_renamed_column_that_only_a_late_row_has_is_found() -> None:
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows: list[dict[str, Any]] = [{"conversations": chat}] * 150
    Path("a.jsonl").write_text(json_lines([*rows, {"conversations": chat, "instructions": "Be brief."}]))
    found = list(examples(Source(path="a.jsonl", columns={"system": "instructions"})))
    assert len(found) == 151
    last = found[-1]
    assert not isinstance(last, Fault)
    assert isinstance(last.example, Conversation)
    assert last.example.messages[0] == {"role": "system", "content": "Be brief."}


def test_undecodable_cells_are_named_and_the_other_rows_read() -> None:
    Path("a.csv").write_bytes(b'text\none\n"tw\xe9\no"\nthree\n')
    found = list(read(Source(path="a.csv")))
    assert [item.place for item in found] == ["a.csv:2", "a.csv:3", "a.csv:5"]
    assert isinstance(found[1], Fault)
    assert found[1].found == "the byte 0xe9, which is not UTF-8"


def test_a_json_file_with_two_lists_of_rows_is_ambiguous() -> None:
    Path("a.json").write_text(json.dumps({"data": ROWS, "examples": ROWS}, indent=1))
    told = [item for item in read(Source(path="a.json")) if isinstance(item, Fault)]
    assert [item.found for item in told] == ["the lists data and examples"]
