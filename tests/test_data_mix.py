"""Mixing and splitting: shares that hold exactly, choices that depend on the seed and the content alone."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from blocks import Made, digest, plain, source, together
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.mix import By, mixed, split
from finetune.data.rows import Rows
from finetune.errors import DataError

sizes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=4)
weights = st.floats(0.05, 20, allow_nan=False)


def sources(folder: str | Path, lengths: Sequence[Sequence[int]], token_rows: int = 1) -> Rows:
    """Sources s0, s1, ... with rows of these lengths."""
    return together(*(plain(Path(folder) / str(at), own, f"s{at}", token_rows) for at, own in enumerate(lengths)))


def seen(rows: Rows, number: int) -> list[int]:
    """Positions of one source's rows in an epoch, in order."""
    return [int(at) for at in rows.at[rows.part == number]]


@settings(deadline=None, max_examples=40)
@given(lengths=sizes, chosen=st.data(), token_rows=st.integers(1, 3), seed=st.integers(0, 9))
def test_epochs_are_whole_passes_and_a_share_of_raw_rows(
    lengths: list[list[int]], chosen: st.DataObject, token_rows: int, seed: int
) -> None:
    given_weights = [chosen.draw(weights) for _ in lengths]
    with tempfile.TemporaryDirectory() as folder:
        rows = sources(folder, lengths, token_rows)
        epoch = mixed(rows, given_weights, "epochs", seed=seed)
    for number, (own, weight) in enumerate(zip(lengths, given_weights, strict=True)):
        raw = {at: at // token_rows for at in range(len(own))}
        often = Counter(seen(epoch, number))
        copies = int(weight)
        extra = {at for at in raw if often[at] == copies + 1}
        assert all(often[at] in (copies, copies + 1) for at in raw)
        assert len({raw[at] for at in extra}) == round((Fraction(weight) - copies) * len(set(raw.values())))
        assert extra == {at for at in raw if raw[at] in {raw[one] for one in extra}}  # whole raw rows


@pytest.mark.parametrize("by", ["rows", "tokens"])
@settings(deadline=None, max_examples=40)
@given(lengths=sizes, chosen=st.data(), seed=st.integers(0, 9))
def test_shares_hold_to_within_one_row(by: By, lengths: list[list[int]], chosen: st.DataObject, seed: int) -> None:
    given_weights = [chosen.draw(weights) for _ in lengths]
    with tempfile.TemporaryDirectory() as folder:
        rows = sources(folder, lengths)
        for stopping in ("first_exhausted", "all_exhausted"):
            epoch = mixed(rows, given_weights, by, stopping, seed)
            sized = [own if by == "tokens" else [1] * len(own) for own in lengths]
            ends = [Fraction(sum(own)) / Fraction(weight) for own, weight in zip(sized, given_weights, strict=True)]
            end = min(ends) if stopping == "first_exhausted" else max(ends)
            for number, (own, weight) in enumerate(zip(sized, given_weights, strict=True)):
                at = seen(epoch, number)
                assert abs(sum(own[one] for one in at) - Fraction(weight) * end) <= Fraction(max(own), 2)
                often = Counter(at)
                least = min(often[one] for one in range(len(own)))
                assert max(often.values(), default=0) - least <= 1  # no row twice more than another
                if ends[number] == end:
                    assert at == list(range(len(own)))  # used up, once
                elif stopping == "first_exhausted":
                    assert max(often.values(), default=0) <= 1  # nothing repeats
                else:
                    assert least >= 1  # everything is seen


def test_the_example_in_the_recipe(tmp_path: Path) -> None:
    rows = sources(tmp_path, [[10] * 100, [20] * 10])
    assert Counter(mixed(rows, [0.5, 2.0]).part.tolist()) == {0: 50, 1: 20}
    assert Counter(mixed(rows, [3, 1], "rows").part.tolist()) == {0: 30, 1: 10}
    assert Counter(mixed(rows, [3, 1], "rows", "all_exhausted").part.tolist()) == {0: 100, 1: 33}
    by_tokens = mixed(rows, [3, 1], "tokens")
    assert by_tokens.lengths[by_tokens.part == 0].sum() == 600
    assert by_tokens.lengths[by_tokens.part == 1].sum() == 200


@pytest.mark.parametrize("by", ["epochs", "rows", "tokens"])
def test_the_choice_is_of_the_seed_alone(tmp_path: Path, by: By) -> None:
    rows = sources(tmp_path, [[5] * 40, [5] * 41])
    given_weights = [1.5, 0.5]
    one = mixed(rows, given_weights, by, seed=1)
    assert one.fingerprint == mixed(rows, given_weights, by, seed=1).fingerprint
    other = mixed(rows, given_weights, by, seed=2)
    assert one.fingerprint != other.fingerprint
    assert Counter(one.part.tolist()) == Counter(other.part.tolist())


def test_the_choice_of_seed_42_stays_the_same(tmp_path: Path) -> None:
    """Resumed runs compare fingerprints, so a release must not choose otherwise."""
    rows = sources(tmp_path, [[2] * 20, [2] * 20])
    epoch = mixed(rows, [0.25, 0.25], seed=42)
    assert [seen(epoch, 0), seen(epoch, 1)] == [[5, 9, 13, 14, 18], [2, 8, 9, 12, 14]]


def test_half_of_the_rows_is_a_fair_half(tmp_path: Path) -> None:
    rows = sources(tmp_path, [[1] * 2_000])
    chosen = np.array(seen(mixed(rows, [0.5]), 0))
    assert len(chosen) == 1_000
    assert 400 < (chosen < 1_000).sum() < 600
    assert 400 < (chosen % 2).sum() < 600
    drawn = [set(seen(mixed(rows, [0.5], seed=seed), 0)) for seed in (1, 2)]
    assert 400 < len(drawn[0] & drawn[1]) < 600


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_a_source_without_rows_cannot_have_a_share(tmp_path: Path, by: By) -> None:
    rows = sources(tmp_path, [[5] * 4, []])
    assert len(mixed(rows, [1, 1], "epochs")) == 4
    with pytest.raises(DataError, match=r"^s1: no row of this source is left.*data\.weight_by to epochs"):
        mixed(rows, [1, 1], by)


def test_nothing_mixed_is_nothing() -> None:
    for by in ("epochs", "rows", "tokens"):
        assert len(mixed(Rows.of([]), [], by)) == 0
    assert [len(part) for part in split(Rows.of([]), 0.5)] == [0, 0]


def told(texts: Sequence[str], folder: str, token_rows: int = 1) -> Rows:
    """A source whose raw rows say these texts."""
    made = [
        Made((at, turn + 1), ((1, 2),), at, turn, digest(text))
        for at, text in enumerate(texts)
        for turn in range(token_rows)
    ]
    return Rows.of([source(Path(folder), [made])])


texts = st.lists(st.text(max_size=3), max_size=30)


def held(rows: Rows) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b in rows.column("digest")} if len(rows) else set()


