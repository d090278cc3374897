"""Token rows on disk: what is read is what was written, in any blocks, and damage is found and named."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from blocks import Made, block, made_rows, many_rows, plain, source, together
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import rows as module
from finetune.data.rows import FACTS, ROWS, Rows, RowsWriter, SourceRows
from finetune.errors import DataError, DiskError


@pytest.fixture(params=[1, 7, module.BATCH_TOKENS], ids="{} tokens a batch".format)
def batch_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BATCH_TOKENS", request.param)
    return int(request.param)


@settings(deadline=None)
@given(blocks=many_rows, batch=st.sampled_from([1, 7, 10**6]))
def test_what_is_read_is_what_was_written(blocks: list[list[Made]], batch: int) -> None:
    expected = [row for rows in blocks for row in rows]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_TOKENS", batch)
        read = source(Path(folder), blocks)
        assert len(read) == len(expected) == read.facts["rows"]
        assert read.facts["trained_tokens"] == sum(label != -100 for row in expected for label in row.labels)
        for i, row in enumerate(expected):
            assert read.ids(i).tolist() == list(row.ids)
            assert read.labels(i).tolist() == row.labels
            assert read.trained(i) == list(row.trained)
            assert read.place(i) == (row.row, row.turn)
        assert read.lengths.tolist() == [len(row.ids) for row in expected]
        assert read.row.tolist() == [row.row for row in expected]
        assert read.turn.tolist() == [row.turn for row in expected]
        assert read.digest.tolist() == [list(row.digest) for row in expected]
        assert read.cut.tolist() == [row.cut for row in expected]
        assert read.trained_counts.tolist() == [sum(label != -100 for label in row.labels) for row in expected]
        assert read.faults() == []


@settings(deadline=None)
@given(blocks=many_rows, data=st.data())
def test_rows_chosen_from_several_sources_are_those_of_the_sources(
    blocks: list[list[Made]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = [source(Path(folder) / str(at), [rows], f"s{at}") for at, rows in enumerate(blocks)]
        expected = [(f"s{at}", row) for at, rows in enumerate(blocks) for row in rows]
        order = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=8)) if expected else []
        chosen = Rows.of(parts).take(np.array(order, np.int64))
        assert len(chosen) == len(order)
        for i, at in enumerate(order):
            name, row = expected[at]
            found = chosen[i]
            assert found["input_ids"].tolist() == list(row.ids) == chosen.ids(i).tolist()
            assert found["labels"].tolist() == row.labels == chosen.labels(i).tolist()
            assert (found["source"], found["row"], found["turn"]) == (name, row.row, row.turn)
        assert chosen.lengths.tolist() == [len(expected[at][1].ids) for at in order]
        assert chosen.column("digest").tolist() == [list(expected[at][1].digest) for at in order]
        assert chosen.tokens == sum(len(expected[at][1].ids) for at in order)
        assert chosen.trained_tokens == sum(label != -100 for at in order for label in expected[at][1].labels)


def test_ids_are_views_of_the_file_and_labels_can_be_written(tmp_path: Path) -> None:
    rows = plain(tmp_path, [5, 3])
    ids, labels = rows[1]["input_ids"], rows[1]["labels"]
    assert (ids.dtype, labels.dtype) == (np.int32, np.int32)
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    assert np.shares_memory(ids, rows.ids(1))
    labels[0] = 7
    assert rows[1]["labels"][0] == -100


def test_rows_can_be_asked_like_a_list(tmp_path: Path) -> None:
    rows = plain(tmp_path, [2, 3, 4])
    assert [len(row["input_ids"]) for row in rows] == [2, 3, 4]
    assert rows[-1]["row"] == 2
    assert rows[np.int64(1)]["row"] == 1
    assert rows[1:].lengths.tolist() == [3, 4]
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            rows[wrong]


def test_another_process_opens_the_same_file(tmp_path: Path) -> None:
    rows = plain(tmp_path, [3, 2_000]).take(np.array([1]))
    sent = pickle.dumps(rows)
    assert len(sent) < 2_000  # no token travels
    assert pickle.loads(sent)[0]["input_ids"].tolist() == rows[0]["input_ids"].tolist()  # noqa: S301 - our own bytes


@settings(deadline=None)
@given(rows=st.lists(made_rows(), min_size=1, max_size=6), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_the_fingerprint_does_not_depend_on_blocks(rows: list[Made], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    with tempfile.TemporaryDirectory() as folder:
        whole = source(Path(folder) / "whole", [rows])
        pieces = source(Path(folder) / "pieces", [rows[a:b] for a, b in pairwise(edges)])
        assert whole.facts["content"] == pieces.facts["content"]
        assert whole.facts["places"] == pieces.facts["places"]
        assert Rows.of([whole]).fingerprint == Rows.of([pieces]).fingerprint


BASE = [Made((5, 6, 7, 8), ((1, 3),)), Made((9, 10), ((1, 2),))]


@pytest.mark.parametrize(
    "other",
    [
        [Made((5, 6, 7, 9), ((1, 3),)), BASE[1]],
        [Made((5, 6, 7, 8), ((1, 4),)), BASE[1]],
        [Made((5, 6, 7, 8, 9), ((1, 3),)), Made((10,))],
        [BASE[1], BASE[0]],
        [BASE[0]],
        [*BASE, BASE[1]],
    ],
    ids=["an id", "a label", "a border", "the order", "a row less", "a row more"],
)
def test_the_fingerprint_sees(tmp_path: Path, other: list[Made]) -> None:
    one, two = source(tmp_path / "1", [BASE]), source(tmp_path / "2", [other])
    assert one.fingerprint != two.fingerprint
    assert Rows.of([one]).fingerprint != Rows.of([two]).fingerprint


def test_the_fingerprint_of_a_choice_sees_order_and_repetition_but_not_names_or_unused_sources(tmp_path: Path) -> None:
    one, two = source(tmp_path / "1", [BASE], "a"), source(tmp_path / "2", [BASE[:1]], "b")
    rows = Rows.of([one, two])
    orders = ([0, 1], [1, 0], [0, 1, 1], [0, 2], [0], [2])
    found = [rows.take(np.array(order)).fingerprint for order in orders]
    assert len(set(found)) == len(orders)
    assert found[0] == Rows.of([SourceRows(tmp_path / "1", "renamed")]).fingerprint
    assert found[5] == Rows.of([two]).fingerprint
    # Two ranges that touch train the same labels as one.
    touching = source(tmp_path / "3", [[Made((5, 6, 7, 8), ((1, 2), (2, 3))), BASE[1]]])
    assert touching.fingerprint == one.fingerprint


def test_a_source_without_rows_is_a_source(tmp_path: Path, batch_tokens: int) -> None:
    empty, full = source(tmp_path / "1", [[]]), source(tmp_path / "2", [BASE])
    assert len(empty) == 0
    assert empty.digest.shape == (0, 2)
    assert Rows.of([empty, full])[1]["input_ids"].tolist() == [9, 10]
    assert len(Rows.of([empty]).lengths) == len(Rows.of([]).lengths) == 0
    assert Rows.of([]).fingerprint == Rows.of([empty]).fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": np.zeros(6, np.int64)}, "ids is int64, not int32"),
        ({"ids": np.zeros(5, np.int32)}, "lengths add up to 6, there are 5 ids"),
        ({"lengths": np.array([6, 0], np.int32)}, "a row is empty"),
        ({"row": np.zeros(3, np.int64)}, r"row has shape \(3,\)"),
        ({"digest": np.zeros(4, np.uint64)}, "digest has shape"),
        ({"ranges": np.array([1, 0], np.int32)}, "1 trained ranges, 4 edges"),
        ({"trained": np.array([1, 5, 1, 2], np.int32)}, "outside its row"),
        ({"trained": np.array([-1, 3, 1, 2], np.int32)}, "outside its row"),
        ({"trained": np.array([3, 3, 1, 2], np.int32)}, "is empty"),
        ({"trained": np.array([1, 3, 2, 4], np.int32), "ranges": np.array([2, 0], np.int32)}, "out of order"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RowsWriter(tmp_path).add(replace(block(BASE), **change))


def test_a_folder_whose_writer_failed_is_unfinished(tmp_path: Path) -> None:
    def write() -> None:
        with RowsWriter(tmp_path) as writer:
            writer.add(block(BASE))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    with pytest.raises(DataError, match=r"rows\.json is missing"):
        SourceRows(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_shortened_file_is_found_at_opening(tmp_path: Path, size: int) -> None:
    path = source(tmp_path, [BASE]).folder / ROWS
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(
        DataError, match=r"rows\.arrow has .* bytes, .* remove this folder and prepare them again"
    ) as error:
        SourceRows(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"layout": 1}', '{"layout": 99, "bytes": 1}', "null", '{"layout": 1, "bytes": "x"}']
)
def test_unusable_facts_are_named(tmp_path: Path, text: str) -> None:
    (source(tmp_path, [BASE]).folder / FACTS).write_text(text)
    with pytest.raises(DataError, match=r"rows\.json (is missing or unreadable|has layout 99)"):
        SourceRows(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (source(tmp_path, [BASE]).folder / ROWS).unlink()
    with pytest.raises(DataError, match=r"rows\.arrow cannot be read"):
        SourceRows(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_byte_of_the_contents_passes_the_full_check(data: st.DataObject) -> None:
    # Ranges begin at 2: whether they begin at 0 or 1 makes no difference to the labels.
    rows = [
        Made((5, 6, 7, 8), ((2, 3),), 11, 3, (2**60 + 1, 3)),
        Made((9, 10, 11), ((2, 3),), 12, -1, (4, 5), True),
    ]
    with tempfile.TemporaryDirectory() as folder:
        whole = source(Path(folder), [rows])
        content = bytearray((whole.folder / ROWS).read_bytes())
        # Where the eight arrays lie: each is found by its bytes.
        arrays = [block(rows).ids, block(rows).row, block(rows).turn, block(rows).digest, block(rows).trained]
        array = data.draw(st.sampled_from(arrays)).tobytes()
        at = content.index(array) + data.draw(st.integers(0, len(array) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        (whole.folder / ROWS).write_bytes(bytes(content))
        assert len(SourceRows(whole.folder).faults()) >= 1


def test_random_damage_is_a_named_fault_or_harmless(tmp_path: Path) -> None:
    """A file of the right size with any bytes: opening answers with a DataError, or opens."""
    path = source(tmp_path, [BASE]).folder / ROWS
    good = path.read_bytes()
    opened = refused = 0
    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at : at + 8] = b"\xff" * len(bad[at : at + 8])
        path.write_bytes(bytes(bad))
        try:
            SourceRows(tmp_path)
            opened += 1
        except DataError as error:
            refused += "prepare them again" in str(error)
    assert opened + refused == len(range(0, len(good), 3))
    assert min(opened, refused) > 20


def test_a_full_disk_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RowsWriter(tmp_path)
    writer.add(block(BASE))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DiskError, match=r"another data\.cache_dir"):
        writer.close()
    assert not (tmp_path / FACTS).exists()


def test_the_file_is_ordinary_arrow(tmp_path: Path) -> None:
    path = source(tmp_path, [BASE]).folder / ROWS
    with pa.OSFile(str(path)) as stream:
        table = pa.ipc.open_file(stream).read_all()
    assert table.column("ids").to_pylist() == [[5, 6, 7, 8], [9, 10]]
    assert table.column("trained").to_pylist() == [[1, 3], [1, 2]]


def test_writing_needs_memory_for_one_batch_whatever_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 4_000)
    piece = block([Made(tuple(range(1_000)), ((1, 1_000),))])

    def peak(blocks: int) -> int:
        folder = tmp_path / str(blocks)
        folder.mkdir()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        with RowsWriter(folder) as writer:
            for _ in range(blocks):
                writer.add(piece)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 100_000
        return found

    peak(10)
    assert peak(1_000) < 1.5 * peak(100)


def test_rows_are_written_read_mixed_and_compared_without_heavy_libraries(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from blocks import plain
import finetune.data.cache, finetune.data.duplicates, finetune.data.mix
rows = plain(pathlib.Path({str(tmp_path)!r}), [3, 4])
assert rows[1]["labels"].sum() and rows.fingerprint and not rows.parts[0].faults()
assert not finetune.data.duplicates.copies(finetune.data.mix.mixed(rows, [1.0]))
print(*({{'torch', 'transformers', 'datasets', 'pandas', 'datasketch', 'scipy'}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_sources_stand_in_order(tmp_path: Path) -> None:
    rows = together(plain(tmp_path / "1", [2, 3], "a"), plain(tmp_path / "2", [4], "b"))
    assert [(row["source"], row["row"]) for row in rows] == [("a", 0), ("a", 1), ("b", 0)]
