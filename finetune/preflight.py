"""What is found before torch is imported: faults of the recipe, the base, the trackers, the run folder and the data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import RecipeError
from finetune.recipe.combinations import recipe_facts, refusals
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.shipped import configs_folder

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.methods.method import Method
    from finetune.model.earlier import Earlier
    from finetune.model.folder import Base
    from finetune.recipe.sections import AdapterOptions, Recipe
    from finetune.run.folder import RunFolder
    from finetune.run.modes import Mode


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        base: of a hub its name alone, until it is fetched.
        family: of the base, as far as that is known.
        adapter: the adapter section, with what an earlier adapter decides.
        earlier: the adapter that is trained further; None without one.
        finished: what the run reports that a launcher starts again although it has its product; None elsewhere.
    """

    base: Base
    family: Family | None
    method: Method
    mode: Mode
    folder: RunFolder
    continuing: bool
    overwrite: bool
    allow_drift: tuple[str, ...]
    adapter: AdapterOptions
    earlier: Earlier | None = None
    finished: dict[str, Any] | None = None


def check(loaded: LoadedRecipe, overwrite: bool = False, allow_drift: Sequence[str] = ()) -> Checked:
    """Find every fault that can be found without torch: in method, base, trackers, folder and data.

    Raises:
        FinetuneError: the first kind of fault found, with all of its kind.
    """
    from finetune.data.examples import SAMPLE, check_sources, refuse
    from finetune.families import match
    from finetune.methods import METHODS
    from finetune.model.folder import find
    from finetune.registry import resolve
    from finetune.run.folder import RunFolder, claim
    from finetune.run.modes import mode_of
    from finetune.run.restart import begun_by, finished, is_restart, launcher_of
    from finetune.run.resume import check_keys, check_names
    from finetune.run.track import check_trackers

    recipe = loaded.recipe
    mode = mode_of(recipe.launch, configs_folder(), os.environ)
    check_names(allow_drift)
    method: Method = resolve("method", recipe.training.method, METHODS)
    base = find(recipe.model.name_or_path)
    family = match(recipe.model.family, base.model_type)
    if faults := check_trackers(recipe.tracking):
        raise RecipeError("\n".join(faults))
    plain = loaded.resolved()
    earlier = fits(recipe, plain, mode, base)
    folder, continuing, done = RunFolder.at(recipe.output_dir), False, None
    if os.environ.get("RANK", "0") == "0":  # other ranks take rank 0's word: it writes there while they still look
        if is_restart(os.environ):
            overwrite = overwrite and not begun_by(launcher_of(os.environ), folder)  # what it began is not begun again
            done = None if overwrite else finished(folder, loaded.hash())
        if done is None:
            folder, continuing = claim(
                folder.root, loaded.hash(), overwrite, needed(loaded),
                lambda found: check_keys(found, plain, allow_drift),
            )  # fmt: skip
    refuse(check_sources(recipe.data, method.needs, SAMPLE))
    adapter = earlier.options if earlier is not None else recipe.adapter
    return Checked(
        base, family, method, mode, folder, continuing, overwrite, tuple(allow_drift), adapter, earlier, done
    )


def fits(recipe: Recipe, plain: Mapping[str, Any], mode: Mode, base: Base) -> Earlier | None:
    """The adapter that a recipe goes on from, once recipe, mode, base and adapter were compared; None for a new one.

    Args:
        recipe: the recipe.
        plain: the same as plain values.
        mode: how the run is laid over its processes.
        base: the base, with its config where that is at hand.

    Raises:
        RecipeError: they do not go together.
        ModelError: the base, or the earlier adapter, cannot be trained so.
    """
    from finetune.model.earlier import read_earlier
    from finetune.model.stored import stored

    stored(base.name, base.config, recipe.model.quantization, recipe.adapter.method)
    refuse_in_mode(plain, mode)
    return read_earlier(recipe.adapter, recipe.model.name_or_path, recipe.model.quantization)


def refuse_in_mode(plain: Mapping[str, Any], mode: Mode) -> None:
    """Refuse what a recipe asks for and its mode cannot do.

    Args:
        plain: the recipe as plain values.
        mode: how the run is laid over its processes.

    Raises:
        RecipeError: with all of it.
    """
    facts = {**recipe_facts(lambda section, name: plain[section][name]), "parallelism": mode.facts}
    if spread := [f"{row.key}: {row.message()}" for row in refusals(facts, "launch")]:
        raise RecipeError("\n".join(spread))


def fetched(checked: Checked, family: str, base: Base) -> Checked:
    """What was found, with the base as it was fetched: only then a hub's config is at hand, which tells the family.

    Args:
        checked: from `check`.
        family: model.family.
        base: the fetched base.
    """
    from finetune.families import match

    return replace(checked, base=base, family=match(family, base.model_type))


def needed(loaded: LoadedRecipe) -> tuple[Path, ...]:
    """What replacing an earlier run must leave alone: the recipe's files, the base, the data, the working folder."""
    recipe = loaded.recipe
    sources = (*recipe.data.train, *recipe.data.validation, *recipe.evaluate.data)
    template = [recipe.data.chat_template] if recipe.data.chat_template else []
    earlier = [recipe.adapter.continue_from] if recipe.adapter.continue_from else []
    named = [recipe.model.name_or_path, *earlier, *template, *(source.path for source in sources)]
    found = [path for path in (Path(name).expanduser() for name in named) if path.exists()]
    return (*loaded.files, *found, Path.cwd())
