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
class _Word:
    """A value that one scheduler's job file has a place for.

    Attributes:
        scheduler: whose.
        usual: what stands there unless something else is given.
        form: what it must look like, to mean there what it says.
        meant: the same in words.
    """

    scheduler: str
    usual: str
    form: str
    meant: str


WORDS = {
    "time": _Word(
        "slurm",
        "24:00:00",
        r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE",
        "a time as 90, 12:00:00 or 2-00:00:00",
    ),
    "image": _Word(
        "kubernetes", "finetune:latest", r"[A-Za-z0-9][A-Za-z0-9._/:@+-]*", "an image as registry.example/finetune:1.0"
    ),
    "accelerator": _Word("skypilot", "H100", r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name as H100 or A100-80GB"),
}


@dataclass(frozen=True)
class Place:
    """What a job is given.

    Attributes:
        nodes: machines.
        gpus: accelerators of each.
        time: longest run, as Slurm writes it; None for the usual one, as below.
        image: container image of Kubernetes.
        accelerator: name of SkyPilot's accelerator.
    """

    nodes: int = 1
    gpus: int = 8
    time: str | None = None
    image: str | None = None
    accelerator: str | None = None


def run(recipe_path: str, overrides: list[str], scheduler: str, place: Place) -> str:
    """The job file's text.

    Args:
        recipe_path: the recipe file.
        overrides: `section.key=value` each.
        scheduler: one of TEMPLATES.
        place: what the job is given.

    Raises:
        RecipeError: there is no such template, `finetune train` would refuse the recipe on so many processes with
            accelerators, or what the job is given has no place in the file or is no such thing.
    """
    from finetune.preflight import refuse_in_mode
    from finetune.run.batch import batch_shape
    from finetune.run.modes import mode_of, refuse

    if scheduler not in TEMPLATES:
        raise RecipeError(f"--for: there is no template for {scheduler!r}; there are {', '.join(TEMPLATES)}")
    given = _given(place, scheduler)
    loaded = load_recipe(recipe_path, overrides)
    recipe, count = loaded.recipe, place.nodes * place.gpus
    if recipe.launch.num_processes not in (None, count):
        raise RecipeError(
            f"launch.num_processes: the recipe asks for {recipe.launch.num_processes} processes and {place.nodes} x "
            f"{place.gpus} are {count}; remove the key, or give --nodes and --gpus that fit"
        )
    if recipe.launch.device == "cpu":
        raise RecipeError("launch.device: cpu: a job file asks for accelerators; remove the key")
    shape = batch_shape(recipe.training, count)
    mode = mode_of(recipe.launch, configs_folder(), {})
    refuse(mode, recipe.model, recipe.training, shape, "cuda")
    refuse_in_mode(loaded.resolved(), mode)
    extras = [
        "quant",
        *(["deepspeed"] if mode.kind == "deepspeed" else []),
        *(["tracking"] if recipe.tracking.trackers else []),
    ]
    words = {
        "name": _name(recipe.output_dir),
        "nodes": str(place.nodes),
        "gpus": str(place.gpus),
        **given,
        "recipe": _quoted(str(loaded.path)),
        "overrides": "".join(f" {_quoted(one)}" for one in loaded.overrides),
        "extras": ",".join(extras),
    }
    text = (configs_folder() / "templates" / TEMPLATES[scheduler]).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words[found[1]], text)


def _given(place: Place, scheduler: str) -> dict[str, str]:
    """The words of the scheduler's job file that the user may choose.

    Raises:
        RecipeError: one has no place in that file, or is no such thing.
    """
    found = {}
    for name, word in WORDS.items():
        value = getattr(place, name)
        if value is not None and word.scheduler != scheduler:
            raise RecipeError(
                f"--{name}: has no effect on a job for {scheduler}, only for {word.scheduler}; leave it out"
            )
        if value is not None and not re.fullmatch(word.form, value):
            raise RecipeError(f"--{name}: expected {word.meant}, not {value!r}")
        found[name] = value or word.usual
    return found


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