@settings(deadline=None)
@given(before=texts, added=texts, share=st.floats(0, 1, exclude_max=True), data=st.data(), token_rows=st.integers(1, 3))
def test_adding_or_reordering_rows_moves_none_and_copies_stay_together(
    before: list[str], added: list[str], share: float, data: st.DataObject, token_rows: int
) -> None:
    after = data.draw(st.permutations([*before, *added]))
    with tempfile.TemporaryDirectory() as folder:
        train, validation = split(told(before, f"{folder}/1", token_rows), share)
        later_train, later_validation = split(told(after, f"{folder}/2", token_rows), share)
        assert len(train) + len(validation) == len(before) * token_rows
        assert held(train) <= held(later_train)
        assert held(validation) <= held(later_validation)
        assert not held(later_train) & held(later_validation)
        assert all(count == token_rows for count in Counter(validation.column("row").tolist()).values())


def test_the_share_is_about_what_was_asked_for(tmp_path: Path) -> None:
    rows = told([f"text {at}" for at in range(4_000)], str(tmp_path))
    for share in (0.0, 0.05, 0.5):
        assert abs(len(split(rows, share)[1]) / 4_000 - share) < 0.02
    small, large = (held(split(rows, share)[1]) for share in (0.05, 0.5))
    assert small <= large  # a larger share holds out the same rows, and more
    assert len(split(rows, 0.0)[1]) == 0
