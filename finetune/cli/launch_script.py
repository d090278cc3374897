"""`finetune launch-script`: a job file for a cluster, on stdout."""

from __future__ import annotations

from typing import Annotated

import typer


def launch_script(
    recipe: Annotated[str, typer.Argument(help="A recipe file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, as for `finetune train`.")
    ] = None,
    scheduler: Annotated[str, typer.Option("--for", help="slurm, kubernetes or skypilot.")] = "slurm",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="Accelerators of each machine.")] = 8,
    time: Annotated[str | None, typer.Option(help="Longest run, for slurm; by default 24:00:00.")] = None,
    image: Annotated[
        str | None, typer.Option(help="Container image, for kubernetes; by default finetune:latest.")
    ] = None,
    accelerator: Annotated[str | None, typer.Option(help="Kind of accelerator, for skypilot; by default H100.")] = None,
) -> None:
    """Print a job file that trains a recipe on a cluster and continues it when its time was over."""
    from finetune import launch_script as story

    place = story.Place(nodes, gpus, time, image, accelerator)
    typer.echo(story.run(recipe, overrides or [], scheduler, place), nl=False)
