"""A run whose checkpoints will not fit is refused; one that would fit undisturbed never is, also when it goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from finetune.errors import DiskError
from finetune.files import staged_folder
from finetune.run import space
from finetune.run.folder import RunFolder
from finetune.run.space import most_checkpoints, need_room, need_space, size_of

TRAINED = 2**18  # parameters; a checkpoint of as many takes 3 MiB


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has begun."""
    folder = RunFolder(tmp_path / "run")
    folder.begin("model: x\n", {"recipe_hash": "abc"}, [[1, 2]], None)
    return folder


def checkpoint(folder: RunFolder, step: int) -> None:
    with staged_folder(folder.checkpoints / f"checkpoint-{step}", {"step": step}) as staging:
        (staging / "weights").write_bytes(os.urandom(12 * TRAINED))


def free(monkeypatch: pytest.MonkeyPatch, mebibytes: float) -> None:
    """What the disk says that it has."""
    usage = shutil.disk_usage("/")._replace(free=int(mebibytes * 2**20))
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage)


def test_a_run_that_will_not_fit_is_refused_before_it_starts(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    new = RunFolder(run.root / "not" / "yet" / "there")
    need_space(new, 1000, 3, goes=True)
    with pytest.raises(DiskError, match=r"output_dir: .* needs [\d,]+ MiB for 3 checkpoints") as caught:
        need_space(new, 10**15, 3, goes=True)
    assert caught.value.exit_code == 74
    free(monkeypatch, 9.1)
    need_space(new, TRAINED, 3, goes=True)
    with pytest.raises(DiskError, match="needs 12 MiB for 4 checkpoints, and the disk has 9 MiB free"):
        need_space(new, TRAINED, 4, goes=True)


def test_what_stands_already_needs_no_room_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        checkpoint(run, step)
    free(monkeypatch, 3.1)
    need_space(run, TRAINED, 3, goes=False)
    need_space(run, TRAINED, 3, goes=True)  # both are removed first
    with pytest.raises(DiskError, match="needs 6 MiB more for 4 checkpoints"):
        need_space(run, TRAINED, 4, goes=False)
    free(monkeypatch, 2.5)
    with pytest.raises(DiskError, match="needs 3 MiB more for 2 checkpoints"):  # the next is written beside both
        need_space(run, TRAINED, 2, goes=False)
    assert size_of(run.checkpoints) >= 2 * 12 * TRAINED


def test_the_best_checkpoint_stands_beside_the_newest_and_the_one_being_written() -> None:
    assert most_checkpoints(2, validated=False) == 3
    assert most_checkpoints(1, validated=True) == 3


def test_a_run_that_goes_on_needs_room_for_one_more_at_least_and_for_no_save_that_is_not_ahead(run: RunFolder) -> None:
    for step in (2, 4):
        checkpoint(run, step)
    need_room(run, 1000, 3, 10)
    for most, saves, more in ((1, 10, 1), (5, 10, 3), (5, 2, 2), (5, 0, 1)):
        with pytest.raises(DiskError, match=rf"MiB for {more} more, and the disk"):
            need_room(run, 10**15, most, saves)
