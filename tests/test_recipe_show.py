"""A recipe shown, explained and described by a schema says what the loaded recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RecipeError
from finetune.recipe import fields
from finetune.recipe.explain import explain
from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.schema import recipe_schema
from finetune.recipe.show import recipe_yaml

TEXT = """\
model: {name_or_path: "my: base # 1", revision: "123"}
data:
  train: [a.jsonl, {path: b.jsonl, weight: 2}]
training: {learning_rate: 1e-5, extra: {adam_beta1: 0.8, optim_args: "a=1", nested: {b: [1, {c: null}]}}}
output_dir: runs/é
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return load_recipe(path, ["adapter.r=8"])


def test_what_is_shown_loads_as_the_same_recipe(loaded: LoadedRecipe, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    for origins in (False, True):
        path.write_text(recipe_yaml(loaded, origins=origins), encoding="utf-8")
        again = load_recipe(path)
        assert again.recipe == loaded.recipe
        assert again.hash() == loaded.hash()


def test_origins_stand_behind_each_value(loaded: LoadedRecipe) -> None:
    text = recipe_yaml(loaded, origins=True)
    assert "  learning_rate: 1e-05  # " in text
    assert f"  # {loaded.path}:4:12\n" in text
    assert "  r: 8  # override 1: adapter.r=8\n" in text
    assert "  lora_alpha: 32  # default\n" in text
    assert text.count("  # ") >= 50
    assert "#" not in recipe_yaml(loaded).replace('"my: base # 1"', "")


def test_derived_values_are_overlaid_or_noted(loaded: LoadedRecipe, tmp_path: Path) -> None:
    text = recipe_yaml(loaded, {"model.dtype": "float32", "adapter.dtype": "float32"}, origins=True)
    assert "  dtype: float32  # derived\n" in text
    assert text.endswith("# Derived when the run was made; not keys of a recipe:\n#   adapter.dtype: float32\n")
    path = tmp_path / "shown.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_recipe(path).recipe.model.dtype == "float32"


@pytest.mark.parametrize(
    ("key", "value", "origin", "words"),
    [
        ("training.learning_rate", 1e-5, ":4:12", "Peak learning rate"),
        ("adapter.r", 8, "override 1: adapter.r=8", "Rank of the LoRA"),
        ("adapter.method", "lora", "default", "full fine-tuning"),
        ("data.train[1].weight", 2.0, ":3:36", "How much of it is seen"),
        ("data.train[0].weight", 1.0, "default", "How much of it is seen"),
        ("training.extra.nested", {"b": [1, {"c": None}]}, ":4:", "SFTConfig"),
        ("tracking.mode", "offline", "default", "keeps everything on this machine"),
    ],
)
def test_a_key_is_explained(loaded: LoadedRecipe, key: str, value: Any, origin: str, words: str) -> None:
    explanation = explain(loaded, key)
    assert explanation.value == value
    assert origin in str(explanation.origin)
    assert words in explanation.help
    assert explanation.expected
    assert json.loads(json.dumps(explanation.to_json()))["key"] == key


def test_every_key_and_section_can_be_explained(loaded: LoadedRecipe) -> None:
    keys = [key for key in [*fields.known_keys(), *fields.sections()] if key and "[]" not in key]
    assert len(keys) >= 55
    for key in keys:
        assert explain(loaded, key).help
    assert explain(loaded, "adapter").allowed == tuple(fields.names("adapter"))
    assert explain(loaded, "model.dtype", {"model.dtype": "float32"}).value == "float32"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.learning_rat", "did you mean training.learning_rate?"),
        ("learning_rate", "belongs under training: training.learning_rate"),
        ("data.train[7]", "its items are data.train[0] to data.train[1]"),
        ("adapter.r.x", "adapter.r holds a value and has no keys"),
        ("training.extra.zzz", "training.extra holds adam_beta1, optim_args, nested"),
        ("", "name a key"),
    ],
)
def test_a_key_that_is_not_there_is_refused(loaded: LoadedRecipe, key: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        explain(loaded, key)
    assert words in str(caught.value)


def test_the_schema_describes_every_key_and_is_stable() -> None:
    schema = recipe_schema()
    assert json.dumps(schema) == json.dumps(recipe_schema())
    described = []
    for path, section in fields.sections().items():
        properties = (schema if not path else schema["$defs"][section.__name__])["properties"]
        for name in fields.names(path):
            assert properties[name]["description"], f"{path}.{name}"
            described.append(name)
    assert len(described) >= 70
    assert schema["properties"]["extends"]["type"] == "string"
    assert schema["additionalProperties"] is False


def test_the_schema_accepts_what_the_reader_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(recipe_schema())
    check = validator(recipe_schema())
    base = {"model": {"name_or_path": "m"}, "data": {"train": "a"}, "output_dir": "o"}
    assert check.is_valid(base)
    assert check.is_valid({"extends": "x.yaml", "training": None})
    assert check.is_valid({**base, "data": {"train": ["a", {"path": "b"}], "validation": {"path": "c"}}})
    assert not check.is_valid({"model": {"name_or_path": "m"}})
    assert not check.is_valid({**base, "zzz": 1})
    assert not check.is_valid({**base, "data": {"train": []}})
    assert not check.is_valid({**base, "data": {"validation": "a"}})
    assert not check.is_valid({**base, "adapter": {"r": 0}})
