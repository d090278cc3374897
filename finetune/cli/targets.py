"""`finetune targets RECIPE`: what a recipe trains of its model, and what stays frozen."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from finetune.errors import ExitCode


def targets(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As adapter.target_modules=attention.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, with every module.")] = False,
) -> None:
    """Show what a recipe trains, per kind of block, from the model's config alone."""
    from finetune import targets as story

    facts = story.run(recipe, overrides or [])
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _draw(facts)
    if facts["refused"]:
        print(f"error: {facts['refused']}", file=sys.stderr)
        raise typer.Exit(ExitCode.REFUSED)


def _draw(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    family = facts["family"] or "no family file knows it"
    kept = facts["dtype"] if facts["quantization"] == "none" else f"{facts['quantization']}, the rest {facts['dtype']}"
    print(f"{facts['base']}: {facts['model_type']} ({family}), {_number(facts['parameters'])} parameters, {kept}")
    if facts["stored"]:
        print(f"the checkpoint is stored as {facts['stored']}; the sizes are those of {facts['dtype']}")
    for told in filter(None, (facts["assumed"], facts["loses"])):
        print(told)
    whole = facts["unquantised"]
    names = ("kind", "parameters", *(["whole GB"] if whole else []), "GB", "adapted", "trainable", "on", "frozen")
    table = Table(*names, box=None, pad_edge=False)
    for name, column in zip(names, table.columns, strict=True):
        words = name in ("on", "frozen")
        column.justify = "left" if words or name == "kind" else "right"
        column.no_wrap = not words
        column.overflow = "fold"
    for block in facts["blocks"]:
        share = block["adapted"] / block["parameters"] if block["parameters"] else 0.0
        table.add_row(
            block["kind"],
            _number(block["parameters"]),
            *([f"{whole[block['kind']] / 1e9:,.2f}"] if whole else []),
            f"{block['bytes'] / 1e9:,.2f}",
            f"{share:.0%}" if block["trainable"] else "-",
            _number(block["trainable"]) if block["trainable"] else "-",
            ", ".join(block["leaves"]),
            ", ".join(block["frozen"]),
        )
    total = [f"{sum(whole.values()) / 1e9:,.2f}"] if whole else []
    taken, trained = f"{facts['bytes'] / 1e9:,.2f}", _number(facts["trainable"])
    table.add_row("all", _number(facts["parameters"]), *total, taken, "", trained)
    Console().print(table)


def _number(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
