"""Runs of two processes: the same numbers as one, refused when they disagree, ended when one dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import Lab, chats, write_rows
from warm import Outcome

from finetune.errors import ExitCode
from finetune.files import manifest_faults

TEN_STEPS = {
    "data.train": "many.jsonl",
    "data.validation": "held.jsonl",
    "training.max_steps": 10,
    "training.learning_rate": 1e-3,
    "training.global_batch_size": 2,
}


def ranks(lab: Lab, changes: dict[str, object] | None = None, count: int = 2, **how: object) -> list[Outcome]:
    """Run a recipe on `count` ranks, as a launcher would start them."""
    return lab.warm.ranks(count, lab.recipe(changes), cwd=lab.folder, **how)


def tensors(lab: Lab, run: str) -> dict[str, object]:
    from safetensors.torch import load_file

    found: dict[str, object] = load_file(lab / run / "adapter/adapter_model.safetensors")
    return found


@pytest.mark.parametrize("variable", [{}, {"ACCELERATE_USE_CPU": "true"}], ids=["plain", "ACCELERATE_USE_CPU"])
def test_two_ranks_train_as_one_process_does(lab: Lab, variable: dict[str, str]) -> None:
    import torch

    write_rows(lab / "many.jsonl", chats(20))
    lab.train({**TEN_STEPS, "output_dir": "one"}).ok()
    first, second = ranks(lab, {**TEN_STEPS, "output_dir": "two"}, env=variable)
    assert "1 per device x 1 accumulated x 2 processes = 2 rows a step" in first.ok().stderr
    assert second.ok().stderr == ""
    assert second.stdout == ""
    assert len(lab.losses("two")) == 10
    assert lab.losses("two") == pytest.approx(lab.losses("one"), rel=1e-6)
    one, two = ([line for line in lab.metrics(run) if "eval_loss" in line] for run in ("one", "two"))
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-6)
    for key in ("grad_norm", "trained_tokens"):
        assert [line[key] for line in lab.metrics("two") if key in line] == pytest.approx(
            [line[key] for line in lab.metrics("one") if key in line], rel=1e-4
        )
    ours, theirs = tensors(lab, "two"), tensors(lab, "one")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert json.loads((lab / "two/run.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_two_ranks_accumulate_as_one_process_does(lab: Lab) -> None:
    changes = {"training.global_batch_size": 8, "training.max_steps": 2, "training.learning_rate": 1e-3}
    lab.train({**changes, "output_dir": "one"}).ok()
    outcomes = ranks(lab, {**changes, "output_dir": "two", "training.per_device_train_batch_size": 2})
    assert "2 per device x 2 accumulated x 2 processes" in outcomes[0].ok().stderr
    assert lab.losses("two") == pytest.approx(lab.losses("one"), rel=1e-6)


@pytest.mark.slow
def test_ranks_train_every_weight_of_the_base_alike(lab: Lab) -> None:
    changes = {"adapter": {"method": "none"}, "training.learning_rate": 1e-4}
    lab.train({**changes, "output_dir": "one"}).ok()
    for outcome in ranks(lab, {**changes, "output_dir": "two"}):
        outcome.ok()
    assert lab.losses("two") == pytest.approx(lab.losses("one"), rel=1e-6)
    assert (lab / "two/model/model.safetensors").is_file()


def test_ranks_that_hold_other_data_are_refused(lab: Lab) -> None:
    recipe = lab.recipe()
    other = lab / "other"
    other.mkdir()
    for name in ("chatml", "recipe.yaml"):
        (other / name).symlink_to(lab / name)
    write_rows(other / "train.jsonl", chats(16, seed=3))
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871", "GLOO_SOCKET_IFNAME": "lo"}
    children = [
        lab.warm.start(recipe, cwd=place, env={**world, "RANK": rank, "LOCAL_RANK": rank}, entry="finetune.train:main")
        for rank, place in (("0", lab.folder), ("1", other))
    ]
    for child in children:
        outcome = child.wait(60)
        assert outcome.returncode == 5
        assert "the ranks would not train the same run" in outcome.stderr
        assert "data: rank 0: " in outcome.stderr
        assert ", rank 1: " in outcome.stderr
        assert "base:" not in outcome.stderr
        assert "Traceback" not in outcome.stderr
    assert not (lab / "run").exists()
    assert not (other / "run").exists()


def test_another_number_of_processes_than_asked_for_is_refused(lab: Lab) -> None:
    for outcome in ranks(lab, {"launch.num_processes": 3}):
        assert outcome.returncode == 4
        assert "launch.num_processes: the recipe asks for 3 processes and the launcher started 2" in outcome.stderr
    assert not (lab / "run").exists()


def test_a_global_batch_that_ranks_cannot_share_is_refused(lab: Lab) -> None:
    for outcome in ranks(lab, {"training.global_batch_size": 3}):
        assert outcome.returncode == 2
        assert "training.global_batch_size: 3 rows cannot be shared evenly by 2 processes" in outcome.stderr
    assert not (lab / "run").exists()


def test_a_run_folder_that_another_host_does_not_see_is_refused_before_the_first_step(lab: Lab) -> None:
    outcomes = lab.warm.ranks(
        2, lab.recipe({"launch.timeout": 6}), cwd=lab.folder, entry="another_disk:train",
        env={"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])},
    )  # fmt: skip
    assert [one.returncode for one in outcomes] == [ExitCode.REFUSED] * 2
    assert re.search(
        r"output_dir: what rank 0 writes into run is not there for rank 1 on \S+, which", outcomes[0].stderr
    )
    assert not (lab / "run/metrics.jsonl").exists()
    assert lab.ended()["exit_code"] == ExitCode.REFUSED


def test_a_loss_that_is_no_number_on_one_rank_ends_all(lab: Lab) -> None:
    outcomes = ranks(lab, {"model.name_or_path": "infinite"})
    for rank, outcome in enumerate(outcomes):
        assert outcome.returncode == 76
        assert f"on rank {rank} (counted from 0): train.jsonl row" in outcome.stderr
        assert "Traceback" not in outcome.stderr
    assert lab.ended()["exit_code"] == 76


def test_when_a_rank_dies_the_run_ends_and_says_so(lab: Lab) -> None:
    changes = {"training.max_steps": 100000, "training.num_train_epochs": 100000, "launch.timeout": 20}
    first, second = lab.warm.start_ranks(2, lab.recipe(changes), cwd=lab.folder)
    first.wait_for("step 1/")
    second.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert first.wait(60).returncode != 0
    assert time.monotonic() - started < 40
    assert second.wait(5).returncode == -signal.SIGKILL
    assert lab.ended()["exit_code"] != 0
    assert lab.ended()["step"] >= 1
    assert not (lab / "run/adapter").exists()


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_they_go_on_to_the_same_bits(lab: Lab) -> None:
    changes = {
        "adapter.lora_dropout": 0.1,
        "training.max_steps": 80,
        "training.num_train_epochs": 100,
        "training.save_total_limit": 3,
    }
    for outcome in ranks(lab, {**changes, "output_dir": "whole"}):
        outcome.ok()
    children = lab.warm.start_ranks(2, lab.recipe(changes), cwd=lab.folder)
    children[0].wait_for("step 1/")
    children[1].send_signal(signal.SIGINT)
    outcomes = [child.wait(60) for child in children]
    step = lab.ended()["step"]
    assert 1 <= step < 80
    for outcome in outcomes:
        assert outcome.returncode == 75
        assert f"stopped on request after step {step} of 80" in outcome.stderr
        assert "Traceback" not in outcome.stderr
    assert lab.ended()["exit_code"] == 75
    assert [path.name for path in (lab / "run/checkpoints").iterdir()] == [f"checkpoint-{step}"]
    assert manifest_faults(lab / f"run/checkpoints/checkpoint-{step}") == []
    again = ranks(lab, changes)
    assert f"from run/checkpoints/checkpoint-{step}" in again[0].ok().stderr
    assert again[1].ok().stderr == ""
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


# -- real launchers ----------------------------------------------------------------------------------------------------


def launched(lab: Lab, *words: str) -> Outcome:
    """Run a fresh Python with `words`."""
    done = subprocess.run(
        [sys.executable, *words], cwd=lab.folder, capture_output=True, text=True, timeout=250, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_the_command_starts_two_ranks_with_the_losses_of_one(lab: Lab) -> None:
    write_rows(lab / "many.jsonl", chats(20))
    lab.train({**TEN_STEPS, "output_dir": "one"}).ok()
    recipe = lab.recipe({**TEN_STEPS, "launch.num_processes": 2})
    outcome = launched(lab, "-m", "finetune", "train", recipe, "--json").ok()
    assert "accelerate.commands.launch" in outcome.stderr
    assert outcome.stderr.count("step 10/10  loss") == 1
    assert outcome.json == lab.ended()["facts"]
    assert json.loads((lab / "run/run.json").read_text())["world_size"] == 2
    assert lab.losses() == pytest.approx(lab.losses("one"), rel=1e-6)


@pytest.mark.slow
def test_accelerate_launch_starts_two_ranks_with_the_losses_of_one(lab: Lab, root: Path) -> None:
    write_rows(lab / "many.jsonl", chats(20))
    lab.train({**TEN_STEPS, "output_dir": "one"}).ok()
    config = str(root / "configs/accelerate/cpu.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config]
    outcome = launched(lab, *launcher, "-m", "finetune.train", lab.recipe(TEN_STEPS)).ok()
    assert "next: finetune evaluate run" in outcome.stdout
    assert json.loads((lab / "run/run.json").read_text())["world_size"] == 2
    assert lab.losses() == pytest.approx(lab.losses("one"), rel=1e-6)


@pytest.mark.slow
def test_what_a_rank_refuses_is_told_with_its_exit_code(lab: Lab) -> None:
    changes = {"launch.num_processes": 2, "adapter.target_modules": ["v_porj"]}
    outcome = launched(lab, "-m", "finetune", "train", lab.recipe(changes), "--json")
    assert outcome.returncode == 5
    assert "did you mean 'v_proj'" in outcome.json["error"]["message"]
    assert not (lab / "run").exists()


@pytest.mark.slow
def test_a_config_that_starts_one_process_is_refused_and_not_followed_for_ever(lab: Lab) -> None:
    (lab / "wrong.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nuse_cpu: true\n"
    )
    recipe = lab.recipe({"launch.num_processes": 2, "launch.config": "wrong.yaml"})
    outcome = launched(lab, "-m", "finetune", "train", recipe)
    assert outcome.returncode == 4, outcome
    assert "distributed_type must be MULTI_GPU" in outcome.stderr.splitlines()[-1]
    assert not (lab / "run").exists()


@pytest.mark.slow
def test_ctrl_c_reaches_the_ranks_of_a_launched_run_and_the_command_continues_it(lab: Lab) -> None:
    changes = {"launch.num_processes": 2, "training.max_steps": 400, "training.num_train_epochs": 1000}
    recipe = lab.recipe(changes)
    with open(lab / "said", "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetune", "train", recipe], cwd=lab.folder, stdout=said, stderr=said
        )
        try:
            deadline = time.monotonic() + 120
            while "step 1/" not in (lab / "said").read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(60) == 75, (lab / "said").read_text()
        finally:
            process.kill()
            process.wait()
    step = lab.ended()["step"]
    assert 1 <= step < 400
    assert (lab / f"run/checkpoints/checkpoint-{step}").is_dir()
    assert f"the same command continues from checkpoint-{step}" in (lab / "said").read_text().splitlines()[-1]
    outcome = launched(lab, "-m", "finetune", "train", recipe).ok()
    assert f"from run/checkpoints/checkpoint-{step}" in outcome.stderr


ONE_CANNOT_LOAD = """
import os, sys, time
import finetune.assemble
from finetune.errors import ModelError
from finetune.train import main

