"""Who may write into a run folder, which checkpoint is the newest whole one, and what a resumed run keeps."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import DiskError, RefusedError
from finetune.files import staged_folder
from finetune.run.folder import RunFolder, claim, now, read_json


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has begun."""
    folder = RunFolder(tmp_path / "run")
    folder.begin("model: x\n", {"recipe_hash": "abc"}, [[1, 2]], None)
    return folder


def checkpoint(folder: RunFolder, step: int) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    with staged_folder(path, {"step": step}) as staging:
        (staging / "weights").write_bytes(bytes(range(50)))
        (staging / "optimizer").mkdir()
        (staging / "optimizer" / "state").write_text(str(step))
    return path


# -- claim ---------------------------------------------------------------------------------------------------------


def _empty_folders(root: Path) -> None:
    (root / "checkpoints").mkdir(parents=True)


@pytest.mark.parametrize("make", [lambda root: None, Path.mkdir, _empty_folders])
def test_a_new_or_empty_folder_is_taken_and_left_alone(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    root = tmp_path / "run"
    make(root)
    before = root.exists()
    assert claim(root, "abc", overwrite=False) == (RunFolder(root), False)
    assert root.exists() is before


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_no_run_are_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RefusedError, match="holds files that are no run's; choose an empty or new folder"):
        claim(tmp_path, "abc", overwrite)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_file_is_no_folder(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedError, match="is a file; choose a folder"):
        claim(tmp_path / "file" / below, "abc", overwrite=True)


def test_an_unfinished_run_of_the_same_recipe_is_continued(run: RunFolder) -> None:
    assert claim(run.root, "abc", overwrite=False) == (run, True)
    assert claim(run.root, "abc", overwrite=True) == (run, False)


def test_a_run_of_another_recipe_is_refused_unless_overwritten(run: RunFolder) -> None:
    run.record.write_text('{"recipe_hash": "other"}')
    with pytest.raises(RefusedError, match=r"holds a run of another recipe; .* --overwrite"):
        claim(run.root, "abc", overwrite=False)
    assert claim(run.root, "abc", overwrite=True) == (run, False)


@pytest.mark.parametrize("product", ["adapter", "model"])
def test_a_finished_run_is_refused_unless_overwritten(run: RunFolder, product: str) -> None:
    (run.root / product).mkdir()
    with pytest.raises(RefusedError, match=rf"is finished; use its {product}/"):
        claim(run.root, "abc", overwrite=False)
    assert claim(run.root, "abc", overwrite=True) == (run, False)


@pytest.fixture
def alive() -> Iterator[int]:
    """The number of a living process of this toolkit."""
    words = [sys.executable, "-c", "import time; time.sleep(60)", "finetune"]
    process = subprocess.Popen(words)
    yield process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_goes_on_is_left_alone(run: RunFolder, alive: int, overwrite: bool) -> None:
    run.record.write_text(json.dumps({"recipe_hash": "abc", "pid": alive, "host": socket.gethostname()}))
    with pytest.raises(RefusedError, match="a run is still going on"):
        claim(run.root, "abc", overwrite)


@pytest.mark.parametrize(
    "record",
    [
        {"pid": os.getpid()},
        {"pid": 2**22 + 5},
        {"pid": 0},
        {"pid": "7"},
        {"pid": None},
    ],
)
def test_a_process_that_is_gone_or_elsewhere_or_not_ours_holds_nothing(
    run: RunFolder, alive: int, record: dict[str, Any]
) -> None:
    facts = {"recipe_hash": "abc", "pid": alive, "host": socket.gethostname(), **record}
    run.record.write_text(json.dumps(facts))
    assert claim(run.root, "abc", overwrite=False) == (run, True)


def test_a_number_that_another_program_has_by_now_holds_nothing(run: RunFolder) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        run.record.write_text(json.dumps({"recipe_hash": "abc", "pid": other.pid, "host": socket.gethostname()}))
        assert claim(run.root, "abc", overwrite=False) == (run, True)
    finally:
        other.kill()
        other.wait()


def test_a_run_that_has_ended_holds_nothing(run: RunFolder, alive: int) -> None:
    run.record.write_text(json.dumps({"recipe_hash": "abc", "pid": alive, "host": socket.gethostname()}))
    run.write_exit(75, "stopped", 3)
    assert claim(run.root, "abc", overwrite=False) == (run, True)


# -- begin ---------------------------------------------------------------------------------------------------------


def test_a_new_run_has_its_first_files(run: RunFolder) -> None:
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoints", "probe.json", "recipe.yaml", "run.json"]
    assert read_json(run.record) == {"recipe_hash": "abc"}
    assert json.loads(run.probe.read_text()) == [[1, 2]]
    assert run.recipe.read_text() == "model: x\n"
    assert run.product is None


