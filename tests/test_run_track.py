"""Trackers mirror metrics.jsonl from processes of their own: whatever they do, the run is not stopped or delayed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.recipe.sections import TrackingOptions
from finetune.run.track import TrackerOutcome, Trackers, check_trackers

BOX = '''
import json, os, time
from pathlib import Path


class Keeps:
    """Writes down all it is told."""

    def start(self, run_folder, project, run_name, mode):
        self.path = Path(run_folder) / "kept.jsonl"
        self.put(["start", str(run_folder), project, run_name, mode])

    def put(self, value):
        with open(self.path, "a") as stream:
            stream.write(json.dumps(value) + "\\n")

    def log(self, metrics, step):
        self.put([step, metrics])

    def finish(self):
        self.put("finish")


class RaisesAtStart(Keeps):
    def start(self, *words):
        raise OSError("no server at start, key " + os.environ.get("BOX_API_KEY", ""))


class RaisesAtLog(Keeps):
    def log(self, metrics, step):
        super().log(metrics, step)
        if step == 3:
            raise ValueError("refused step 3")


class HangsAtStart(Keeps):
    def start(self, *words):
        time.sleep(600)


class HangsAtLog(Keeps):
    def log(self, metrics, step):
        if step == 3:
            time.sleep(600)


class HangsAtFinish(Keeps):
    def finish(self):
        time.sleep(600)


class Dies(Keeps):
    def log(self, metrics, step):
        if step == 3:
            os.kill(os.getpid(), 9)


class Prints(Keeps):
    def log(self, metrics, step):
        print("the key is", os.environ["BOX_API_KEY"], flush=True)
'''


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with trackers of a user's own, importable here and so in the sidecars."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "trackerbox.py").write_text(BOX)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(
        "model: {name_or_path: base}\n"
        "training: {learning_rate: 0.001, extra: {hub_token: hf_abcdefghijklmnopqrstuvw}}\n"
    )
    return path


def write_steps(folder: Path, steps: range) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as stream:
        for step in steps:
            stream.write(json.dumps({"step": step, "time": 1.7e9 + step, "loss": 2.0 / step, "note": "text"}) + "\n")


def mirror(folder: Path, *names: str, steps: int = 5, deadline: float = 30.0, **more: str) -> list[TrackerOutcome]:
    """A run in small: start the trackers, write the steps, finish."""
    trackers = Trackers.start(TrackingOptions(trackers=names, **more), folder)
    write_steps(folder, range(1, steps + 1))
    return trackers.finish(deadline)


def kept(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]


def test_no_trackers_leave_no_trace(folder: Path) -> None:
    trackers = Trackers.start(TrackingOptions(), folder)
    assert trackers.finish() == []
    assert not (folder / "tracking").exists()


def test_every_line_arrives_in_order(box: None, folder: Path) -> None:
    (outcome,) = mirror(folder, "trackerbox:Keeps", steps=200, project="tickets", run_name="first")
    assert outcome == TrackerOutcome("trackerbox:Keeps", True, 200, 200, "")
    assert str(outcome) == "tracker trackerbox:Keeps: all 200 lines mirrored"
    lines = kept(folder)
    assert lines[0] == ["start", str(folder), "tickets", "first", "offline"]
    assert [line[0] for line in lines[1:-1]] == list(range(1, 201))
    assert lines[1][1] == {"time": 1.7e9 + 1, "loss": 2.0, "note": "text"}
    assert lines[-1] == "finish"


def test_lines_arrive_while_the_run_goes_on_and_half_a_line_waits(box: None, folder: Path) -> None:
    trackers = Trackers.start(TrackingOptions(trackers=("trackerbox:Keeps",)), folder)
    write_steps(folder, range(1, 3))
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 3, "lo')
        stream.flush()
        until(lambda: (folder / "kept.jsonl").exists() and len(kept(folder)) == 3)
        stream.write('ss": 0.5}\n')
    until(lambda: len(kept(folder)) == 4)
    assert kept(folder)[3] == [3, {"loss": 0.5}]
    assert trackers.finish()[0].ok


def test_a_run_that_goes_on_is_mirrored_from_where_it_was(box: None, folder: Path) -> None:
    assert mirror(folder, "trackerbox:Keeps", steps=3)[0].lines_sent == 3
    trackers = Trackers.start(TrackingOptions(trackers=("trackerbox:Keeps",)), folder)
    write_steps(folder, range(4, 6))
    assert trackers.finish() == [TrackerOutcome("trackerbox:Keeps", True, 5, 5, "")]
    assert [line[0] for line in kept(folder) if isinstance(line, list) and line[0] != "start"] == [1, 2, 3, 4, 5]


def test_steps_that_are_walked_again_are_sent_again_however_late_the_sidecar_is(box: None, folder: Path) -> None:
    assert mirror(folder, "trackerbox:Keeps", steps=5)[0].lines_sent == 5
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))  # continued from step 3
    trackers = Trackers.start(TrackingOptions(trackers=("trackerbox:Keeps",)), folder)
    write_steps(folder, range(4, 7))  # long before the sidecar's Python is up
    assert trackers.finish() == [TrackerOutcome("trackerbox:Keeps", True, 6, 6, "")]
    lines = [line[0] for line in kept(folder) if isinstance(line, list) and line[0] != "start"]
    assert lines == [1, 2, 3, 4, 5, 4, 5, 6]


def test_a_line_that_is_not_json_is_passed_by_and_told(box: None, folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\nnonsense\n{"step": 2, "loss": NaN}\n')
    (outcome,) = Trackers.start(TrackingOptions(trackers=("trackerbox:Keeps",)), folder).finish()
    assert outcome.ok
    assert [line[0] for line in kept(folder)[1:-1]] == [1, 2]
    assert "line 2 of metrics.jsonl is not a JSON object" in (folder / "tracking/trackerbox-Keeps.log").read_text()


@pytest.mark.parametrize(
    ("name", "sent", "reason"),
    [
        ("RaisesAtStart", 0, "it failed in start: OSError: no server at start, key \\*\\*\\*"),
        ("RaisesAtLog", 2, "it failed in log: ValueError: refused step 3"),
        ("Dies", 2, "its process ended with signal 9, in log"),
        ("Missing", 0, "it failed in start: RecipeError: .*cannot import 'trackerbox:Missing': .*"),
    ],
)
def test_a_tracker_that_fails_is_counted_and_told(
    box: None, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, sent: int, reason: str
) -> None:
    monkeypatch.setenv("BOX_API_KEY", "very-secret-value")
    trackers = Trackers.start(TrackingOptions(trackers=(f"trackerbox:{name}", "trackerbox:Keeps")), folder)
    write_steps(folder, range(1, 3))
    if name == "Dies":
        time.sleep(2.5)  # its state is saved once a second while it changes
    write_steps(folder, range(3, 6))
    broken, whole = trackers.finish(20)
    assert (broken.ok, broken.lines_sent, broken.lines_total) == (False, sent, 5)
    assert re.fullmatch(reason, broken.reason), broken.reason
    assert str(broken).endswith("(metrics.jsonl is complete)")
    assert whole.ok
    log = (folder / "tracking" / f"trackerbox-{name}.log").read_text()
    assert "very-secret-value" not in log
    assert ("Traceback" in log) == (name != "Dies")


@pytest.mark.parametrize(
    ("name", "stage", "sent"), [("HangsAtStart", "start", 0), ("HangsAtLog", "log", 2), ("HangsAtFinish", "finish", 5)]
)
def test_a_tracker_that_hangs_is_killed_at_the_deadline(
    box: None, folder: Path, name: str, stage: str, sent: int
) -> None:
    began = time.monotonic()
    trackers = Trackers.start(TrackingOptions(trackers=(f"trackerbox:{name}",)), folder)
    assert time.monotonic() - began < 1.0
    pid = trackers._sidecars[0].process.pid
    write_steps(folder, range(1, 6))
    began = time.monotonic()
    (outcome,) = trackers.finish(deadline=2.0)
    assert 1.9 < time.monotonic() - began < 4.0
    assert outcome == TrackerOutcome(f"trackerbox:{name}", False, sent, 5, f"killed after 2 s, hanging in {stage}")
    assert not lives(pid)
    assert trackers.finish() == [outcome]


def test_the_deadline_is_for_all_trackers_together(box: None, folder: Path) -> None:
    names = ("trackerbox:HangsAtStart", "trackerbox:HangsAtLog", "trackerbox:HangsAtFinish")
    began = time.monotonic()
    assert [outcome.ok for outcome in mirror(folder, *names, deadline=1.0)] == [False] * 3
    assert time.monotonic() - began < 4.0


def test_a_secret_that_a_tracker_prints_does_not_stay_in_its_log(
    box: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOX_API_KEY", "very-secret-value")
    assert mirror(folder, "trackerbox:Prints")[0].ok
    log = (folder / "tracking" / "trackerbox-Prints.log").read_text()
    assert log.count("the key is ***") == 5
    assert "very-secret-value" not in log


def test_a_sidecar_ends_after_the_run_was_killed_and_mirrors_what_there_is(box: None, folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from finetune.run.track import Trackers; "
        "from finetune.recipe.sections import TrackingOptions; "
        "t = Trackers.start(TrackingOptions(trackers=('trackerbox:Keeps',)), Path(sys.argv[1])); "
        "print(t._sidecars[0].process.pid, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    assert lives(pid)
    write_steps(folder, range(1, 4))
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    until(lambda: not lives(pid))
    assert kept(folder)[-1] == "finish"
    assert [line[0] for line in kept(folder)[1:-1]] == [1, 2, 3]
    assert json.loads((folder / "tracking/trackerbox-Keeps.json").read_text())["lines_sent"] == 3


def test_a_sidecar_that_hangs_after_the_run_was_killed_ends_itself(box: None, folder: Path) -> None:
    program = (
        "import sys; from finetune.run import sidecar; sidecar._ORPHAN_GRACE = 0.5; "
        "sidecar._main(['--tracker', 'trackerbox:HangsAtStart', '--run', sys.argv[1], '--project', 'p', "
        "'--run-name', 'n', '--parent', '1234567890'])"  # no process has this id, so the run is dead already
    )
    (folder / "tracking").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(words, env=environment, start_new_session=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    state = json.loads((folder / "tracking/trackerbox-HangsAtStart.json").read_text())
    assert state == {"stage": "start", "lines_sent": 0, "error": "the run died, and it hung in start"}


def test_tensorboard_gets_every_number(folder: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (outcome,) = mirror(folder, "tensorboard")
    assert outcome == TrackerOutcome("tensorboard", True, 5, 5, "")
    events = reading.EventAccumulator(str(folder / "tracking" / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    points = events.Scalars("loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    assert [point.value for point in points] == pytest.approx([2.0 / step for step in range(1, 6)])
    assert points[0].wall_time == 1.7e9 + 1


def test_wandb_works_offline_without_key_or_network(
    folder: Path, refused: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")
    (outcome,) = mirror(folder, "wandb", project="tickets", run_name="first")
    assert outcome == TrackerOutcome("wandb", True, 5, 5, ""), (folder / "tracking/wandb.log").read_text()
    (journal,) = (folder / "tracking").glob("wandb/offline-run-*/*.wandb")
    losses, config = [], {}
    for data in journal_records(journal):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
        if "loss" in items:
            losses.append((int(items["_step"]), float(items["loss"])))
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("tickets", "first")
            config.update(
                {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.run.config.update}
            )
    assert losses == [(step, pytest.approx(2.0 / step)) for step in range(1, 6)]
    assert config["training"] == {"learning_rate": 0.001, "extra": {"hub_token": "***"}}
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"):
        assert b"hf_abcdefghijklm" not in path.read_bytes(), path
        assert b"very-secret-value" not in path.read_bytes(), path
    assert refused() == []


def test_wandb_without_its_server_is_cut_off_and_leaves_no_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        trackers = Trackers.start(TrackingOptions(trackers=("wandb",), mode="online"), folder)
        silent.settimeout(30)
        silent.accept()[0].close()
        write_steps(folder, range(1, 6))
        (outcome,) = trackers.finish(deadline=1.0)
    assert outcome == TrackerOutcome("wandb", False, 0, 5, "killed after 1 s, hanging in start")
    service = str(trackers._sidecars[0].process.pid)
    until(lambda: not [words for words in command_lines() if service in words])


def command_lines() -> list[list[str]]:
    """The words of every process of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace").split("\0"))
    assert len(found) >= 2
    return found


