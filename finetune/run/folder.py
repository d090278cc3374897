"""The run folder: what a run leaves behind, and who may write into it.

recipe.yaml      the resolved recipe, with what `auto` became
run.json         versions, base model, data fingerprints, seeds, command, git state, hardware
metrics.jsonl    every logged figure, one JSON object a line: the truth that trackers mirror
checkpoints/     resumable states; each is written whole or not at all
adapter/         the product, in PEFT's layout (model/ for full fine-tuning)
tracking/        logs and states of the trackers
pulse            a number that grows while the run lives
hang/            what a process said that held up the others, or was held up: verdict and stacks
probe.json       token ids of a few training rows, on which a merge is compared
exit.json        how the run ended: exit code, reason, last step
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import RefusedError
from finetune.files import (
    MANIFEST,
    disk_errors,
    existing_parent,
    locked,
    manifest_faults,
    remove_folder,
    write_json,
    write_text,
)
from finetune.privacy import mask_text
from finetune.run import stacks
from finetune.run.pulse import lives

FORMAT = 2  # of a checkpoint's folder; others are passed over
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# Everything that a run, its merge and its evaluations write, and what they leave when they are killed.
_OURS = re.compile(
    r"(recipe\.yaml|(run|exit|probe)\.json|evaluation(-\w+)?\.json|(metrics|quarantine)\.jsonl|checkpoints|adapter|model|merged|tracking|hang|pulse"
    r"|\..*\.tmp)$"
)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping, or an empty one when the file is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run's folder, and its state."""

    root: Path

    @classmethod
    def at(cls, output_dir: str) -> RunFolder:
        """The folder a recipe names; `~` is the user's home, and no `..` is left in the path."""
        path = Path(output_dir).expanduser()
        return cls(path.resolve() if ".." in path.parts else path)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def exit(self) -> Path:
        return self.root / "exit.json"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def hang(self) -> Path:
        """Reports of the watchdog, one for each process."""
        return self.root / "hang"

    @property
    def probe(self) -> Path:
        return self.root / "probe.json"

    @property
    def product(self) -> Path | None:
        """The finished adapter or model; None before the run has one."""
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)

    def begin(self, recipe: str, record: dict[str, Any], probe: list[list[int]], continued_from: int | None) -> None:
        """Make the folder's first files, right before the first step, so that a start that fails leaves nothing.

        Args:
            recipe: the resolved recipe as YAML.
            record: what run.json says.
            probe: token ids of a few training rows, on which a merge is compared.
            continued_from: the step a run is continued from; None for a new run, which replaces an old one.
        """
        with disk_errors(self.root):
            if continued_from is None:
                self._clear()
            write_json(self.record, record)  # first, so that a folder is a run's from its first file on
            self.checkpoints.mkdir(exist_ok=True)
            self.clean_checkpoints()
            self._clean_products()
            self.exit.unlink(missing_ok=True)
        self.cut_metrics(continued_from or 0)
        write_text(self.recipe, recipe)
        write_json(self.probe, probe)

    def keep_quarantine(self, files: Sequence[Path]) -> None:
        """Keep copies of the rows that could not be used, of all sources in one file; none when there are none.

        What an earlier start of the same run left there is replaced: rows that are streamed are met anew.
        """
        if files:
            text = "".join(path.read_text(encoding="utf-8", errors="surrogatepass") for path in files)
            write_text(self.quarantine, text)
        else:
            with disk_errors(self.quarantine):
                self.quarantine.unlink(missing_ok=True)

    def is_run(self) -> bool:
        """Whether run.json is one of ours."""
        return "recipe_hash" in read_json(self.record)

    def foreign(self) -> list[str]:
        """Names in the folder that no run writes; they are never removed."""
        return sorted(path.name for path in self.root.iterdir() if not _OURS.match(path.name))

    @contextlib.contextmanager
    def claimed_alone(self) -> Iterator[None]:
        """Only one process of this machine at a time may decide that the folder is its own."""
        key = hashlib.sha256(str(self.root.resolve()).encode()).hexdigest()[:16]
        with locked(Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}-{key}.lock", remove=True):
            yield

    def _clear(self) -> None:
        """Remove what an earlier run left, and nothing else; the folder itself may be a link. The record goes last."""
        if not self.root.is_dir():
            return
        ours = [path for path in self.root.iterdir() if _OURS.match(path.name)]
        for path in sorted(ours, key=lambda path: path == self.record):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def write_exit(self, code: int, reason: str, step: int, facts: dict[str, Any] | None = None) -> None:
        """Say how the run ended; launchers turn a rank's exit code into 1, this file keeps the true one.

        Args:
            code: the exit code.
            reason: why, in words; secrets in it, as an error of a library may hold them, are masked.
            step: the last optimizer step made.
            facts: what a finished run reports.
        """
        ended = {"exit_code": code, "reason": mask_text(reason), "step": step, "ended": now()}
        write_json(self.exit, {**ended, "facts": facts} if facts else ended)

    def is_running(self) -> bool:
        """Whether the run lives that stands here; of one on another machine that takes a while to see."""
        return not self.exit.exists() and lives(self.root, read_json(self.record))

    def newest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and why newer ones were passed over."""
        passed_over: list[str] = []
        for path in self.newest_first():
            if not (faults := _faults_of(path)):
                return path, passed_over
            passed_over.append(f"{path.name}: {'; '.join(faults[:3])}")
        return None, passed_over

    def newest_first(self) -> list[Path]:
        """Every checkpoint, whole or not, the one of the latest step first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if path.is_dir() and _CHECKPOINT.match(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def rotate(self, keep: int, known: set[Path]) -> None:
        """Remove what is older than the newest `keep` checkpoints that are whole, but for the best of the whole ones.

        Raises:
            DiskError: one could not be removed.

        Args:
            keep: how many.
            known: those that are known to be whole; the others are verified, and added.
        """
        found = self.newest_first()
        with disk_errors(self.checkpoints):
            known.update(path for path in found if path not in known and not _faults_of(path))
            whole = [path for path in found if path in known]
            if len(whole) < keep:  # one that cannot be read may be so for a moment only
                return
            losses = {path: read_json(path / MANIFEST).get("validation_loss") for path in whole}
            measured = [(loss, path) for path, loss in losses.items() if isinstance(loss, float)]
            best = min(measured)[1] if measured else None
            for path in found[found.index(whole[keep - 1]) + 1 :]:
                if path != best:
                    remove_folder(path)
                    known.discard(path)

    def set_aside(self, step: int) -> list[str]:
        """Give checkpoints of later steps another name, under which nothing reads or removes them: the run goes on from
        `step`, since they are not whole, and will come to those steps again. Gives a line for each."""
        told = []
        for path in self.newest_first():
            if _step_of(path) > step:
                names = (path.with_name(f"{path.name}.aside{number or ''}") for number in itertools.count())
                aside = next(name for name in names if not name.exists())
                with disk_errors(path):
                    path.rename(aside)
                told.append(f"{path.name} is called {aside.name} now; remove it if nothing in it is needed")
        return told

    def clean_checkpoints(self) -> None:
        """Remove what a write left that was cut short."""
        for path in self.checkpoints.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def _clean_products(self) -> None:
        """Remove what an earlier start left of a product that it was writing when it was killed."""
        for name in (self.adapter.name, self.model.name):
            for path in self.root.glob(f".{name}.*.tmp"):
                shutil.rmtree(path, ignore_errors=True)

    def cut_metrics(self, step: int) -> None:
        """Drop metrics of steps after `step`: a resumed run walks them again."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the half line of a killed writer
        write_text(self.metrics, "".join(f"{line}\n" for line in kept))


def _faults_of(checkpoint: Path) -> list[str]:
    """Why a run cannot go on from a checkpoint; empty when it can."""
    faults = manifest_faults(checkpoint, sealed=True)
    if not faults and (found := read_json(checkpoint / MANIFEST).get("format", FORMAT)) != FORMAT:
        return [f"it has format {found}, and this version reads {FORMAT}"]
    return faults


def _step_of(path: Path) -> int:
    match = _CHECKPOINT.match(path.name)
    assert match is not None, f"{path} is not a checkpoint"
    return int(match.group(1))


def claim(
    root: Path,
    recipe_hash: str,
    overwrite: bool,
    needed: Sequence[Path] = (),
    other_recipe: Callable[[RunFolder], None] | None = None,
) -> tuple[RunFolder, bool]:
    """Choose a folder for a run, or take up the run that stands there. Nothing is written or removed yet.

    Args:
        root: the recipe's output_dir.
        recipe_hash: hash of the resolved recipe.
        overwrite: a run that stands there may be replaced.
        needed: files and folders that must outlive a replacement: the base, the data, the recipe.
        other_recipe: called with an unfinished run of another recipe, which is continued unless this raises.

    Returns:
        The folder, and whether an unfinished run of the same recipe is continued.

    Raises:
        RefusedError: the folder holds another run, a finished run, a run that goes on, or files that are no run's.
    """
    folder = RunFolder(root)
    if not (above := existing_parent(root)).is_dir():
        raise RefusedError(f"output_dir: {root}: {above} is a file; choose a folder")
    with disk_errors(root):
        _can_be_made(root)
        empty = stacks.are_all(root)  # or the empty folders of a start cut short
    if empty:
        return folder, False
    if not folder.is_run():
        raise RefusedError(f"output_dir: {root} holds files that are no run's; choose an empty or new folder")
    if folder.is_running():
        by = read_json(folder.record)
        raise RefusedError(
            f"output_dir: a run is still going on in {root} (process {by.get('pid')} on {by.get('host')}); wait "
            "for it, stop it, or choose another folder"
        )
    if overwrite:
        _refuse_loss(folder, needed)
        return folder, False
    other = read_json(folder.record).get("recipe_hash") != recipe_hash
    if folder.product is not None and not other:
        raise RefusedError(
            f"output_dir: the run in {root} is finished; use its {folder.product.name}/, choose another output_dir, "
            "or pass --overwrite to train again"
        )
    if other and (other_recipe is None or folder.product is not None):
        raise RefusedError(
            f"output_dir: {root} holds a run of another recipe; choose another output_dir, or pass --overwrite to "
            "remove that run"
        )
    if other and other_recipe is not None:
        other_recipe(folder)
    return folder, True


def _can_be_made(root: Path) -> None:
    """Make the folder and remove it again, as far as it does not exist."""
    missing = [path for path in (root, *root.absolute().parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise RefusedError(f"output_dir: {root} cannot be made; choose another folder") from error
    for path in missing:
        with contextlib.suppress(OSError):
            path.rmdir()


def _refuse_loss(folder: RunFolder, needed: Sequence[Path]) -> None:
    """Replacing a run must not take anything else with it."""
    root = folder.root.resolve()
    inside = sorted({str(path) for path in needed if root in (path.resolve(), *path.resolve().parents)})
    if inside:
        raise RefusedError(
            f"output_dir: {folder.root} is to be replaced, and holds what this run needs: {', '.join(inside)}; choose "
            "another output_dir"
        )
    if foreign := folder.foreign():
        shown = ", ".join(foreign[:5]) + (" …" if len(foreign) > 5 else "")
        raise RefusedError(
            f"output_dir: {folder.root} is to be replaced, and holds what no run writes: {shown}; move that away, or "
            "choose another output_dir"
        )
