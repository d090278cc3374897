"""The story of `finetune launch-script`: a job file for a cluster's scheduler, filled in for one recipe."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe
from finetune.recipe.shipped import configs_folder

TEMPLATES = {"slurm": "slurm.sbatch", "kubernetes": "kubernetes.yaml", "skypilot": "skypilot.yaml"}


@dataclass(frozen=True)
class Place:
    """What a job is given.

    Attributes:
        nodes: machines.
        gpus: accelerators of each.
        time: longest run, as the scheduler writes it.
        image: container image.
        accelerator: name of the accelerator.
    """

    nodes: int = 1
    gpus: int = 8
    time: str = "24:00:00"
    image: str = "finetune:latest"
    accelerator: str = "H100"


def run(recipe_path: str, overrides: list[str], scheduler: str, place: Place) -> str:
    """The job file's text.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.
        scheduler: one of TEMPLATES.
        place: what the job is given.

    Raises:
        RecipeError: there is no such template, or the recipe cannot be shared by so many processes.
    """
    from finetune.run.batch import batch_shape
    from finetune.run.modes import mode_of, refuse

    if scheduler not in TEMPLATES:
        raise RecipeError(f"--for: there is no template for {scheduler!r}; there are {', '.join(TEMPLATES)}")
    loaded = load_recipe(recipe_path, overrides)
    recipe, count = loaded.recipe, place.nodes * place.gpus
    if recipe.launch.num_processes not in (None, count):
        raise RecipeError(
            f"launch.num_processes: the recipe asks for {recipe.launch.num_processes} processes and {place.nodes} x "
            f"{place.gpus} are {count}; remove the key, or give --nodes and --gpus that fit"
        )
    shape = batch_shape(recipe.training, count)
    mode = mode_of(recipe.launch, configs_folder(), {})
    refuse(mode, recipe.model, recipe.training, shape, "cuda")
    extras = [
        "quant",
        *(["deepspeed"] if mode.kind == "deepspeed" else []),
        *(["tracking"] if recipe.tracking.trackers else []),
    ]
    words = {
        "name": _name(recipe.output_dir),
        "nodes": str(place.nodes),
        "gpus": str(place.gpus),
        "time": place.time,
        "image": place.image,
        "accelerator": place.accelerator,
        "recipe": _quoted(str(loaded.path)),
        "overrides": "".join(f" {_quoted(one)}" for one in loaded.overrides),
        "extras": ",".join(extras),
    }
    text = (configs_folder() / "templates" / TEMPLATES[scheduler]).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)


def _quoted(word: str) -> str:
    """A word of a shell command that itself stands in single quotes.

    Raises:
        RecipeError: it holds what no template can carry.
    """
    if "'" in word or "\n" in word:
        raise RecipeError(f"{word!r} holds a quote or a line break, which a job file cannot carry; rename the file")
    if shlex.quote(word) == word:
        return word
    escaped = re.sub(r'[\\"$`]', lambda found: "\\" + found[0], word)
    return f'"{escaped}"'


def _name(output_dir: str) -> str:
    """A job's name: lower case letters, digits and hyphens, as Kubernetes wants them."""
    words = re.sub(r"[^a-z0-9]+", "-", output_dir.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    return words[:40].rstrip("-") or "finetune"
