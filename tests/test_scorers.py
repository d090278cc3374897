"""Scorers: their docstrings, and that no answer a model can write upsets them."""

from __future__ import annotations

import doctest
import importlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import DataError
from finetune.registry import resolve
from finetune.scorers import SCORERS
from finetune.scorers.exact_match import score as exact_match
from finetune.scorers.json_fields import score as json_fields

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=8), VALUES, max_size=4)


@pytest.mark.parametrize("name", SCORERS)
def test_the_docstring_cases_hold(name: str) -> None:
    module = importlib.import_module(SCORERS[name].split(":")[0])
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0


@pytest.mark.parametrize("name", SCORERS)
@given(answer=st.text() | OBJECTS.map(json.dumps) | st.binary().map(repr), reference=OBJECTS.map(json.dumps))
def test_any_answer_gets_figures_from_0_to_1(name: str, answer: str, reference: str) -> None:
    figures = resolve("scorer", name, SCORERS)(answer, reference)
    assert next(iter(figures)) == "exact_match"
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in figures.values())


@pytest.mark.parametrize("name", SCORERS)
@given(reference=OBJECTS)
def test_the_reference_itself_is_right_in_everything(name: str, reference: dict[str, Any]) -> None:
    text = json.dumps(reference)
    assert set(resolve("scorer", name, SCORERS)(text, text).values()) == {1.0}


@given(text=st.text())
def test_exact_match_is_reflexive_and_ignores_outer_space(text: str) -> None:
    assert exact_match(f" {text}\n", text) == {"exact_match": 1.0}
    assert exact_match(text + "x", text)["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("answer", "figures"),
    [
        ('{"b": 2, "a": 1}', {"exact_match": 1.0, "valid_json": 1.0, "a": 1.0, "b": 1.0}),
        ('{"a": 1.0, "b": 2}', {"exact_match": 1.0, "valid_json": 1.0, "a": 1.0, "b": 1.0}),
        ('{"a": true, "b": 2}', {"exact_match": 0.0, "valid_json": 1.0, "a": 0.0, "b": 1.0}),
        ('{"a": "1", "b": 2}', {"exact_match": 0.0, "valid_json": 1.0, "a": 0.0, "b": 1.0}),
        ('{"a": 1, "b": 2, "c": 3}', {"exact_match": 0.0, "valid_json": 1.0, "a": 1.0, "b": 1.0}),
        ('[{"a": 1, "b": 2}]', {"exact_match": 0.0, "valid_json": 0.0, "a": 0.0, "b": 0.0}),
        ('{"a": 1, "b": 2} and more', {"exact_match": 0.0, "valid_json": 0.0, "a": 0.0, "b": 0.0}),
        ('{"a": 1, "b": NaN}', {"exact_match": 0.0, "valid_json": 0.0, "a": 0.0, "b": 0.0}),
        ("", {"exact_match": 0.0, "valid_json": 0.0, "a": 0.0, "b": 0.0}),
        ('{"a":' * 100_000, {"exact_match": 0.0, "valid_json": 0.0, "a": 0.0, "b": 0.0}),
        ('{"a": ' + "9" * 10_000 + "}", {"exact_match": 0.0, "valid_json": 0.0, "a": 0.0, "b": 0.0}),
    ],
)
def test_json_fields_compares_values_as_json_does(answer: str, figures: dict[str, float]) -> None:
    assert json_fields(answer, '{"a": 1, "b": 2}') == figures


def test_a_field_that_is_missing_is_no_null() -> None:
    assert json_fields("{}", '{"a": null}')["a"] == 0.0
    assert json_fields('{"a": null}', '{"a": null}')["a"] == 1.0


def test_nested_values_are_compared_whole() -> None:
    reference = '{"a": {"b": [1, {"c": true}]}}'
    assert json_fields('{"a": {"b": [1, {"c": true}]}}', reference)["a"] == 1.0
    assert json_fields('{"a": {"b": [1, {"c": 1}]}}', reference)["a"] == 0.0
    assert json_fields('{"a": {"b": [1]}}', reference)["a"] == 0.0


def test_a_field_cannot_take_the_place_of_the_headline() -> None:
    figures = json_fields('{"exact_match": 5}', '{"exact_match": 5, "other": 1}')
    assert figures == {"exact_match": 0.0, "valid_json": 1.0, "other": 0.0}


@pytest.mark.parametrize("reference", ["plain", "[1]", "3", "null", ""])
def test_a_reference_that_is_no_object_is_a_fault_of_the_data(reference: str) -> None:
    with pytest.raises(DataError, match="json_fields needs answers that are JSON objects"):
        json_fields("{}", reference)
