"""Units: which rows share a sequence, and that batches hold every token of them once, without padding."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.collate import FlatCollator, PaddedCollator
from finetune.data.pack import Units, best_fit, density, pack, shuffled, singles, wrapped

CASES = st.integers(1, 64).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), min_size=1)))


@given(CASES)
def test_every_row_stands_in_one_bin_and_no_bin_overflows(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    bins = pack(lengths, room)
    assert sorted(index for content in bins for index in content) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in content) <= room for content in bins)
    assert bins == pack(lengths, room)
    # Two bins that fit into one would mean that the second was opened for nothing.
    loads = sorted(sum(lengths[index] for index in content) for content in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > room
    units = best_fit(np.array(lengths), room)
    assert [[row for row, _, _ in units[at]] for at in range(len(units))] == bins
    assert all(start == 0 and end == lengths[row] for at in range(len(units)) for row, start, end in units[at])


def ideal(lengths: list[int], room: int) -> int:
    """Bins that could not be fewer: the tokens, end to end."""
    return -(-sum(lengths) // room)


def test_a_hundred_thousand_chats_fill_their_bins() -> None:
    draw = random.Random(1)
    lengths = [max(1, min(2048, round(draw.lognormvariate(5.5, 0.8)))) for _ in range(100_000)]
    assert ideal(lengths, 2048) / len(pack(lengths, 2048)) >= 0.999


def test_rows_of_which_half_are_long_fill_their_bins() -> None:
    draw = random.Random(1)
    short = [max(1, min(8192, round(draw.lognormvariate(5.5, 0.8)))) for _ in range(50_000)]
    long = [round(draw.uniform(0.3, 0.62) * 8192) for _ in range(50_000)]
    units = best_fit(np.array(short + long), 8192)
    assert ideal(short + long, 8192) / len(units) >= 0.995
    assert density(units, 8192) >= 0.995


def test_row_goes_where_it_leaves_least_room() -> None:
    assert sorted(map(sorted, pack([7, 5, 3], 10))) == [[0, 2], [1]]


@pytest.mark.parametrize("length", [0, 11])
def test_row_that_fits_no_bin_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens; a bin holds 1 to 10"):
        pack([3, length], 10)


def pieces(units: Units) -> list[list[tuple[int, int, int]]]:
    return [units[at] for at in range(len(units))]


@given(CASES, st.integers(0, 2))
def test_the_wrapped_stream_holds_every_token_once_and_in_order(case: tuple[int, list[int]], seed: int) -> None:
    room, lengths = case
    units = wrapped(np.array(lengths), room, seed)
    assert [sum(end - start for _, start, end in unit) for unit in pieces(units)] == units.tokens.tolist()
    assert all(size == room for size in units.tokens[:-1])
    assert 0 < units.tokens[-1] <= room
    seen = [(row, at) for unit in pieces(units) for row, start, end in unit for at in range(start, end)]
    order = shuffled(len(lengths), seed).tolist()
    assert seen == [(row, at) for row in order for at in range(lengths[row])]
    # A row is cut only where a bin ends.
    assert units.squares.tolist() == [sum((end - start) ** 2 for _, start, end in unit) for unit in pieces(units)]
    assert len(units.row) <= len(lengths) + len(units) - 1


def test_rows_by_themselves_are_units_of_one_piece() -> None:
    assert pieces(singles(np.array([3, 1]))) == [[(0, 0, 3)], [(1, 0, 1)]]
    assert len(singles(np.array([], np.int32))) == 0


def test_the_order_is_the_seeds_and_stays_the_same_in_every_version_of_numpy() -> None:
    assert shuffled(10, 42, 0).tolist() == ORDER
    assert shuffled(10, 42, 1).tolist() != ORDER


ORDER = [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


def token_rows(*lengths: int, vocabulary: int = 100) -> list[dict[str, Any]]:
    draw = random.Random(3)
    found = []
    for length in lengths:
        ids = np.array([draw.randrange(vocabulary) for _ in range(length)], np.int32)
        labels = np.where(np.arange(length) < length // 2, -100, ids).astype(np.int32)
        found.append({"input_ids": ids, "labels": labels})
    return found


def test_documents_lie_end_to_end_the_longest_first() -> None:
    short, long = token_rows(2, 3)
    batch = FlatCollator()([short, long])
    assert batch["input_ids"].tolist() == [[*long["input_ids"], *short["input_ids"]]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, *long["labels"][1:], -100, short["labels"][1]]]
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5]
        assert batch[f"max_length_{side}"] == 3
    assert str(batch["cu_seq_lens_q"].dtype) == "torch.int32"
    assert {str(batch[name].dtype) for name in ("input_ids", "labels", "position_ids")} == {"torch.int64"}
    assert "attention_mask" not in batch


def test_first_token_of_a_document_is_never_trained_even_if_it_had_a_label() -> None:
    rows = [{"input_ids": np.array([1, 2]), "labels": np.array([1, 2])} for _ in range(2)]
    assert FlatCollator()(rows)["labels"].tolist() == [[-100, 2, -100, 2]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_a_batch_holds_every_token_once_and_nothing_else(lengths: list[int]) -> None:
    rows = token_rows(*lengths)
    batch = FlatCollator()(rows)
    starts = batch["cu_seq_lens_q"].tolist()
    found = [tuple(batch["input_ids"][0, a:b].tolist()) for a, b in pairwise(starts)]
    assert sorted(found) == sorted(tuple(row["input_ids"].tolist()) for row in rows)
    assert batch["max_length_q"] == max(lengths)


def test_a_batch_of_nothing_has_one_token_that_is_not_trained() -> None:
    for batch in (FlatCollator()([]), PaddedCollator(7)([])):
        assert batch["input_ids"].shape == (1, 1)
        assert batch["labels"].tolist() == [[-100]]


def test_padding_is_neither_attended_nor_trained_whatever_the_pad_token_is() -> None:
    rows = token_rows(3, 5)
    end = int(rows[0]["labels"][-1])
    batch = PaddedCollator(pad_token_id=end)(rows)
    assert {str(value.dtype) for value in batch.values()} == {"torch.int64"}
    assert batch["input_ids"].tolist() == [[*rows[0]["input_ids"], end, end], [*rows[1]["input_ids"]]]
    assert batch["labels"].tolist() == [[*rows[0]["labels"], -100, -100], [*rows[1]["labels"]]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
