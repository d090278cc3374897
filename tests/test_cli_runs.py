"""`finetune runs` tells how each run stands, from whatever its folder still holds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.cli.runs import list_runs
from finetune.errors import RecipeError

RUN = {"created": "2026-11-22T10:00:00+00:00", "base": {"name": "smollm2"}, "method": "sft", "world_size": 1}


def make(folder: Path, run: object = RUN, ended: object = None, metrics: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run if isinstance(run, str) else json.dumps(run))
    if ended is not None:
        (folder / "exit.json").write_text(ended if isinstance(ended, str) else json.dumps(ended))
    if metrics is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def ending(code: int, step: int = 3) -> dict:
    return {"exit_code": code, "reason": "as it was", "step": step, "ended": "2026-11-22T10:05:00+00:00"}


def test_a_finished_run_in_full(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 0.5}, {"step": 3, "eval_loss": 0.75}]
    make(tmp_path / "tickets" / "first", ended=ending(0), metrics=lines)
    (run,) = list_runs(tmp_path)
    assert run.name == "tickets/first"
    assert (run.state, run.exit_code, run.reason) == ("finished", 0, "as it was")
    assert (run.base, run.method, run.step, run.loss, run.eval_loss) == ("smollm2", "sft", 3, 0.5, 0.75)
    assert (run.started, run.ended) == (RUN["created"], "2026-11-22T10:05:00+00:00")
    assert run.faults == []


@pytest.mark.parametrize(
    ("code", "state"), [(0, "finished"), (75, "stopped"), (1, "failed"), (5, "failed"), (76, "failed"), (77, "failed")]
)
def test_exit_codes_become_states(tmp_path: Path, code: int, state: str) -> None:
    make(tmp_path / "run", ended=ending(code))
    assert [(run.state, run.exit_code) for run in list_runs(tmp_path)] == [(state, code)]


def test_a_run_without_an_end_is_running_only_while_its_process_lives(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    make(tmp_path / "mine", {**RUN, "pid": process.pid, "host": socket.gethostname()})
    make(tmp_path / "elsewhere", {**RUN, "pid": process.pid, "host": "another-machine"})
    make(tmp_path / "unknown")
    assert {run.name: run.state for run in list_runs(tmp_path)} == {
        "mine": "running", "elsewhere": "unfinished", "unknown": "unfinished"}  # fmt: skip
    process.communicate(b"\n")
    assert {run.state for run in list_runs(tmp_path)} == {"unfinished"}


def test_step_and_loss_of_a_run_that_goes_on_come_from_the_metrics(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", metrics=[{"step": step, "loss": 9.0 / step} for step in range(1, 4000)])
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4000, "lo')  # being written
    (run,) = list_runs(tmp_path)
    assert (run.step, run.loss, run.faults) == (3999, 9.0 / 3999, [])


def test_broken_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    make(tmp_path / "a", run="{nonsense", ended=ending(0))
    make(tmp_path / "b", ended="[]")
    folder = make(tmp_path / "c", run='"text"', metrics=[{"step": 1, "loss": "high"}])
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write("nonsense\n")
    found = {run.name: run for run in list_runs(tmp_path)}
    assert len(found) == 3
    assert found["a"].state == "finished"
    assert found["a"].faults[0].startswith("run.json: ")
    assert (found["b"].state, found["b"].faults) == ("unreadable", ["exit.json: holds no mapping"])
    assert found["c"].faults == ["run.json: holds no mapping", "metrics.jsonl: 1 of the last 2 lines are not JSON"]
    assert (found["c"].step, found["c"].loss) == (1, None)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(run=st.binary(max_size=40), ended=st.binary(max_size=40), metrics=st.binary(max_size=80))
def test_no_content_of_a_run_folder_breaks_the_list(tmp_path: Path, run: bytes, ended: bytes, metrics: bytes) -> None:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    for name, content in (("run.json", run), ("exit.json", ended), ("metrics.jsonl", metrics)):
        (folder / name).write_bytes(content)
    (found,) = list_runs(tmp_path)
    assert found.faults or found.state != "unfinished"


def test_runs_inside_runs_and_hidden_folders_are_not_listed(tmp_path: Path) -> None:
    make(tmp_path / "run")
    make(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    make(tmp_path / ".run.abc.tmp")
    make(tmp_path / "later", {**RUN, "created": "2026-11-23T10:00:00+00:00"})
    make(tmp_path / "zeroth", {**RUN, "created": "2026-11-21T10:00:00+00:00"})
    assert [run.name for run in list_runs(tmp_path)] == ["zeroth", "run", "later"]


def test_a_run_folder_itself_can_be_named(tmp_path: Path) -> None:
    assert [run.name for run in list_runs(make(tmp_path / "run"))] == ["run"]


def test_a_folder_that_is_none_is_a_mistake_but_having_no_runs_yet_is_not(tmp_path: Path, cli) -> None:
    with pytest.raises(RecipeError, match="there is no such folder"):
        list_runs(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="not a folder"):
        list_runs(tmp_path / "file")
    assert cli("runs").ok().stdout == "runs: no runs here (a run folder holds a run.json)\n"
    assert cli("runs", "--json").ok().json == []
    assert cli("runs", "nowhere").returncode == 2


def test_the_table_and_its_json(tmp_path: Path, cli) -> None:
    make(tmp_path / "runs" / "first", ended=ending(76), metrics=[{"step": 3, "loss": 0.123456}])
    make(tmp_path / "runs" / "second", run="{")
    table = cli("runs").ok().stdout
    assert [line.split()[:3] for line in table.splitlines()[1:3]] == [
        ["second", "unfinished", "?"],
        ["first", "failed", "(76)"],
    ]
    assert "0.1235" in table
    assert "2026-11-22 10:00" in table
    assert "second: run.json: " in table
    listed = cli("runs", "--json").ok().json
    assert [run["name"] for run in listed] == ["second", "first"]
    assert listed[1]["exit_code"] == 76
    assert os.fspath(listed[1]["path"]) == "runs/first"
