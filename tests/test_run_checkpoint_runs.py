"""Whole runs that are killed, or whose disk fails, go on to the very bits of a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import Lab, chats, write_rows
from warm import Child, Outcome

from finetune.files import manifest_faults

LORA: dict[str, Any] = {
    "adapter.lora_dropout": 0.1,
    "training.max_steps": 12,
    "training.num_train_epochs": 100,
    "training.save_steps": 4,
    "training.save_total_limit": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "nf4": {"model.quantization": "nf4"},
    "full": {"adapter": None, "adapter.method": "none", "training.learning_rate": 1e-3},
    "dora": {"adapter.method": "dora"},
    "whole modules": {"adapter.modules_to_save": ["lm_head"], "model.name_or_path": "llama3"},
    "adafactor": {"training.optim": "adafactor"},
}

FAST = ("nf4", "full")


def changes_of(kind: str) -> dict[str, Any]:
    """The recipe of a kind of run; one without an adapter has no dropout."""
    changes = {**LORA, **KINDS[kind]}
    if kind == "full":
        changes = {name: value for name, value in changes.items() if name not in ("adapter", "adapter.lora_dropout")}
        changes |= {"adapter.r": None, "adapter.lora_alpha": None}
    return changes


def struck(lab: Lab, changes: dict[str, Any], fault: str) -> Outcome:
    """The run with a fault of tests/faults.py."""
    return lab.train(changes, entry="faults:main", env=faults(fault))


def faults(fault: str) -> dict[str, str]:
    """The environment of the entry faults:main."""
    here = str(Path(__file__).parent)
    return {"FAULT": fault, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], here])}


def product(lab: Lab, run: str = "run") -> bytes:
    """The bytes of what a run trained."""
    return next((lab / run).glob("[am]*/*model*.safetensors")).read_bytes()


def names(lab: Lab) -> list[str]:
    """What lies among the checkpoints, by step."""
    return sorted((path.name for path in (lab / "run/checkpoints").iterdir()), key=lambda name: (len(name), name))


def whole(lab: Lab) -> bool:
    """Whether every checkpoint matches its manifest."""
    return all(manifest_faults(path, sealed=True) == [] for path in (lab / "run/checkpoints").iterdir())


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_killed_run_goes_on_to_the_same_bits(lab: Lab, kind: str) -> None:
    changes = changes_of(kind)
    lab.train({**changes, "output_dir": "whole"}).ok()
    assert struck(lab, changes, "kill:9:.checkpoint-8.tmp").returncode == -signal.SIGKILL
    assert names(lab) == ["checkpoint-4", ".checkpoint-8.tmp"]
    again = lab.train(changes).ok()
    assert "resume   from run/checkpoints/checkpoint-4" in again.stderr
    assert product(lab) == product(lab, "whole")
    assert lab.losses() == lab.losses("whole")
    assert names(lab) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert whole(lab)


def test_two_ranks_go_on_to_the_same_bits_and_one_to_the_same_losses(lab: Lab) -> None:
    for outcome in lab.warm.ranks(2, lab.recipe({**LORA, "output_dir": "whole"}), cwd=lab.folder):
        outcome.ok()
    recipe = lab.recipe(LORA)
    children = lab.warm.start_ranks(
        2, recipe, cwd=lab.folder, entry="faults:train", env=faults("kill:9:.checkpoint-8.tmp")
    )
    assert children[0].wait(60).returncode == -signal.SIGKILL
    for child in children:
        child.kill()
    shutil.copytree(lab / "run", lab / "one")
    for outcome in lab.warm.ranks(2, recipe, cwd=lab.folder):
        outcome.ok()
    assert lab.adapter() == lab.adapter("whole")
    state = json.loads((lab / "run/checkpoints/checkpoint-12/state.json").read_text())
    assert len(state["ranks"]) == 2
    refused = lab.train({**LORA, "output_dir": "one"})
    assert refused.returncode == 5
    assert "world_size: 2 → 1" in refused.stderr
    lab.train({**LORA, "output_dir": "one"}, "--allow-drift", "world_size").ok()
    assert lab.losses("one")[:4] == lab.losses("whole")[:4]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero1", "zero2", "zero3"])
def test_four_ranks_go_on_to_the_same_bits(lab: Lab, mode: str) -> None:
    """Sums of more than two numbers depend on their order, which a new start must not change."""
    changes = {**LORA, "training.global_batch_size": 4, "training.per_device_train_batch_size": 1}
    if mode != "ddp":
        changes["launch.config"] = mode
    for outcome in lab.warm.ranks(4, lab.recipe({**changes, "output_dir": "whole"}), cwd=lab.folder, timeout=300):
        outcome.ok()
    recipe = lab.recipe(changes)
    fault = faults("kill:9:.checkpoint-8.tmp")
    children = lab.warm.start_ranks(4, recipe, cwd=lab.folder, entry="faults:train", env=fault)
    assert children[0].wait(300).returncode == -signal.SIGKILL
    for child in children:
        child.kill()
    again = [outcome.ok() for outcome in lab.warm.ranks(4, recipe, cwd=lab.folder, timeout=300)]
    assert "resume   from run/checkpoints/checkpoint-4" in again[0].stderr
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base_and_no_pickle(lab: Lab) -> None:
    lab.train(LORA).ok()
    path = lab / "run/checkpoints/checkpoint-12"
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "manifest.json", "state.json", "state.safetensors",
        "trainer_state.json",
    ]  # fmt: skip
    assert (
        load_file(path / "adapter_model.safetensors").keys()
        == load_file(lab / "run/adapter/adapter_model.safetensors").keys()
    )
    assert (path / "adapter_model.safetensors").stat().st_size < 2 * len(product(lab))
    for file in path.iterdir():
        assert not file.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, or torch's zip of one
    config, theirs = (json.loads((one / "adapter_config.json").read_text()) for one in (path, lab / "run/adapter"))
    assert {**config, "target_modules": 0} == {**theirs, "target_modules": 0}
    assert set(config["target_modules"]) == set(theirs["target_modules"])


def test_a_checkpoint_is_an_adapter_that_plain_peft_loads(lab: Lab) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lab.train(LORA).ok()
    ids = torch.arange(5, 25)[None]
    logits = []
    for folder in ("run/checkpoints/checkpoint-12", "run/adapter"):
        base = AutoModelForCausalLM.from_pretrained(lab / "chatml", dtype=torch.float32)
        logits.append(PeftModel.from_pretrained(base, str(lab / folder))(input_ids=ids).logits)
    assert torch.equal(*logits)


def test_going_on_unpickles_nothing(lab: Lab) -> None:
    struck(lab, LORA, "kill:9:.checkpoint-8.tmp")
    again = lab.train(LORA, entry="faults:no_pickle", env=faults("")).ok()
    assert "resume   from run/checkpoints/checkpoint-4" in again.stderr


# -- a disk that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO"])
def test_a_save_that_fails_ends_the_run_and_the_checkpoint_before_it_stays(lab: Lab, kind: str) -> None:
    lab.train({**LORA, "output_dir": "whole"}).ok()
    outcome = struck(lab, LORA, f"{kind}:7:.checkpoint-8.tmp")
    assert outcome.returncode == 74
    assert "checkpoint-8: " in outcome.stderr
    assert "(checkpoint-4 is whole)" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert lab.ended()["exit_code"] == 74
    assert names(lab) == ["checkpoint-4"]
    assert whole(lab)
    lab.train(LORA).ok()
    assert lab.adapter() == lab.adapter("whole")


def test_a_save_that_fails_may_be_let_pass_and_is_told(lab: Lab) -> None:
    changes = {**LORA, "training.on_save_error": "continue"}
    outcome = struck(lab, changes, "ENOSPC:7:.checkpoint-8.tmp").ok()
    assert "a checkpoint could not be written: run/checkpoints/checkpoint-8: no space left" in outcome.stderr
    assert "Training goes on; checkpoint-4 is whole" in outcome.stderr
    assert names(lab) == ["checkpoint-4", "checkpoint-12"]
    lab.train({**LORA, "output_dir": "whole"}).ok()
    assert lab.adapter() == lab.adapter("whole")


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_a_run_that_cannot_be_saved_ends_after_its_first_steps(lab: Lab, mode: str) -> None:
    changes = {**LORA, "training.save_steps": None, "training.max_steps": 4000, "training.on_save_error": mode}
    outcome = struck(lab, changes, "EIO:7:.checkpoint-1.tmp")
    assert outcome.returncode == 74
    assert "(there is no checkpoint yet)" in outcome.stderr
    assert lab.ended()["step"] < 1000
    assert names(lab) == []


def test_a_stopped_run_whose_last_save_fails_names_no_checkpoint_that_is_not_there(lab: Lab) -> None:
    changes = {
        **LORA,
        "training.max_steps": 4000,
        "training.num_train_epochs": 10**6,
        "training.on_save_error": "continue",
    }
    changes["training.save_steps"] = 4000
    # The probe makes some 140 file operations, a save some 160: the fault meets the save.
    child = lab.warm.start("train", lab.recipe(changes), cwd=lab.folder, entry="faults:main", env=faults("EIO:210:.ch"))
    child.wait_for("step 1/")
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    outcome = child.wait(60)
    assert outcome.returncode == 74
    assert "whose checkpoint could not be written; there is no checkpoint" in outcome.stderr


@pytest.mark.parametrize("mode", ["stop", "continue"])
def test_a_disk_that_takes_nothing_any_more_ends_no_run_that_may_go_on_and_hides_no_reason(lab: Lab, mode: str) -> None:
    changes = {**LORA, "training.on_save_error": mode}
    full = {**faults(""), "FULL": "checkpoint-4:" + (".checkpoint-12." if mode == "continue" else "")}
    outcome = lab.train(changes, entry="faults:on_full_disk", env=full)
    assert "Traceback" not in outcome.stderr
    if mode == "stop":
        assert outcome.returncode == 74
        assert "error: run/metrics.jsonl: no space left" in outcome.stderr
        assert "(checkpoint-4 is the newest)" in outcome.stderr
        assert "nothing but these lines says how the run ended: run/exit.json: no space" in outcome.stderr
        lab.train(changes).ok()
    else:
        outcome.ok()
        assert outcome.stderr.count("Training goes on; its figures are kept in memory") == 1
        assert names(lab) == ["checkpoint-4", "checkpoint-12"]
    lab.train({**LORA, "output_dir": "whole"}).ok()
    assert lab.losses() == lab.losses("whole")
    assert lab.adapter() == lab.adapter("whole")


def test_no_rank_of_a_stopped_run_names_a_checkpoint_that_rank_0_could_not_write(lab: Lab) -> None:
    changes = {**LORA, "training.max_steps": 4000, "training.num_train_epochs": 10**6, "training.save_steps": 4000}
    changes["training.on_save_error"] = "continue"
    children = lab.warm.start_ranks(
        2, lab.recipe(changes), cwd=lab.folder, entry="faults:train", env=faults("EIO:210:.ch")
    )
    children[0].wait_for("step 1/")
    time.sleep(0.5)
    children[1].send_signal(signal.SIGTERM)
    for outcome in [child.wait(60) for child in children]:
        assert outcome.returncode == 74, outcome.stderr
        assert "whose checkpoint could not be written; there is no checkpoint" in outcome.stderr
        assert "continues from" not in outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_a_disk_slower_than_the_watchdog_holds_a_run_up_and_does_not_end_it(lab: Lab, mode: str) -> None:
    changes = {**LORA, "launch.timeout": 6, **({"launch.config": mode} if mode != "ddp" else {})}
    fault = faults("slow14:7:.checkpoint-4.tmp")
    outcomes = lab.warm.ranks(2, lab.recipe(changes), cwd=lab.folder, entry="faults:train", env=fault)
    told = outcomes[0].ok().stderr
    assert "the disk is slow: 1" in told
    outcomes[1].ok()
    assert names(lab) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_while_all_wait_for_a_slow_disk_is_named(lab: Lab, way: signal.Signals) -> None:
    changes = {**LORA, "launch.timeout": 6}
    fault = faults("slow60:7:.checkpoint-4.tmp")
    children = lab.warm.start_ranks(2, lab.recipe(changes), cwd=lab.folder, entry="faults:train", env=fault)
    children[0].wait_for("the disk is slow")
    children[1].send_signal(way)
    outcome = children[0].wait(40)
    assert outcome.returncode == 77, outcome.stderr
    assert f"rank 1: its process is {'dead' if way == signal.SIGKILL else 'stopped'}" in outcome.stderr
    children[1].kill()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["end", "stop"])
def test_the_last_write_is_waited_for_by_all_ranks(lab: Lab, way: str) -> None:
    """It takes longer than any operation of all processes may: their timeout, and 15 seconds more."""
    rows = chats(24)
    write_rows(lab / "train.jsonl", rows[:16])
    write_rows(lab / "val.jsonl", rows[16:])
    changes = {**LORA, "launch.timeout": 5, "data.validation": "val.jsonl", "training.save_steps": None}
    if way == "stop":
        changes |= {"training.max_steps": 4000, "training.num_train_epochs": 10**6}
    fault = faults("slow24:7:.checkpoint-12.tmp" if way == "end" else "slow24:210:.ch")
    children = lab.warm.start_ranks(2, lab.recipe(changes), cwd=lab.folder, entry="faults:train", env=fault)
    if way == "stop":
        children[0].wait_for("step 1/")
        time.sleep(0.5)
        children[0].send_signal(signal.SIGTERM)
    outcomes = [child.wait(120) for child in children]
    assert [outcome.returncode for outcome in outcomes] == [0 if way == "end" else 75] * 2, outcomes[0].stderr
    assert names(lab) == [f"checkpoint-{lab.ended()['step']}"]
    assert whole(lab)


def test_after_a_step_that_was_not_made_the_run_goes_on_to_the_same_bits(lab: Lab) -> None:
    """Its dropout has drawn random numbers; and its loss is in no line of the log."""
    changes = {**LORA, "training.logging_steps": 4}
    lab.train({**changes, "output_dir": "whole"}).ok()
    outcome = lab.train(changes, entry="faults:nan_once", env=faults("7"))
    assert outcome.returncode == 76, outcome.stderr
    assert "checkpoint-6 holds the state before it" in outcome.stderr
    lab.train(changes).ok()
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


# -- a second signal -------------------------------------------------------------------------------------------------


def test_a_second_signal_leaves_the_last_write_its_seconds(lab: Lab) -> None:
    changes = {**LORA, "training.max_steps": 4000, "training.num_train_epochs": 10**6, "training.save_steps": None}
    child = lab.warm.start(
        "train", lab.recipe(changes), cwd=lab.folder, entry="faults:main", env=faults("slow2:210:.ch")
    )
    child.wait_for("step 1/")
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not list((lab / "run/checkpoints").glob(".checkpoint-*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    outcome = child.wait(60)
    assert outcome.returncode == 75, outcome.stderr
    assert "stopped at once on the second signal" in outcome.stderr
    assert names(lab) == [f"checkpoint-{lab.ended()['step']}"]
    assert whole(lab)


# -- kill -9 at any instant ------------------------------------------------------------------------------------------

MANY: dict[str, Any] = {**LORA, "training.max_steps": 60, "training.save_steps": 3, "training.save_total_limit": 2}


def alive(lab: Lab, child: Child) -> bool:
    """Wait until the child has trained a step; False when it has ended before."""
    metrics = lab / "run/metrics.jsonl"
    before = metrics.read_bytes() if metrics.is_file() else b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_bytes() not in (b"", before):
            return True
        if child._ended_within(0.002):
            return False
    raise AssertionError(child.output)


def killed(lab: Lab, changes: dict[str, Any], times: int, seed: int, ranks: int = 1) -> int:
    """Kill a run and start it again until it was killed so many times; gives how many kills met it alive."""
    draw, met = random.Random(seed), 0
    while met < times:
        if (lab / "run/adapter").exists():
            shutil.rmtree(lab / "run")
        children = (
            lab.warm.start_ranks(ranks, lab.recipe(changes), cwd=lab.folder)
            if ranks > 1
            else [lab.warm.start("train", lab.recipe(changes), cwd=lab.folder)]
        )
        if alive(lab, children[0]):
            time.sleep(draw.uniform(0, 0.15))
        victim = children[draw.randrange(ranks)]
        victim.send_signal(signal.SIGKILL)
        met += victim.wait(60).returncode == -signal.SIGKILL
        for child in children:
            child.kill()
        left = list((lab / "run/checkpoints").glob("checkpoint-*"))
        assert [manifest_faults(path, sealed=True) for path in left] == [[]] * len(left)
    return met


def goes_on_to_the_same_bits(lab: Lab, changes: dict[str, Any], times: int, seed: int) -> None:
    lab.train({**changes, "output_dir": "whole"}).ok()
    assert killed(lab, changes, times, seed) == times
    if not (lab / "run/adapter").exists():
        lab.train(changes).ok()
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


def test_a_run_killed_at_twenty_random_instants_has_the_same_bits(lab: Lab) -> None:
    goes_on_to_the_same_bits(lab, MANY, 20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 11))
def test_a_run_killed_at_random_instants_has_the_same_bits(lab: Lab, seed: int) -> None:
    changes = {**MANY, "model.quantization": "nf4"} if seed == 2 else MANY
    goes_on_to_the_same_bits(lab, changes, 20, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # more than twenty starts
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_two_ranks_killed_at_twenty_random_instants_have_the_same_bits(lab: Lab, mode: str) -> None:
    changes = MANY if mode == "ddp" else {**MANY, "launch.config": mode}
    for outcome in lab.warm.ranks(2, lab.recipe({**changes, "output_dir": "whole"}), cwd=lab.folder):
        outcome.ok()
    assert killed(lab, changes, 20, seed=20, ranks=2) == 20
    for outcome in lab.warm.ranks(2, lab.recipe(changes), cwd=lab.folder):
        outcome.ok()
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


# -- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_of_twelve_places_is_in_the_run_folder(lab: Lab) -> None:
    import subprocess

    made = iter(f"Zq{number}s3cr3tV4lueOf{number}Place" for number in range(100, 120))
    planted = {place: next(made) for place in (
        "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "recipe", "override",
        "comment", "git remote", "git header", "token file", "dotenv",
    )}  # fmt: skip
    environment = {name: value for name, value in planted.items() if name.isupper()}
    home = lab / "hf"
    home.mkdir()
    (home / "token").write_text(planted["token file"])
    (lab / ".env").write_text(f"API_KEY={planted['dotenv']}\n")
    git = ["git", "-C", str(lab.folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run(
        [*git, "remote", "add", "origin", f"https://me:{planted['git remote']}@example.org/x.git"], check=True
    )
    header = f"AUTHORIZATION: bearer {planted['git header']}"
    subprocess.run([*git, "config", "http.extraheader", header], check=True)
    subprocess.run(
        [*git, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"], check=True
    )
    env = {**environment, "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token")}
    short = {**LORA, "training.max_steps": 4}
    recipe = lab.recipe({**short, "training.extra": {"hub_token": planted["recipe"]}}, "secret.yaml")
    refused = lab.warm.run("train", recipe, cwd=lab.folder, env=env)
    recipe = lab.recipe(short)
    (lab / recipe).write_text((lab / recipe).read_text() + f"# my key is {planted['comment']}\n")
    override = f"training.extra.hub_token={planted['override']}"
    for outcome in (refused, lab.warm.run("train", recipe, override, cwd=lab.folder, env=env)):
        assert outcome.returncode == 2
        assert "Zq1" not in outcome.stderr
    assert not (lab / "run").exists()
    lab.warm.run("train", recipe, cwd=lab.folder, env=env).ok()
    files = [path for path in (lab / "run").rglob("*") if path.is_file()]
    assert len(files) > 12
    assert json.loads((lab / "run/run.json").read_text())["git"]["commit"]
    found = {
        (place, path.name) for path in files for place, value in planted.items() if value.encode() in path.read_bytes()
    }
    assert found == set()