@pytest.mark.parametrize("linked", [False, True])
def test_a_new_run_removes_all_of_an_old_one_behind_a_link_too(run: RunFolder, tmp_path: Path, linked: bool) -> None:
    checkpoint(run, 7)
    (run.root / "adapter").mkdir()
    run.metrics.write_text('{"step": 1}\n')
    run.write_exit(0, "finished", 7)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (run.root / "merged").symlink_to(tmp_path / "elsewhere")
    folder = run
    if linked:
        (tmp_path / "way").symlink_to(run.root)
        folder = RunFolder(tmp_path / "way")
    folder.begin("model: y\n", {"recipe_hash": "new"}, [], None)
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoints", "probe.json", "recipe.yaml", "run.json"]
    assert list(run.checkpoints.iterdir()) == []
    assert (tmp_path / "elsewhere" / "kept").exists()
    assert (tmp_path / "way").is_symlink() is linked


def test_what_is_left_of_a_product_whose_writer_was_killed_goes_when_the_run_goes_on(run: RunFolder) -> None:
    for name in (".adapter.x1.tmp", ".model.x1.tmp"):
        (run.root / name).mkdir()
        (run.root / name / "adapter_model.safetensors").write_text("half")
    run.begin("model: x\n", {"recipe_hash": "abc"}, [], 2)
    assert [path.name for path in run.root.iterdir() if path.name.endswith(".tmp")] == []


def test_a_continued_run_keeps_checkpoints_and_metrics_up_to_its_step(run: RunFolder) -> None:
    kept = checkpoint(run, 2)
    run.metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    run.write_exit(75, "stopped", 2)
    run.begin("model: x\n", {"recipe_hash": "abc"}, [], 2)
    assert kept.is_dir()
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not run.exit.exists()


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="a file stands where a folder is needed"):
        RunFolder(tmp_path / "file" / "run").begin("", {}, [], None)


def test_a_start_cut_short_can_be_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finetune.run.folder as module

    folder = RunFolder(tmp_path / "run")

    def fail(path: Path, content: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        folder.begin("model: x\n", {"recipe_hash": "abc"}, [], None)
    assert claim(folder.root, "abc", overwrite=False) == (folder, True)


def test_the_end_is_told(run: RunFolder) -> None:
    run.write_exit(76, "loss nan", 4)
    assert read_json(run.exit) == {
        "exit_code": 76,
        "reason": "loss nan",
        "step": 4,
        "ended": read_json(run.exit)["ended"],
    }
    run.write_exit(0, "finished", 9, {"final_loss": 1.5})
    assert read_json(run.exit)["facts"] == {"final_loss": 1.5}
    assert now().endswith("+00:00")


def test_a_secret_in_the_text_of_an_error_is_in_no_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "Zq100s3cr3tV4lueOf")
    run.write_exit(1, "RuntimeError: 401 for https://me:Zq100s3cr3tV4lueOf@host", 3)
    assert read_json(run.exit)["reason"] == "RuntimeError: 401 for https://me:***@host"


@pytest.mark.parametrize("content", [None, "", "[1]", "{", "\udcff"])
def test_broken_json_reads_as_nothing(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    assert read_json(path) == {}


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_newest_is_by_step_not_by_name(run: RunFolder) -> None:
    assert run.newest_checkpoint() == (None, [])
    for step in (9, 10, 100, 20):
        checkpoint(run, step)
    (run.checkpoints / "checkpoint-x").mkdir()
    (run.checkpoints / ".staging").mkdir()
    (run.checkpoints / "checkpoint-999").touch()
    assert run.newest_checkpoint() == (run.checkpoints / "checkpoint-100", [])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


BREAKS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: _flip(path / "weights"), "weights differs from its hash"),
    (lambda path: (path / "weights").unlink(), "weights is missing"),
    (lambda path: (path / "more").touch(), "more is not in the manifest"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
    (lambda path: shutil.rmtree(path / "optimizer"), "optimizer/state is missing"),
]


