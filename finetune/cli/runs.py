"""`finetune runs [FOLDER]`: what runs there are and how each of them stands. Reads only JSON, changes nothing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import ExitCode, RecipeError
from finetune.run.pulse import is_here

_TAIL = 64 * 1024  # bytes read from the end of metrics.jsonl; a line has a few hundred

_STATES = {ExitCode.OK: "finished", ExitCode.STOPPED: "stopped"}


@dataclass(frozen=True)
class RunSummary:
    """One run folder in a line.

    Attributes:
        path: the run folder.
        name: its path below the folder that was listed.
        state: `finished`, `stopped` (can be resumed), `failed`, `running`, `unfinished` (no exit.json, and no process
            of this machine that is still at it: killed, or running elsewhere), or `unreadable`.
        exit_code: from exit.json; None when the run has not ended.
        reason: why it ended, in the run's own words.
        base: name of the base model.
        method: training method.
        step: last optimizer step known.
        loss: last training loss.
        eval_loss: last validation loss.
        started: ISO 8601 time.
        ended: ISO 8601 time.
        faults: files of the folder that could not be read.
    """

    path: str
    name: str
    state: str
    exit_code: int | None = None
    reason: str | None = None
    base: str | None = None
    method: str | None = None
    step: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    started: str | None = None
    ended: str | None = None
    faults: list[str] = field(default_factory=list)


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder whose runs are listed, at any depth.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """List run folders: state, base, method, steps, last loss."""
    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in found], indent=2, ensure_ascii=False))
    elif found:
        _draw(found)
    else:
        typer.echo(f"{folder}: no runs here (a run folder holds a run.json)")


def list_runs(folder: Path) -> list[RunSummary]:
    """Every run at or below `folder`, oldest first.

    Raises:
        RecipeError: `folder` exists and is no folder, or does not exist and is not the default.
    """
    if not folder.exists() and folder == Path("runs"):
        return []  # nothing was trained here yet
    if not folder.is_dir():
        raise RecipeError(f"{folder}: {'not a folder' if folder.exists() else 'there is no such folder'}")
    found = [summarise(path, folder) for path in _run_folders(folder)]
    return sorted(found, key=lambda run: (run.started or "", run.name))


def _run_folders(folder: Path) -> list[Path]:
    """Folders that hold a run.json. What lies inside a run is not searched: checkpoints hold no runs."""
    found = []
    for place, below, files in os.walk(folder):
        if "run.json" in files:
            found.append(Path(place))
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))
    return found


def summarise(path: Path, listed: Path) -> RunSummary:
    """Sum up the run in `path`; whatever cannot be read is named in `faults` and left out."""
    faults: list[str] = []
    run = _mapping(path / "run.json", faults)
    ended = _mapping(path / "exit.json", faults) if (path / "exit.json").exists() else None
    last = _last_metrics(path / "metrics.jsonl", faults)
    exit_code = _as(int, (ended or {}).get("exit_code"))
    base = run.get("base")
    name = str(path.relative_to(listed))
    return RunSummary(
        path=str(path),
        name=path.absolute().name if name == "." else name,
        state=_state(run, ended, exit_code),
        exit_code=exit_code,
        reason=_as(str, (ended or {}).get("reason")),
        base=_as(str, base.get("name") if isinstance(base, dict) else base),
        method=_as(str, run.get("method")),
        step=_as(int, (ended or {}).get("step")) or _as(int, last.get("step")),
        loss=_as(float, last.get("loss")),
        eval_loss=_as(float, last.get("eval_loss")),
        started=_as(str, run.get("created")),
        ended=_as(str, (ended or {}).get("ended")),
        faults=faults,
    )


def _state(run: dict[str, Any], ended: dict[str, Any] | None, exit_code: int | None) -> str:
    """How a run stands, by its exit.json, or without one by whether its process lives."""
    if ended is not None:
        return "unreadable" if exit_code is None else _STATES.get(exit_code, "failed")
    pid = _as(int, run.get("pid"))
    if pid is None or pid < 1 or not is_here(run):
        return "unfinished"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "unfinished"
    except PermissionError:
        pass  # it lives, and is another user's
    return "running"


def _as(kind: type, value: Any) -> Any:
    """`value` if it is of `kind` and finite (an int passes for a float, a bool for nothing), else None."""
    if isinstance(value, bool):
        return None
    if kind is float and isinstance(value, int | float):
        return float(value) if abs(value) < float("inf") else None
    return value if isinstance(value, kind) else None


def _mapping(path: Path, faults: list[str]) -> dict[str, Any]:
    """The JSON mapping in `path`; an empty one, and a fault, when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        faults.append(f"{path.name}: {error}")
        return {}
    if not isinstance(value, dict):
        faults.append(f"{path.name}: holds no mapping")
        return {}
    return value


def _last_metrics(path: Path, faults: list[str]) -> dict[str, Any]:
    """The newest value of each figure among the last lines of metrics.jsonl; only the file's end is read."""
    newest: dict[str, Any] = {}
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            lines = stream.read().split(b"\n")
    except FileNotFoundError:
        return newest  # no step was logged yet
    except OSError as error:
        faults.append(f"{path.name}: {error.strerror}")
        return newest
    whole = lines[:-1] if size <= _TAIL else lines[1:-1]  # the last may still be being written, the first is cut
    broken = 0
    for line in whole:
        try:
            value = json.loads(line)
        except ValueError:
            broken += 1
            continue
        newest.update(value if isinstance(value, dict) else {})
    if broken:
        faults.append(f"{path.name}: {broken} of the last {len(whole)} lines are not JSON")
    return newest


def _draw(found: list[RunSummary]) -> None:
    """The table of runs, and below it what could not be read."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False)
    for column in ("run", "state", "base", "method"):
        table.add_column(column, overflow="fold")
    for column in ("step", "loss", "eval loss"):
        table.add_column(column, justify="right")
    table.add_column("started")
    for run in found:
        state = f"failed ({run.exit_code})" if run.state == "failed" else run.state
        figures = [f"{value:.4f}" if value is not None else "" for value in (run.loss, run.eval_loss)]
        started = (run.started or "")[:16].replace("T", " ")
        step = "" if run.step is None else str(run.step)
        table.add_row(run.name, state, run.base or "?", run.method or "?", step, *figures, started)
    console.print(table)
    for run in found:
        for fault in run.faults:
            console.print(f"{run.name}: {fault}", markup=False, highlight=False, soft_wrap=True)
