"""Runs that are stopped, killed or damaged go on to the very bits of a run that nothing disturbed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tiny import Lab, lab_in
from warm import Child, Warm

from finetune.files import manifest_faults

# Dropout, so that the state of random numbers counts; epochs that a stop falls into; a validation in between.
CHANGES = {
    "adapter.lora_dropout": 0.1,
    "data.validation": "held.jsonl",
    "training.max_steps": 120,
    "training.num_train_epochs": 1000,
    "training.eval_steps": 30,
    "training.save_steps": 20,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    """The run that the others must equal."""
    lab = lab_in(tmp_path_factory.mktemp("undisturbed"), bases, warm)
    lab.train(CHANGES).ok()
    return lab


def same(lab: Lab, undisturbed: Lab) -> bool:
    """The same adapter by the same way, with every step in the metrics once."""
    assert [line["step"] for line in lab.metrics() if "loss" in line] == list(range(1, 121))
    assert lab.losses() == undisturbed.losses()
    ours, theirs = ([line["eval_loss"] for line in one.metrics() if "eval_loss" in line] for one in (lab, undisturbed))
    assert ours == theirs
    return lab.adapter() == undisturbed.adapter()


def checkpoints(lab: Lab) -> list[Path]:
    """The checkpoints of the run, oldest first; anything else beside them fails the test."""
    found = list((lab / "run/checkpoints").iterdir())
    assert [path.name for path in found if not path.name.startswith("checkpoint-")] == []
    return sorted((path for path in found if path.suffix != ".aside"), key=lambda path: int(path.name.split("-")[1]))


def reach(lab: Lab, step: int) -> Child:
    """Start the run and wait until its metrics hold `step`."""
    child = lab.warm.start("train", lab.recipe(CHANGES), cwd=lab.folder)
    deadline = time.monotonic() + 60
    while (
        not (lab / "run/metrics.jsonl").is_file() or f'"step": {step},' not in (lab / "run/metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline, child.output
        time.sleep(0.005)
    return child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_stops_the_run_and_the_same_command_continues_it(
    lab: Lab, undisturbed: Lab, number: signal.Signals
) -> None:
    child = reach(lab, 21)
    child.send_signal(number)
    outcome = child.wait(30)
    assert outcome.returncode == 75
    ended = lab.ended()
    assert ended["exit_code"] == 75
    assert 21 <= ended["step"] < 120
    message = f"stopped on request after step {ended['step']} of 120; the same command continues from checkpoint-"
    assert message in ended["reason"]
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert checkpoints(lab)[-1].name == f"checkpoint-{ended['step']}"
    assert [manifest_faults(path) for path in checkpoints(lab)] == [[], []]
    assert not (lab / "run/adapter").exists()
    again = lab.train(CHANGES).ok()
    assert f"resume   from run/checkpoints/checkpoint-{ended['step']}" in again.stderr
    assert same(lab, undisturbed)
    assert lab.ended()["exit_code"] == 0


def test_a_second_signal_stops_at_once(lab: Lab, undisturbed: Lab) -> None:
    child = reach(lab, 21)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)  # another one, since two alike can arrive as one
    outcome = child.wait(30)
    assert outcome.returncode == 75
    assert "Traceback" not in outcome.stderr
    assert lab.ended()["exit_code"] == 75
    assert "at once on the second signal" in lab.ended()["reason"]
    assert [path.name for path in checkpoints(lab)] == ["checkpoint-20"]
    assert all(manifest_faults(path) == [] for path in checkpoints(lab))
    lab.train(CHANGES).ok()
    assert same(lab, undisturbed)


@pytest.mark.parametrize("moment", [1, 71, 120])
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(lab: Lab, undisturbed: Lab, moment: int) -> None:
    child = reach(lab, moment)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30).returncode == -signal.SIGKILL
    again = lab.train(CHANGES)
    if again.returncode == 5:  # the last moment came too late: the adapter was written
        assert moment == 120
        assert "is finished" in again.stderr
    else:
        again.ok()
        assert ("resume   from run/checkpoints/checkpoint-" in again.stderr) == (moment > 1)
    assert same(lab, undisturbed)
    assert len(checkpoints(lab)) == 2


def test_a_run_killed_after_its_last_step_still_gets_its_adapter(lab: Lab, undisturbed: Lab) -> None:
    lab.train(CHANGES).ok()
    for path in sorted((lab / "run/adapter").iterdir()):
        path.unlink()
    (lab / "run/adapter").rmdir()
    (lab / "run/exit.json").unlink()
    again = lab.train(CHANGES).ok()
    assert "from run/checkpoints/checkpoint-120" in again.stderr
    assert lab.adapter() == undisturbed.adapter()


def test_a_damaged_checkpoint_is_passed_over_and_named(lab: Lab, undisturbed: Lab) -> None:
    child = reach(lab, 61)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30).returncode == 75
    before, newest = checkpoints(lab)
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    again = lab.train(CHANGES).ok()
    assert f"passed over {newest.name}: state.safetensors differs from its hash" in again.stderr
    assert f"from {before.relative_to(lab.folder)}" in again.stderr
    assert f"{newest.name} is called {newest.name}.aside now" in again.stderr
    assert (newest.with_name(f"{newest.name}.aside") / "state.safetensors").read_bytes() == content
    assert same(lab, undisturbed)
    assert [manifest_faults(path) for path in checkpoints(lab)] == [[], []]


def test_a_run_whose_every_checkpoint_is_damaged_starts_again(lab: Lab, undisturbed: Lab) -> None:
    child = reach(lab, 21)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30).returncode == 75
    for path in checkpoints(lab):
        (path / "trainer_state.json").unlink()
    again = lab.train(CHANGES).ok()
    assert again.stderr.count("trainer_state.json is missing") == 2
    assert "resume   from" not in again.stderr
    assert same(lab, undisturbed)


def test_another_recipe_does_not_continue_a_stopped_run(lab: Lab) -> None:
    child = reach(lab, 21)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30).returncode == 75
    outcome = lab.train({**CHANGES, "training.learning_rate": 0.02})
    assert outcome.returncode == 5
    assert "training.learning_rate: 0.01 → 0.02" in outcome.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_before_the_first_step_leaves_nothing(lab: Lab, number: signal.Signals) -> None:
    child = lab.warm.start("train", lab.recipe(CHANGES), cwd=lab.folder)
    child.wait_for("data     ")
    child.send_signal(number)
    outcome = child.wait(30)
    assert outcome.returncode == 75
    assert "stopped on request before the first step; nothing was trained by this start" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not (lab / "run").exists()
