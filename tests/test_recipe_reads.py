"""A recipe knows which of its keys were read, and reading is all it does to itself."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.sections import AdapterOptions, Recipe, Source
from finetune.recipe.show import recipe_yaml

TEXT = """
model: {name_or_path: base, revision: abc}
data:
  train: [a.jsonl, {path: b.jsonl, weight: 2}]
training: {extra: {adam_beta1: 0.8}}
evaluate: {limit: 3}
output_dir: runs/a
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return load_recipe(path)


def test_what_nothing_read_is_told(loaded: LoadedRecipe) -> None:
    everything = loaded.unread()
    assert set(everything) == set(loaded.set_keys())
    assert len(everything) == 8
    recipe = loaded.recipe
    assert recipe.model.name_or_path
    assert recipe.output_dir
    assert "model.name_or_path" not in loaded.unread()
    assert "output_dir" not in loaded.unread()
    assert "model.revision" in loaded.unread()
    assert loaded.unread(["evaluate"]) == ("evaluate.limit",)


def test_each_source_is_watched_alone(loaded: LoadedRecipe) -> None:
    assert loaded.recipe.data.train[1].weight == 2.0
    unread = loaded.unread(["data"])
    assert unread == ("data.train[0].path", "data.train[1].path")


def test_reading_extra_reads_all_of_it(loaded: LoadedRecipe) -> None:
    assert loaded.unread(["training"]) == ("training.extra.adam_beta1",)
    assert loaded.recipe.training.extra
    assert loaded.unread(["training"]) == ()


def test_showing_comparing_and_copying_reads_nothing(loaded: LoadedRecipe) -> None:
    recipe = loaded.recipe
    repr(recipe), str(recipe), recipe == recipe.model_copy(), copy.deepcopy(recipe), pickle.dumps(recipe)
    loaded.resolved(), loaded.hash(), loaded.value("model.revision"), recipe_yaml(loaded, origins=True)
    hash(recipe.__dict__["data"].__dict__["train"][0])
    assert set(loaded.unread()) == set(loaded.set_keys())


def test_reads_belong_to_one_object() -> None:
    first, second = AdapterOptions(), AdapterOptions()
    assert first.r == 16
    assert first.reads() == {"r"}
    assert second.reads() == frozenset()
    assert first == second


def test_sections_are_frozen_strict_and_hashable() -> None:
    options = AdapterOptions()
    with pytest.raises(ValidationError, match="frozen"):
        options.r = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        AdapterOptions(r="16")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        AdapterOptions(rank=16)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Source(path="a", weight=float("nan"))
    assert hash(Source(path="a")) == hash(Source(path="a"))
    assert Source(path="a") != Source(path="b")
    assert Source(path="a") != "a"


def test_a_recipe_can_be_made_in_python() -> None:
    recipe = Recipe.model_validate({"model": {"name_or_path": "m"}, "data": {"train": "a"}, "output_dir": "o"})
    assert recipe.data.train == (Source(path="a"),)
