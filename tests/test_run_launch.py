"""The command that starts several processes, and how they tell it why they failed."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import pytest

from finetune.errors import DataError, HangError, HardwareError, RecipeError
from finetune.recipe.sections import LaunchOptions
from finetune.run import launch
from finetune.run.folder import read_json
from finetune.run.launch import Launch, count_to_start, free_port, plan_launch, told_to_launcher


@pytest.fixture
def configs(root: Path) -> Path:
    return root / "configs"


def word_after(plan: Launch, name: str) -> str:
    return plan.command[plan.command.index(name) + 1]


def test_the_command_names_processes_port_config_and_what_is_trained(configs: Path) -> None:
    plan = plan_launch(LaunchOptions(), 2, "cpu", configs, ["my recipe.yaml", "adapter.r=4"])
    assert plan.command[:3] == (sys.executable, "-m", "accelerate.commands.launch")
    assert plan.command[-4:] == ("-m", "finetune.train", "my recipe.yaml", "adapter.r=4")
    assert word_after(plan, "--num_processes") == "2"
    assert Path(word_after(plan, "--config_file")) == configs / "accelerate" / "cpu.yaml"
    assert 1024 <= int(word_after(plan, "--main_process_port")) <= 65535
    assert shlex.split(str(plan)) == ["python", *plan.command[1:]]


def test_each_device_has_its_own_config(configs: Path) -> None:
    names = {device: word_after(plan_launch(LaunchOptions(), 2, device, configs, []), "--config_file")
             for device in ("cpu", "cuda")}  # fmt: skip
    assert len(set(names.values())) == 2


def test_a_config_of_ones_own_is_taken_or_missed(configs: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    with pytest.raises(RecipeError, match=r"launch\.config: .*own\.yaml does not exist"):
        plan_launch(LaunchOptions(config=str(own)), 2, "cpu", configs, [])
    own.write_text("distributed_type: MULTI_GPU\n")
    assert word_after(plan_launch(LaunchOptions(config=str(own)), 2, "cpu", configs, []), "--config_file") == str(own)


def test_a_config_for_several_machines_is_not_started_on_one(configs: Path) -> None:
    with pytest.raises(RecipeError, match="is for 2 machines, and this command starts the processes of one"):
        plan_launch(LaunchOptions(config="multi-node-zero3"), 2, "cuda", configs, [])


def test_threads_are_shared_unless_the_user_has_said_how_many(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for count, threads in ((2, "4"), (3, "2"), (16, "1")):
        assert plan_launch(LaunchOptions(), count, "cpu", configs, []).environment == {"OMP_NUM_THREADS": threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert plan_launch(LaunchOptions(), 2, "cpu", configs, []).environment == {"OMP_NUM_THREADS": "3"}


def test_a_launched_process_does_not_launch(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch._REPORT, "x")
    with pytest.raises(HardwareError, match="started one process that knows of no others, where 2 were asked for"):
        plan_launch(LaunchOptions(), 2, "cpu", configs, [])


def test_a_process_that_accelerate_started_alone_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert count_to_start(LaunchOptions(), 8) == 8
    assert count_to_start(LaunchOptions(num_processes=2), 8) == 2
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    assert count_to_start(LaunchOptions(), 8) == count_to_start(LaunchOptions(num_processes=1), 8) == 1
    with pytest.raises(HardwareError, match=r"asks for 2 processes and accelerate's launcher started this one alone"):
        count_to_start(LaunchOptions(num_processes=2), 8)
    monkeypatch.setenv(launch._REPORT, "x")  # started by `finetune train`, which says what is wrong with its file
    assert count_to_start(LaunchOptions(num_processes=2), 8) == 2


def test_processes_without_a_device_of_their_own_are_refused() -> None:
    launch.check_devices(4, "cuda", 4)
    launch.check_devices(4, "cpu", 1)
    with pytest.raises(HardwareError, match=r"2 processes on this host need as many cuda devices, and it shows 1"):
        launch.check_devices(2, "cuda", 1)


def test_a_free_port_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def fail(error: BaseException) -> None:
    with told_to_launcher():
        raise error


def test_the_first_error_is_told_but_one_that_explains_more_before_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "ended.json"
    monkeypatch.setenv(launch._REPORT, str(report))
    told = []
    errors = (KeyError("lost"), ValueError("later"), HangError("rank 1 is gone"), DataError("row 3"), RecipeError("no"))
    for error in errors:
        with pytest.raises(type(error)):
            fail(error)
        told.append(read_json(report))
    launch.tell_hang("rank 0 is behind")
    told.append(read_json(report))
    assert told == [
        {"exit_code": 1, "reason": "KeyError: 'lost'"},
        {"exit_code": 1, "reason": "KeyError: 'lost'"},
        {"exit_code": 77, "reason": "rank 1 is gone"},
        {"exit_code": 3, "reason": "row 3"},
        {"exit_code": 3, "reason": "row 3"},
        {"exit_code": 3, "reason": "row 3"},
    ]


def test_a_verdict_replaces_what_others_broke_down_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "ended.json"
    monkeypatch.setenv(launch._REPORT, str(report))
    with pytest.raises(HangError):
        fail(HangError("connection closed"))
    launch.tell_hang("rank 1 is stopped")
    assert read_json(report) == {"exit_code": 77, "reason": "rank 1 is stopped"}


def test_a_process_that_is_told_to_stop_tells_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch._REPORT, str(tmp_path / "ended.json"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert not (tmp_path / "ended.json").exists()


def test_without_a_launcher_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(launch._REPORT, raising=False)
    with pytest.raises(KeyError):
        fail(KeyError("lost"))
    with told_to_launcher():
        pass
    assert list(tmp_path.iterdir()) == []
