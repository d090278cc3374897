"""Misspelt keys are answered with the key that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.recipe import fields
from finetune.recipe.suggest import cost, distance, nearest_keys, words
from finetune.recipe.unknown import suggest_key, unknown_key

CORPUS = Path(__file__).parent / "misspelt_keys.txt"
NAMES = [key.name for key in fields.known_keys().values()]


def corpus() -> list[tuple[str, str, str]]:
    rows = [line.split() for line in CORPUS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return [("" if section == "-" else section, written, meant) for section, written, meant in rows]


def test_the_corpus_holds_two_hundred_different_misspellings_of_real_keys() -> None:
    rows = corpus()
    assert len(rows) >= 200
    assert len({row[:2] for row in rows}) == len(rows)
    known = set(fields.known_keys()) | set(fields.sections())
    assert {meant for _, _, meant in rows} <= known
    assert all(written not in fields.names(section) for section, written, _ in rows)
    # Hardly a key is left out, so that the share below is not that of a few easy ones.
    assert len({meant for _, _, meant in rows}) >= 45


def test_the_first_suggestion_is_right_in_95_of_100() -> None:
    rows = corpus()
    wrong = [(*row, found) for row in rows if (found := suggest_key(row[0], row[1])[:1]) != [row[2]]]
    assert 1 - len(wrong) / len(rows) >= 0.95, wrong


def test_what_the_user_reads_names_the_right_key_in_95_of_100() -> None:
    rows = corpus()
    wrong = [row for row in rows if unknown_key(row[0], row[1]).keys[:1] != (row[2],)]
    assert 1 - len(wrong) / len(rows) >= 0.95, wrong


@pytest.mark.parametrize("nonsense", ["zzz", "qqqqqqq", "kubernetes", "x", "foo_bar", "___", "", "日本"])
def test_nonsense_gets_no_suggestion(nonsense: str) -> None:
    assert nearest_keys(nonsense, NAMES) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learningRate", ["learning", "rate"]),
        ("LEARNING-RATE", ["learning", "rate"]),
        ("LRScheduler", ["lr", "scheduler"]),
        ("r2d2", ["r", "2", "d", "2"]),
    ],
)
def test_a_name_is_split_into_words(name: str, expected: list[str]) -> None:
    assert words(name) == expected


@pytest.mark.parametrize(
    ("a", "b", "steps"),
    [("", "abc", 3), ("abc", "acb", 1), ("abc", "abd", 1), ("abc", "ab", 1), ("kitten", "sitting", 3)],
)
def test_distance_counts_a_swap_once(a: str, b: str, steps: int) -> None:
    assert distance(a, b) == distance(b, a) == steps


@given(st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_only_a_name_itself_costs_nothing(a: str, b: str) -> None:
    assert (cost(a, b) == 0) == (a == b)


@given(st.sampled_from([name for name in NAMES if len(name) >= 6]), st.data())
def test_one_slip_in_a_long_name_is_always_found(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 2))
    slips = [
        name[:at] + name[at + 1 :],
        name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        name[:at] + "x" + name[at:],
    ]
    written = data.draw(st.sampled_from(slips))
    assert name in nearest_keys(written, NAMES, count=5)


@given(st.text(max_size=40), st.sampled_from(list(fields.sections())))
def test_any_name_is_answered(name: str, section: str) -> None:
    assert unknown_key(section, name).message
