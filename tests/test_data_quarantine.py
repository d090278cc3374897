"""Bad rows are written aside whole, each with its place and everything that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.data.examples import examples
from finetune.data.quarantine import write
from finetune.errors import DiskError
from finetune.formats.example import Fault
from finetune.recipe.sections import Source

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
BAD = {"messages": [{"role": "usr", "content": 1}, {"role": "assistant", "content": "茶"}], "id": 7}


def faults(path: Path) -> list[Fault]:
    return [item for item in examples(Source(path=str(path))) if isinstance(item, Fault)]


def test_each_bad_row_is_one_entry_with_all_its_reasons(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), json.dumps(BAD), '{"messages": [', "[]"]))
    assert write(tmp_path / "quarantine.jsonl", faults(path)) == 3
    first, second, third = map(json.loads, (tmp_path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines())
    assert (first["place"], first["index"], first["row"]) == (f"{path}:2", 1, BAD)
    assert first["reasons"] == [
        "messages[0].role: found text ('usr'); expected one of system, developer, user, assistant, tool; write 'user'",
        "messages[0].content: found a number (1); expected text; write it as a string",
    ]
    assert (second["place"], second["index"], second["row"]) == (f"{path}:3", 2, '{"messages": [')
    assert (third["index"], third["row"]) == (3, [])


def test_half_characters_and_what_json_does_not_have_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    raws = [{"a": "\ud83d"}, {"a": float("nan")}, {"a": b"bytes"}, {("a", 1): 1}]
    assert write(path, [Fault("", "x", "y", "z", f"a:{at}", at, raw) for at, raw in enumerate(raws)]) == 4
    rows = [json.loads(line)["row"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"a": "\ud83d"}, "{'a': nan}", {"a": "b'bytes'"}, "{('a', 1): 1}"]


def test_nothing_bad_leaves_an_empty_file_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text("earlier")
    assert write(path, []) == 0
    assert path.read_bytes() == b""


def test_fault_of_a_whole_file_is_never_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    with pytest.raises(AssertionError, match="the fault of a whole file stops a run"):
        write(path, [Fault("", "x", "y", "z", "a.gz")])
    assert not path.exists()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        write(tmp_path / "file" / "quarantine.jsonl", [])
