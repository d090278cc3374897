"""Copies are found, exact and near, the first is kept; what is trained on is seen in validation."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from blocks import Made, digest, edges, source, together
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import duplicates as module
from finetune.data.duplicates import Copies, copies, leaks
from finetune.data.rows import Rows


def told(folder: Path, texts: Sequence[Sequence[int]], name: str = "chats") -> Rows:
    """A source of rows with these ids; equal ids have equal digests."""
    made = [Made(tuple(ids), edges(len(ids)), at, -1, digest(str(list(ids)))) for at, ids in enumerate(texts)]
    return Rows.of([source(folder, [made], name)])


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(30_000), k=count)


def changed(ids: list[int], places: Sequence[int]) -> list[int]:
    return [token + 30_000 if at in places else token for at, token in enumerate(ids)]


def jaccard(one: Sequence[int], two: Sequence[int]) -> float:
    first, second = ({tuple(ids[at : at + 5]) for at in range(len(ids) - 4)} for ids in (one, two))
    return len(first & second) / len(first | second)


def pairs(found: Copies) -> list[tuple[int, int]]:
    """Raw rows of copies and originals of single sources."""
    return [(copy[1], original[1]) for copy, original in found.named()]


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 5), max_size=20), token_rows=st.integers(1, 3))
def test_the_first_of_equal_examples_is_kept_with_all_its_rows(values: list[int], token_rows: int) -> None:
    made = [
        Made((value, turn), (), at, turn, digest(str(value)))
        for at, value in enumerate(values)
        for turn in range(token_rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows.of([source(Path(folder), [made])])
        found = copies(rows)
        firsts = [at for at, value in enumerate(values) if value not in values[:at]]
        assert found.without().column("row").tolist() == [at for at in firsts for _ in range(token_rows)]
        assert pairs(found) == [(at, values.index(value)) for at, value in enumerate(values) if at not in firsts]
        assert len(found) == len(values) - len(firsts)
        assert not len(copies(found.without()))


def test_copies_are_named_across_sources(tmp_path: Path) -> None:
    rows = together(told(tmp_path / "1", [[1, 2], [3, 4]], "a"), told(tmp_path / "2", [[5, 6], [3, 4], [3, 4]], "b"))
    assert list(copies(rows).named()) == [(("b", 1), ("a", 1)), (("b", 2), ("a", 1))]
    # The order given decides which is the first.
    reordered = rows.take(np.array([3, 2, 1, 0]))
    assert list(copies(reordered).named()) == [(("a", 1), ("b", 1))]


def test_one_half_of_a_digest_is_not_enough(tmp_path: Path) -> None:
    made = [Made((at,), (), at, -1, pair) for at, pair in enumerate([(1, 2), (1, 3), (3, 2), (2, 1), (1, 2)])]
    assert pairs(copies(Rows.of([source(tmp_path, [made])]))) == [(4, 0)]


def test_nothing_has_no_copies() -> None:
    nothing = Rows.of([])
    for threshold in (None, 0.8):
        assert len(copies(nothing, threshold)) == len(leaks(nothing, nothing, threshold)) == 0
        assert list(copies(nothing, threshold).named()) == []


def test_near_copies_are_found_and_others_kept(tmp_path: Path) -> None:
    originals = [words(seed, 300) for seed in range(40)]
    near = [changed(ids, [150]) for ids in originals[:20]]
    far = [changed(ids, range(0, 300, 12)) for ids in originals[:20]]
    assert min(map(jaccard, originals, near)) > 0.9
    assert max(map(jaccard, originals, far)) < 0.5
    rows = told(tmp_path, [*originals, *near, *far])
    assert pairs(copies(rows)) == []
    assert pairs(copies(rows, 0.8)) == [(40 + at, at) for at in range(20)]
    backwards = copies(rows.take(np.arange(len(rows))[::-1]), 0.8)
    assert sorted(original for _, original in pairs(backwards)) == list(range(40, 60))  # now these come first


def test_the_threshold_is_a_jaccard_similarity(tmp_path: Path) -> None:
    """Of pairs well above it nearly all are found, of pairs well below none."""
    cases = [(seed, changes) for seed in range(60) for changes in (1, 6, 20, 60)]
    texts = [words(seed, 400) for seed in range(60)]
    others = [changed(texts[seed], random.Random(seed).sample(range(20, 380), changes)) for seed, changes in cases]
    rows = told(tmp_path, [*texts, *others])
    for threshold in (0.5, 0.7, 0.9):
        found = {copy - 60 for copy, _ in pairs(copies(rows, threshold))}
        similar = [jaccard(texts[seed], other) for (seed, _), other in zip(cases, others, strict=True)]
        above = [at for at, value in enumerate(similar) if value > threshold + 0.07]
        below = {at for at, value in enumerate(similar) if value < threshold - 0.12}
        assert len(above) >= 50
        assert len(below) >= 50
        assert len(found & set(above)) >= 0.98 * len(above)
        assert not found & below


def test_an_exact_copy_of_a_near_copy_is_a_copy_of_the_first(tmp_path: Path) -> None:
    first = words(1, 200)
    near = changed(first, [100])
    rows = told(tmp_path, [first, near, near, words(2, 200)])
    assert pairs(copies(rows, 0.8)) == [(1, 0), (2, 0)]


def test_near_copies_are_of_whole_examples(tmp_path: Path) -> None:
    """An example with a row for each turn is compared as one, and goes with all its rows."""
    chat = words(1, 300)
    made = [Made(tuple(chat[:end]), ((1, 2),), 0, end, digest("a")) for end in (100, 200, 300)]
    made += [Made(tuple(changed(chat, [150])[:end]), ((1, 2),), 1, end, digest("b")) for end in (100, 200, 300)]
    # A chat that only begins like the first.
    made += [Made(tuple(chat[:100]), ((1, 2),), 2, -1, digest("c"))]
    found = copies(Rows.of([source(tmp_path, [made])]), 0.8)
    assert found.at.tolist() == [3, 4, 5]
    assert pairs(found) == [(1, 0)]


def test_a_system_prompt_that_many_share_makes_no_copies(tmp_path: Path) -> None:
    prompt = words(0, 500)
    texts = [[*prompt, *words(seed, 30)] for seed in range(1, 41)]
    near = [*prompt, *changed(texts[0][500:], [1])]
    assert jaccard(texts[0], texts[1]) > 0.85
    rows = told(tmp_path, [*texts, near, prompt])
    assert pairs(copies(rows, 0.6)) == [(40, 0)]
    assert pairs(copies(rows.take(np.array([0, 1, 40])), 0.6)) == [(1, 0), (40, 0)]  # too few to call it common


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_rows_shorter_than_a_shingle_are_compared_too(tmp_path: Path, count: int) -> None:
    rows = told(tmp_path, [words(1, count), words(2, count), words(3, count), words(4, count + 7)])
    assert pairs(copies(rows, 0.8)) == []
    made = [Made(tuple(words(1, count)), (), at, -1, digest(str(at))) for at in range(2)]
    assert pairs(copies(Rows.of([source(tmp_path / "same", [made])]), 0.8)) == [(1, 0)]


@pytest.mark.parametrize("threshold", [0.01, 0.5, 1.0])
def test_any_threshold_of_a_recipe_works(tmp_path: Path, threshold: float) -> None:
    text = words(1, 100)
    made = [Made(tuple(text), (), at, -1, digest(str(at))) for at in range(2)]  # same ids, another content
    assert pairs(copies(Rows.of([source(tmp_path, [made])]), threshold)) == [(1, 0)]


def test_bands_reach_the_promised_recall() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        bands, width = module._bands(threshold)
        assert bands >= 2
        assert bands * width <= module.PERMUTATIONS
        assert 1 - (1 - threshold**width) ** bands >= module.RECALL


def test_a_long_row_is_hashed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = words(1, 500)
    rows = told(tmp_path, [text, changed(text, [250])])
    whole = copies(rows, 0.8)
    monkeypatch.setattr(module, "AT_ONCE", 7)
    assert pairs(copies(rows, 0.8)) == pairs(whole) == [(1, 0)]


def test_leaks_are_found_by_content_and_by_tokens(tmp_path: Path) -> None:
    train = told(tmp_path / "1", [[1, 2, 3], [4, 5], [6, 7, 8, 9]], "train")
    made = [
        Made((4, 5), (), 0, -1, digest("other content, same tokens")),
        Made((9, 9), (), 1, -1, digest(str([1, 2, 3]))),  # same content, tokenized otherwise
        Made((4, 5, 6), (), 2, -1, digest("new")),
        Made((6, 7, 8, 8), (), 3, -1, digest("new too")),
        Made((6, 7, 8, 9), (), 4, 0, digest("one of two rows is known")),
        Made((7, 7, 7, 7), (), 4, 1, digest("one of two rows is known")),
    ]
    validation = Rows.of([source(tmp_path / "2", [made], "held out")])
    found = leaks(train, validation)
    expected = [(0, 1), (1, 0), (4, 2)]
    assert list(found.named()) == [(("held out", at), ("train", of)) for at, of in expected]
    assert len(found) == 3
    assert found.without().column("row").tolist() == [2, 3]
    assert not len(leaks(train, found.without()))
    assert not len(leaks(Rows.of([]), validation))
    assert not len(leaks(train, Rows.of([])))


def test_near_leaks_are_found(tmp_path: Path) -> None:
    texts = [words(seed, 300) for seed in range(10)]
    held_out = [changed(texts[3], [10]), words(77, 300), texts[5]]
    train, validation = told(tmp_path / "1", texts), told(tmp_path / "2", held_out)
    assert pairs(leaks(train, validation)) == [(2, 5)]
    assert pairs(leaks(train, validation, 0.8)) == [(0, 3), (2, 5)]
    twice = train.take(np.array([*range(10), *range(10)]))  # as mixing may repeat
    assert pairs(leaks(twice, validation, 0.8)) == [(0, 3), (2, 5)]
