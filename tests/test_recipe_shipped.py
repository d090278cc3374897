"""Shipped recipes are listed, named in hints, and copied so that the copy works."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import RecipeError, RefusedError
from finetune.recipe.copy import copy_recipe
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import configs_folder, first_comment, nearest_shipped, recipes_folder, shipped_recipes

BASE = "# Shared by all.\nmodel: {name_or_path: m}\ndata: {train: a}\noutput_dir: o\n"
CHILD = (
    "# yaml-language-server: $schema=../schema.json\n#\n"
    "# LoRA of a small model.\nextends: ../base.yaml  # shared\nadapter: {r: 4}\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shipped recipes."""
    found = tmp_path / "shipped"
    (found / "qwen").mkdir(parents=True)
    (found / "base.yaml").write_text(BASE, encoding="utf-8")
    (found / "qwen" / "8b-lora.yaml").write_text(CHILD, encoding="utf-8")
    (found / "qwen" / "base.yaml").write_text("extends: ../base.yaml\ntraining: {seed: 7}\n", encoding="utf-8")
    return found


def test_recipes_are_named_by_their_way_below_the_folder(folder: Path) -> None:
    found = shipped_recipes(folder)
    assert list(found) == ["base", "qwen/8b-lora", "qwen/base"]
    assert first_comment(found["base"]) == "Shared by all."
    assert first_comment(found["qwen/8b-lora"]) == "LoRA of a small model."
    assert first_comment(found["qwen/base"]) == ""
    assert shipped_recipes(folder / "none") == {}


def test_the_folders_are_those_of_the_checkout(root: Path) -> None:
    assert recipes_folder() == root / "recipes"
    assert configs_folder() == root / "configs"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("qwen/8b-lora", "qwen/8b-lora"),
        ("recipes/qwen/8b-lora.yaml", "qwen/8b-lora"),
        ("./base.yml", "base"),
        ("8b-lora.yaml", "qwen/8b-lora"),
        ("qwen/8b-lor", "qwen/8b-lora"),
        ("elephant", None),
    ],
)
def test_the_nearest_shipped_recipe_is_found(folder: Path, written: str, name: str | None) -> None:
    assert nearest_shipped(written, folder) == name


def test_a_copy_stands_beside_copies_of_what_it_extends(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine" / "my.yaml"
    written = copy_recipe("qwen/8b-lora", target, folder)
    assert written == [target, target.parent / "base.yaml"]
    assert target.read_text() == "#\n# LoRA of a small model.\nextends: base.yaml\nadapter: {r: 4}\n"
    assert written[1].read_text() == BASE
    original = load_recipe(folder / "qwen" / "8b-lora.yaml")
    assert load_recipe(target).recipe == original.recipe


def test_copies_of_one_name_do_not_meet(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    written = copy_recipe("qwen/base", target, folder)
    assert [path.name for path in written] == ["base.yaml", "base-base.yaml"]
    assert load_recipe(written[0]).recipe.training.seed == 7


def test_nothing_is_overwritten_and_then_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "base.yaml").write_text("mine")
    with pytest.raises(RefusedError, match=r"base\.yaml exists already"):
        copy_recipe("qwen/8b-lora", target, folder)
    assert [path.name for path in target.iterdir()] == ["base.yaml"]
    assert (target / "base.yaml").read_text() == "mine"


def test_an_unknown_name_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"did you mean qwen/8b-lora\? \(there are: base, qwen/8b-lora, qwen/base\)"):
        copy_recipe("8b_lora", None, folder)
    with pytest.raises(RecipeError, match="none is missing"):
        copy_recipe("x", None, folder / "none")


def test_every_shipped_recipe_can_be_copied_and_loaded(tmp_path: Path) -> None:
    names = list(shipped_recipes())
    for name in names:
        written = copy_recipe(name, tmp_path / name.replace("/", "-") / "r.yaml")
        assert load_recipe(written[0]).recipe == load_recipe(shipped_recipes()[name]).recipe
    assert len(list(tmp_path.rglob("r.yaml"))) == len(names)
