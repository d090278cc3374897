"""`finetune families`: the model families whose facts are known."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.registry import resolve


def families(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """List the model families that are known by name."""
    known: list[Family] = [resolve("family", name, FAMILIES) for name in FAMILIES]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(family) for family in known], indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Model families", title_justify="left")
    for column in ("family", "model_type in config.json", "adapted by target_modules: auto", "licence"):
        table.add_column(column, overflow="fold")
    for family in known:
        adapted = ", ".join(family.targets + family.experts)
        table.add_row(family.name, ", ".join(family.model_types), adapted, family.licence)
    Console().print(table)