@pytest.mark.parametrize(("damage", "said"), BREAKS)
def test_a_broken_checkpoint_is_passed_over_and_said_why(
    run: RunFolder, damage: Callable[[Path], Any], said: str
) -> None:
    whole = checkpoint(run, 5)
    damage(checkpoint(run, 8))
    assert run.newest_checkpoint() == (whole, [f"checkpoint-8: {said}"])
    damage(whole)
    assert run.newest_checkpoint() == (None, [f"checkpoint-8: {said}", f"checkpoint-5: {said}"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.dictionaries(st.integers(0, 200), st.sampled_from([None, 0.5, 1.5, 2.5]), max_size=6),
    torn=st.integers(0, 200),
    keep=st.integers(1, 4),
)
def test_rotation_keeps_the_newest_whole_ones_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, steps: dict[int, float | None], torn: int, keep: int
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for step, loss in steps.items():
        with staged_folder(folder.checkpoints / f"checkpoint-{step}", {"validation_loss": loss}) as staging:
            (staging / "weights").write_text("x")
    if torn in steps:
        (folder.checkpoints / f"checkpoint-{torn}" / "weights").write_text("y")
    folder.rotate(keep, set())
    left = {int(path.name.split("-")[1]) for path in folder.newest_first()}
    whole = steps.keys() - {torn}
    best = sorted((loss, step) for step in whole if (loss := steps[step]) is not None)[:1]
    newest = set(sorted(whole)[-keep:])
    if len(newest) < keep:
        assert left == steps.keys()  # what cannot be read may be so for a moment only
        return
    newer = {step for step in steps if step >= min(newest)}
    assert newer <= left <= newer | whole
    assert len(left - newer) <= 1
    assert not best or best[0][0] in [steps[step] for step in left]


def test_a_checkpoint_of_another_version_does_not_count_as_whole(run: RunFolder) -> None:
    """What is passed over must not be taken for the newest when older ones are removed."""
    for step in (2, 4):
        checkpoint(run, step)
    with staged_folder(run.checkpoints / "checkpoint-8", {"step": 8, "format": 3}):
        pass
    written = checkpoint(run, 6)
    run.rotate(1, {written})
    assert [path.name for path in run.newest_first()] == ["checkpoint-8", "checkpoint-6"]
    assert run.newest_checkpoint()[0] == written


def test_what_a_run_does_not_go_on_from_is_set_aside_and_not_replaced(run: RunFolder) -> None:
    for _ in range(2):
        (checkpoint(run, 8) / "notes.txt").write_text("mine")
        assert len(run.set_aside(6)) == 1
    checkpoint(run, 6)
    assert run.set_aside(6) == []
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "checkpoint-6", "checkpoint-8.aside", "checkpoint-8.aside1",
    ]  # fmt: skip
    assert (run.checkpoints / "checkpoint-8.aside" / "notes.txt").read_text() == "mine"


def test_what_a_crash_left_among_the_checkpoints_goes_at_the_next_start(run: RunFolder) -> None:
    kept = checkpoint(run, 2)
    for name in (".checkpoint-4.tmp", ".checkpoint-1.old.tmp", ".staging.tmp"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "half").touch()
    run.begin("model: x\n", {"recipe_hash": "abc"}, [], 2)
    assert list(run.checkpoints.iterdir()) == [kept]


# -- metrics -------------------------------------------------------------------------------------------------------


def test_the_half_line_of_a_killed_writer_is_dropped(run: RunFolder) -> None:
    run.cut_metrics(5)
    assert not run.metrics.exists()
    lines = ['{"step": 1, "loss": null}', '{"step": 2}', "garbage", "[]", '{"no": 1}', '{"step": null}', '{"step": 9}']
    run.metrics.write_bytes("\n".join([*lines, '{"step": 3, "lo']).encode() + b"\xff\x00")
    run.cut_metrics(5)
    assert run.metrics.read_text() == '{"step": 1, "loss": null}\n{"step": 2}\n'


# -- replacing ----------------------------------------------------------------------------------------------------


def test_replacing_a_run_takes_nothing_else(run: RunFolder) -> None:
    root = run.root
    (root / "notes.md").write_text("mine")
    with pytest.raises(RefusedError, match=r"holds what no run writes: notes\.md"):
        claim(root, "h", overwrite=True)
    (root / "notes.md").unlink()
    assert claim(root, "h", overwrite=True) == (run, False)


def test_replacing_a_run_refuses_when_the_new_one_needs_what_is_inside(run: RunFolder) -> None:
    root = run.root
    base = root / "model"
    base.mkdir()
    with pytest.raises(RefusedError, match=r"holds what this run needs: .*model"):
        claim(root, "h", overwrite=True, needed=[base])


def test_a_record_of_something_else_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "theirs"}')
    for overwrite in (False, True):
        with pytest.raises(RefusedError, match="files that are no run's"):
            claim(tmp_path, "h", overwrite)
    assert (tmp_path / "run.json").exists()


def test_only_one_process_decides_about_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    script = (
        "import sys; from pathlib import Path; from finetune.run.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claimed_alone(): print('in', flush=True)"
    )
    with folder.claimed_alone():
        other = subprocess.Popen([sys.executable, "-c", script, str(folder.root)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=2)
    assert other.communicate(timeout=20)[0] == "in\n"


def test_deciding_about_a_folder_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with RunFolder(tmp_path / "run").claimed_alone():
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