whole = finetune.assemble.assemble

def assemble(*given):
    if os.environ["RANK"] == "1":
        time.sleep(1)  # until rank 0 waits for it
        raise ModelError("a file of the base is torn")
    return whole(*given)

finetune.assemble.assemble = assemble

def start(argv):
    return main(argv)
"""


def test_why_a_rank_fails_before_training_is_told_and_not_that_others_miss_it(lab: Lab) -> None:
    (lab / "one_cannot_load.py").write_text(ONE_CANNOT_LOAD)
    told = lab / "told.json"
    env = {"FINETUNE_LAUNCH_REPORT": str(told), "PYTHONPATH": str(lab.folder)}
    first, second = ranks(lab, {"launch.timeout": 20}, env=env, entry="one_cannot_load:start")
    assert second.returncode == 5
    assert first.returncode != 0
    said = json.loads(told.read_text())
    assert said["exit_code"] == 5
    assert "a file of the base is torn" in said["reason"]


def test_what_one_rank_refuses_before_the_group_is_formed_ends_all_at_once(lab: Lab) -> None:
    (lab / "run").mkdir()
    (lab / "run/notes.txt").write_text("mine")  # only rank 0 looks
    started = time.monotonic()
    first, second = ranks(lab)
    assert (first.returncode, second.returncode) == (5, 5)
    assert "error: output_dir: " in first.stderr
    assert "error: rank 1: rank 0 (counted from 0): output_dir: " in second.stderr
    assert "Traceback" not in first.stderr + second.stderr
    assert time.monotonic() - started < 60
