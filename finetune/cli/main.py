"""The `finetune` command: its verbs, and how every one of them ends.

    finetune train RECIPE [KEY=VALUE]...    adapt a base model as the recipe says
    finetune evaluate TARGET                score a run, an adapter or a merged model on held-out rows
    finetune merge TARGET                   fold the adapter into the base, and prove it
    finetune targets RECIPE                 what a recipe trains of its model, before any weight is loaded
    finetune rehearse RECIPE                play a whole recipe on a tiny twin of its model
    finetune launch-script RECIPE           a job file for Slurm, Kubernetes or SkyPilot
    finetune data prepare | audit | preview | convert
    finetune runs | recipe | base | families

Nothing heavy is imported before a verb needs it: `finetune --help` and a faulty recipe answer in well under a second.
With `--json` a verb prints one JSON value on stdout, also when it fails (`data preview`: one for each row); progress
and messages go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from finetune import __version__
from finetune.clash import refuse_namesake
from finetune.cli.base import base
from finetune.cli.data import app as data_app
from finetune.cli.families import families
from finetune.cli.launch_script import launch_script
from finetune.cli.recipe import app as recipe_app
from finetune.cli.rehearse import rehearse
from finetune.cli.runs import runs
from finetune.cli.targets import targets
from finetune.errors import ExitCode, FinetuneError
from finetune.privacy import mask_text, no_telemetry
from finetune.recipe.problems import RecipeProblems

BROKEN_PIPE = 141  # what a shell reports for a program whose reader went away: 128 + SIGPIPE

app = typer.Typer(
    name="finetune",
    help="Adapt open-weight language models to your domain, on your hardware, from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"finetune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, as recipes/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, as training.learning_rate=1e-4."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what an earlier run left in output_dir.")] = False,
    allow_drift: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Continue a run although these have changed, as data,learning_rate; a refusal lists the names. "
            "May be given more than once.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Adapt a base model as a recipe says. The same command continues a run that was stopped."""
    from finetune import train as story

    names = [name.strip() for name in ",".join(allow_drift or []).split(",") if name.strip()]
    facts = story.run(
        recipe, overrides or [], overwrite=overwrite, allow_drift=names, as_json=as_json, own_process=True
    )
    _answer(facts, as_json)


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder, an adapter, a merged model or a base model.")],
    recipe: Annotated[
        str | None, typer.Option(help="The recipe whose evaluate section is used; by default the run's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many rows.")] = None,
    base_too: Annotated[
        bool, typer.Option("--base/--no-base", help="Score the base model too, for before and after.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Score answers on held-out rows, before and after training."""
    from finetune import evaluate as story

    _answer(story.run(target, recipe=recipe, limit=limit, base=base_too, as_json=as_json, own_process=True), as_json)


@app.command()
def merge(
    target: Annotated[str, typer.Argument(help="A run folder, or an adapter folder.")],
    output: Annotated[str | None, typer.Option(help="The folder to write; by default merged/ in the run.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, bfloat16, float16 or float32; by default as the recipe says.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload what was written and compare its logits.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Fold the adapter into the base model's weights, and prove that the result answers alike."""
    from finetune import merge as story

    _answer(story.run(target, output=output, dtype=dtype, verify=verify, as_json=as_json, own_process=True), as_json)


app.add_typer(data_app, name="data")
app.command()(runs)
app.add_typer(recipe_app, name="recipe")
app.command()(targets)
app.command()(rehearse)
app.command()(base)
app.command()(families)
app.command("launch-script")(launch_script)


def _answer(result: dict[str, Any], as_json: bool) -> None:
    """Print a story's result as JSON when asked; without `--json` the story has drawn it already."""
    if as_json:
        typer.echo(json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as null, because JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (docs/exit-codes.md).

    Args:
        argv: the words after `finetune`; by default those of this process.
    """
    no_telemetry()
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        refuse_namesake()
        code = app(args=words, prog_name="finetune", standalone_mode=False)
        sys.stdout.flush()
        if code == ExitCode.INTERRUPTED:  # typer has taken Ctrl-C for itself, and says nothing
            return _report("Interrupted", ExitCode.INTERRUPTED, "interrupted", as_json)
        return code if isinstance(code, int) else ExitCode.OK
    except FinetuneError as error:
        problems = [problem.to_json() for problem in error.problems] if isinstance(error, RecipeProblems) else None
        return _report(_kind(error), error.exit_code, str(error), as_json, problems)
    except TyperException as error:
        if not error.format_message():  # no verb was given: typer has shown the help
            return ExitCode.RECIPE
        return _report("UsageError", ExitCode.RECIPE, _usage(error), as_json)
    except (typer.Abort, KeyboardInterrupt):
        return _report("Interrupted", ExitCode.INTERRUPTED, "interrupted", as_json)
    except (SystemExit, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
            return _reader_gone()
        raise
    except Exception as error:
        print(mask_text(traceback.format_exc()), end="", file=sys.stderr)  # libraries put requests into their errors
        message = f"{type(error).__name__}: {error}"
        hint = "this is a defect of finetune; please report it on its issue tracker with the traceback above"
        return _report("UnexpectedError", ExitCode.FAILURE, f"{message}\n{hint}", as_json)


def _usage(error: TyperException) -> str:
    """A usage error's message, with the command whose help tells more."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "finetune"
    return f"{error.format_message()}\ntry: {path} --help"


def _kind(error: FinetuneError) -> str:
    """The error's name in the tree of finetune/errors.py; kinds refined elsewhere count as the documented one."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == FinetuneError.__module__)


def _report(
    kind: str, exit_code: int, message: str, as_json: bool, problems: list[dict[str, Any]] | None = None
) -> int:
    """Show an error on stderr, and on stdout as JSON when the verb was asked for JSON; return its exit code."""
    rank, message = os.environ.get("RANK", "0"), mask_text(message)
    if rank != "0":
        message = f"rank {rank}: {message}"
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble(("error: ", "bold red"), message)
        Console(stderr=True, highlight=False, soft_wrap=True).print(text)
    else:
        print(f"error: {message}", file=sys.stderr)
    if as_json:
        fault: dict[str, Any] = {"kind": kind, "exit_code": exit_code, "message": message}
        if problems is not None:
            fault["problems"] = problems
        try:
            print(json.dumps({"error": fault}, ensure_ascii=False), flush=True)
        except BrokenPipeError:
            _reader_gone()
    return exit_code


def _reader_gone() -> int:
    """Stop writing to a closed pipe; what is still buffered would fail again when the interpreter flushes it."""
    void = os.open(os.devnull, os.O_WRONLY)
    os.dup2(void, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.close(void)
    return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
