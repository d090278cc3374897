"""Every shipped recipe trains: two steps on a tiny base, with its own data, adapter and schedule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Lab

from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import shipped_recipes

RECIPES = shipped_recipes()
# Where a recipe asks for a launcher, its ranks are the tests' own.
TWIN = {"qwen": "thinking", "llama": "llama3"}


def test_the_recipes_are_all_trained() -> None:
    assert len(RECIPES) >= 8
    assert {"quickstart", "quickstart-qlora", "corpus/continued-pretraining"} <= RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_trains_two_steps(lab: Lab, name: str, root: Path) -> None:
    (lab / "data").symlink_to(root / "data")
    recipe = load_recipe(RECIPES[name]).recipe
    asked = recipe.model.name_or_path.lower()
    base = next((twin for family, twin in TWIN.items() if family in asked), "chatml")
    processes = recipe.launch.num_processes or 1
    overrides = [
        f"model.name_or_path={base}",
        "training.max_steps=2",
        f"training.global_batch_size={2 * processes}",
        "training.per_device_train_batch_size=1",
        "training.warmup_steps=0",
        "launch.device=cpu",
        "output_dir=run",
        "data.max_length=4096",
    ]
    if recipe.model.revision is not None:
        overrides.append("model.revision=null")
    words = (str(RECIPES[name]), *overrides)
    if processes == 1:
        lab.warm.run("train", *words, cwd=lab.folder).ok()
    else:
        for outcome in lab.warm.ranks(processes, *words, cwd=lab.folder):
            outcome.ok()
    assert lab.ended()["exit_code"] == 0
    assert len(lab.losses()) == 2 or recipe.training.logging_steps > 1
    record = json.loads((lab / "run/run.json").read_text())
    assert record["world_size"] == processes
    # The resolved recipe says what the recipe says, apart from what was overridden and derived.
    resolved, given = load_recipe(lab / "run/recipe.yaml"), load_recipe(RECIPES[name])
    changed = {override.split("=")[0] for override in overrides} | {"model.dtype", "model.attn_implementation"}
    changed |= {"adapter.target_modules", "training.activation_checkpointing", "launch.num_processes"}
    kept = [key for key in given.set_keys() if key not in changed]
    assert len(kept) >= 6
    assert {key: resolved.value(key) for key in kept} == {key: given.value(key) for key in kept}
