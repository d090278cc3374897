"""`finetune recipe`: show, explain, check, list and copy recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import ExitCode
from finetune.recipe.copy import copy_recipe
from finetune.recipe.explain import Explanation, explain
from finetune.recipe.load import load_recipe
from finetune.recipe.loaded import LoadedRecipe
from finetune.recipe.problems import RecipeProblems
from finetune.recipe.schema import recipe_schema
from finetune.recipe.shipped import first_comment, recipes_folder, shipped_recipes
from finetune.recipe.show import recipe_yaml, scalar

app = typer.Typer(help="Show, explain, check, list and copy recipes.", no_args_is_help=True)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As training.learning_rate=1e-4.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    origins: Annotated[bool, typer.Option("--origins", help="Say behind each value where it came from.")] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Say what `auto` precisions become on this machine. Loads torch.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved recipe: every key with its value."""
    loaded = load_recipe(recipe, overrides or ())
    derived = _dtypes_here(loaded) if here else {}
    if as_json:
        facts: dict[str, Any] = {"recipe": loaded.resolved(), "hash": loaded.hash()}
        if here:
            facts["derived"] = derived
        if origins:
            facts["origins"] = {key: str(loaded.origin(key)) for key in loaded.set_keys()}
        _print_json(facts)
    else:
        typer.echo(recipe_yaml(loaded, derived, origins=origins), nl=False)


def _dtypes_here(loaded: LoadedRecipe) -> dict[str, str]:
    """The precisions of base, trained weights, optimizer state and products on this machine."""
    from finetune.model.load import precision
    from finetune.plan.hardware import compute_dtype, detect

    recipe = loaded.recipe
    compute = compute_dtype(recipe.model.dtype, detect(recipe.launch.device))
    return {"model.dtype": compute, **precision(recipe.model, recipe.adapter.method, compute).facts()}


@app.command("explain")
def explain_key(
    recipe: RecipeArgument,
    key: Annotated[str, typer.Argument(metavar="KEY", help="As training.learning_rate.")],
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a key is set to, where that came from, and what the key does."""
    explanation = explain(load_recipe(recipe, overrides or ()), key)
    if as_json:
        _print_json(explanation.to_json())
    else:
        typer.echo("\n".join(_explanation_lines(explanation)))


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Report every problem of a recipe, or that it has none."""
    try:
        loaded = load_recipe(recipe, overrides or ())
    except RecipeProblems as error:
        if not as_json:
            raise
        _print_json({"ok": False, "problems": [problem.to_json() for problem in error.problems]})
        raise typer.Exit(ExitCode.RECIPE) from error
    if as_json:
        _print_json({"ok": True, "problems": [], "hash": loaded.hash(), "set_keys": list(loaded.set_keys())})
    else:
        count = len(loaded.set_keys())
        keys = "key" if count == 1 else "keys"
        typer.echo(f"{recipe}: ok ({count} {keys} set, the rest by default); `finetune train` reads what it names")


@app.command()
def schema(as_json: JsonOption = False) -> None:
    """Print the JSON Schema of a recipe, for editors."""
    _print_json(recipe_schema())


@app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes that can be copied."""
    found = {name: first_comment(path) for name, path in shipped_recipes().items()}
    if as_json:
        _print_json([{"name": name, "about": about} for name, about in found.items()])
        return
    width = max(map(len, found), default=0)
    for name, about in found.items():
        typer.echo(f"{name:<{width}}  {about}".rstrip())
    if not found:
        typer.echo(f"no recipes in {recipes_folder()}")


@app.command("copy")
def copy_shipped(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `finetune recipe list` prints.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DESTINATION]", help="A file to write, or a folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a shipped recipe, and what it extends, to change it."""
    written = copy_recipe(name, destination)
    if as_json:
        _print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        typer.echo(f"wrote {path}")


def _explanation_lines(explanation: Explanation) -> list[str]:
    lines = [f"{explanation.key}: {scalar(explanation.value)}", f"  from      {explanation.origin}"]
    if explanation.expected:
        lines.append(f"  expected  {explanation.expected}")
    if explanation.expected.startswith("a section"):
        lines.append(f"  keys      {', '.join(explanation.allowed)}")
    elif explanation.expected:
        lines.append(f"  default   {'none, it is required' if explanation.required else scalar(explanation.default)}")
    return [*lines, "", explanation.help]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