def test_trackio_keeps_every_number_on_this_machine(
    folder: Path, tmp_path: Path, refused: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    (outcome,) = mirror(folder, "trackio", project="tickets", run_name="first")
    assert outcome == TrackerOutcome("trackio", True, 5, 5, ""), (folder / "tracking/trackio.log").read_text()
    program = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps([[row['step'], row['loss']] for row in S.get_logs('tickets', 'first')]))"
    )
    read = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(read.stdout.splitlines()[-1]) == [[step, 2.0 / step] for step in range(1, 6)]
    assert refused() == []


def test_trackers_that_cannot_start_are_told_before_the_run(box: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_trackers(TrackingOptions(trackers=("trackerbox:Keeps",))) == []
    assert check_trackers(TrackingOptions()) == []
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    names = ("wandb", "tensorbord", "trackerbox:Keeps", "trackerbox:Keeps", "nowhere.at:All", "trackerbox")
    faults = check_trackers(TrackingOptions(trackers=names))
    assert len(faults) == 5
    assert "python -m pip install wandb" in faults[0]
    assert "did you mean 'tensorboard'?" in faults[1]
    assert "named more than once" in faults[2]
    assert "no module 'nowhere.at'" in faults[3]
    assert "package.module:attribute" in faults[4]


def journal_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log after a header of 7 bytes, in blocks of 32 KiB."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield whole
            whole = b""


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
