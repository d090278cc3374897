"""A launcher starts a run again: one that has its product ends well, one that it began itself is not begun again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import Lab
from warm import Outcome

from finetune.files import manifest_faults
from finetune.run.folder import RunFolder
from finetune.run.restart import begun_by, is_restart, launcher_of

PLAIN = {"training.max_steps": 2}
STARTED = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_RESTART_COUNT": "0"}
AGAIN = {**STARTED, "TORCHELASTIC_RESTART_COUNT": "1"}


def ranks(lab: Lab, count: int, env: dict[str, str], changes: dict[str, Any] = PLAIN, *words: str) -> list[Outcome]:
    """A run of `count` processes; for all of them the fork server stands for the launcher."""
    return lab.warm.ranks(count, lab.recipe(changes), *words, cwd=lab.folder, env=env)


@pytest.mark.parametrize("ended", ["before it could say so", "after a rank had called it failed", "well"])
def test_a_restart_of_a_run_that_has_its_product_ends_well_on_all_ranks(lab: Lab, ended: str) -> None:
    for outcome in ranks(lab, 2, STARTED):
        outcome.ok()
    said, before = lab.ended(), lab.adapter()
    if ended == "before it could say so":
        (lab / "run/exit.json").unlink()
    elif ended == "after a rank had called it failed":
        (lab / "run/exit.json").write_text(json.dumps({"exit_code": 77, "reason": "rank 1 is dead", "step": 2}))
    first, second = (outcome.ok() for outcome in ranks(lab, 2, AGAIN))
    assert first.stderr == "finished the run in run; its product is run/adapter, as its manifest says\n"
    assert "next: finetune evaluate run" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    assert {**lab.ended(), "ended": ""} == {**said, "ended": ""}
    assert lab.adapter() == before


@pytest.mark.parametrize("method", ["lora", "none"])
def test_what_a_restart_reports_is_what_the_run_reported(lab: Lab, method: str) -> None:
    changes = {**PLAIN, "adapter": {"method": method}, "data.validation": "held.jsonl"}
    (first,) = ranks(lab, 1, STARTED, changes, "--json")
    (again,) = ranks(lab, 1, AGAIN, changes, "--json")
    assert again.ok().json == first.ok().json
    assert again.json["validation_loss"] > 0
    assert again.json["product"] == ("run/adapter" if method == "lora" else "run/model")


def test_what_is_not_what_was_saved_is_refused_and_named(lab: Lab) -> None:
    ranks(lab, 1, STARTED)[0].ok()
    weights = lab / "run/adapter/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (outcome,) = ranks(lab, 1, AGAIN)
    assert outcome.returncode == 5
    assert "its adapter/ is not what was saved: adapter_model.safetensors differs from its hash" in outcome.stderr


def test_another_recipe_s_product_is_no_reason_to_end_well(lab: Lab) -> None:
    ranks(lab, 1, STARTED)[0].ok()
    (outcome,) = ranks(lab, 1, AGAIN, {**PLAIN, "training.learning_rate": 0.02})
    assert outcome.returncode == 5
    assert "holds a run of another recipe" in outcome.stderr


def test_a_first_start_still_refuses_a_finished_run(lab: Lab) -> None:
    ranks(lab, 1, STARTED)[0].ok()
    (outcome,) = ranks(lab, 1, STARTED)
    assert outcome.returncode == 5
    assert "is finished; use its adapter/" in outcome.stderr


@pytest.mark.parametrize("own", [True, False], ids=["which it began itself", "which another began"])
def test_a_restart_replaces_no_run_that_its_launcher_has_begun(lab: Lab, own: bool) -> None:
    changes = {"training.save_steps": 2, "training.max_steps": 3}
    ranks(lab, 1, STARTED, changes)[0].ok()
    for path in (lab / "run/adapter").iterdir():
        path.unlink()
    (lab / "run/adapter").rmdir()
    (lab / "run/exit.json").unlink()
    if not own:
        record = json.loads((lab / "run/run.json").read_text())
        (lab / "run/run.json").write_text(json.dumps({**record, "launcher": "elsewhere 1 1"}))
    (outcome,) = ranks(lab, 1, AGAIN, changes, "--overwrite")
    assert ("from run/checkpoints/checkpoint-" in outcome.ok().stderr) is own
    assert manifest_faults(lab / "run/adapter", sealed=True) == []


def test_a_launcher_is_known_by_its_process_and_only_where_there_is_one(tmp_path: Path) -> None:
    assert launcher_of({}) == ""
    mine = launcher_of(STARTED)
    assert mine == launcher_of(AGAIN)
    assert mine.split()[-2] == str(os.getppid())
    assert [is_restart(env) for env in ({}, STARTED, AGAIN)] == [False, False, True]
    (tmp_path / "run.json").write_text(json.dumps({"launcher": ""}))
    assert not begun_by("", RunFolder(tmp_path))
