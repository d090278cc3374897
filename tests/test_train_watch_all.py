"""The watchdog before the first step and after the last, and where its own threads or main threads cannot run."""

from __future__ import annotations

import re
import signal

import pytest
from tiny import Lab
from warm import Child

from finetune.errors import ExitCode

TIMEOUT = 5.0
# Rank WHO comes to grief in a function; two minutes for the first step are too long for a test.
GRIEF = """
import os, signal, time
import {module}
import finetune.run.watch as watch
watch.FIRST_STEP = {first}

original = {module}.{name}
def replaced(*arguments, **named):
    if os.environ.get("RANK", "0") == "{who}":
        print("grief", flush=True)
        {what}
    return original(*arguments, **named)
{module}.{name} = replaced

from finetune.train import main
"""
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def begun(lab: Lab, place: str, who: int, what: str, first: float = TIMEOUT, **changes: object) -> list[Child]:
    """Two ranks of a run, of which one is to do `what` in the function `place`."""
    modules = place.split(".")[:-1]
    module = ".".join(modules[:3]) if "Trainer" in place else ".".join(modules)
    name = place.removeprefix(f"{module}.")
    (lab / "grief.py").write_text(GRIEF.format(module=module, name=name, who=who, what=what, first=first))
    recipe = lab.recipe({"launch.timeout": TIMEOUT, **changes})
    return lab.warm.start_ranks(2, recipe, cwd=lab.folder, entry="grief:main", env=lab.importable())


@pytest.mark.parametrize(
    ("who", "config"),
    [
        (0, None),
        pytest.param(0, "zero3", marks=pytest.mark.slow),
        pytest.param(1, "zero3", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_stopped_after_the_last_step_is_named(lab: Lab, who: int, config: str | None) -> None:
    ranks = begun(lab, "finetune.finish._whole_state", who, STOP, **{"launch.config": config})
    assert ranks[1 - who].wait(90).returncode == ExitCode.HANG
    assert ranks[who].wait(30).returncode in (ExitCode.HANG, -signal.SIGKILL)
    ended = lab.ended()
    assert ended["exit_code"] == ExitCode.HANG
    assert f"rank {who}: its process is stopped" in ended["reason"]
    assert (lab / f"run/hang/rank-{1 - who}.txt").exists()


def test_a_rank_that_saves_for_longer_than_the_timeout_is_left_alone(lab: Lab) -> None:
    for child in begun(lab, "finetune.finish._save", 0, "time.sleep(10)"):
        child.wait(90).ok()
    assert not (lab / "run/hang").exists()


def test_a_rank_that_is_killed_while_it_loads_is_named_at_once(lab: Lab) -> None:
    first, second = begun(lab, "finetune.model.build.build", 1, KILL, **{"launch.timeout": 500})
    assert first.wait(60).returncode == ExitCode.HANG
    assert second.wait(5).returncode == -signal.SIGKILL
    assert "rank 1: its process is dead; last step 0, phase 'load'" in first.output[1]
    assert "rank 1: its process is dead" in lab.ended()["reason"]
    lab.train()  # what stands there is no run's


def test_what_one_rank_fails_with_while_it_loads_ends_the_other_with_the_same(lab: Lab) -> None:
    fails = "raise __import__('finetune.errors').errors.ModelError('the base on this host is torn')"
    first, second = begun(lab, "finetune.model.build.build", 1, fails)
    assert [first.wait(60).returncode, second.wait(60).returncode] == [ExitCode.REFUSED, ExitCode.REFUSED]
    assert "rank 1 (counted from 0): the base on this host is torn" in first.output[1]
    assert not (lab / "run").exists()


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_loads_is_named_woken_and_ended(lab: Lab) -> None:
    ranks = begun(lab, "finetune.model.build.build", 1, STOP)
    assert [child.wait(60).returncode for child in ranks] == [ExitCode.HANG, ExitCode.HANG]
    assert "rank 1: its process is stopped; last step 0, phase 'load'" in lab.ended()["reason"]
    assert "most recent call first" in (lab / "run/hang/rank-1.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_loads_for_longer_than_the_timeout_is_left_alone(lab: Lab) -> None:
    for child in begun(lab, "finetune.model.build.build", 1, "time.sleep(8)"):
        child.wait(90).ok()


@pytest.mark.slow
def test_a_rank_in_its_first_step_has_longer(lab: Lab) -> None:
    place = "finetune.run.trainer.Trainer.training_step"
    once = "time.sleep(globals().pop('seconds', 25)); globals()['seconds'] = 0"
    for child in begun(lab, place, 1, once, 60):
        child.wait(90).ok()


@pytest.mark.slow
def test_a_rank_that_dies_is_named_by_one_that_is_at_its_own_work(lab: Lab) -> None:
    first, second = begun(lab, "finetune.run.trainer.Trainer.training_step", 0, "time.sleep(600)", 600)
    first.wait_for("grief")
    second.kill()
    assert first.wait(60).returncode == ExitCode.HANG
    assert "rank 1: its process is dead" in lab.ended()["reason"]


@pytest.mark.slow
def test_a_rank_that_lets_no_thread_run_is_named_with_its_stack(lab: Lab) -> None:
    what = "__import__('re').match(r'(a+)+$', 'a' * 60 + 'b')"
    first, second = begun(lab, "finetune.run.trainer.Trainer.training_step", 1, what)
    assert first.wait(60).returncode == ExitCode.HANG
    assert second.wait(60).returncode == -signal.SIGKILL
    assert re.search(r"\brank 1: it has (been silent|done nothing)", lab.ended()["reason"]), lab.ended()
    report = (lab / "run/hang/rank-1.txt").read_text()
    assert "this is rank 1: last step" in report
    assert "in replaced" in report


def test_a_process_whose_step_does_not_end_stops_when_told_within_the_timeout(lab: Lab) -> None:
    (lab / "grief.py").write_text(
        GRIEF.format(
            module="finetune.run.trainer", name="Trainer.training_step", who=0, what="time.sleep(600)", first=60
        )
    )
    child = lab.warm.start(lab.recipe({"launch.timeout": 2}), cwd=lab.folder, entry="grief:main", env=lab.importable())
    child.wait_for("grief")
    child.send_signal(signal.SIGTERM)
    assert child.wait(30).returncode == ExitCode.STOPPED
    ended = lab.ended()
    assert ended["exit_code"] == ExitCode.STOPPED
    assert "did not end within launch.timeout (2 s)" in ended["reason"]
    assert "in replaced" in (lab / "run/hang/rank-0.txt").read_text()
