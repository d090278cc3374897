"""A run goes on only while it is made of the same things; what has changed is listed, and accepted only by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Lab, chats, lab_in, write_rows
from warm import Warm

from finetune.errors import RecipeError, RefusedError
from finetune.files import staged_folder, write_json
from finetune.run.folder import RunFolder
from finetune.run.resume import (
    WHOLE,
    Drift,
    accept,
    check_keys,
    check_names,
    counting_keys,
    drifts,
    find,
    made_before,
)

# -- names ---------------------------------------------------------------------------------------------------------

RECIPE = {
    "model": {"name_or_path": "x", "dtype": "auto"},
    "adapter": {"r": 16, "lora_alpha": 32},
    "data": {"train": [{"path": "a.jsonl", "format": "auto", "weight": 1.0}], "max_length": 512, "cache_dir": None},
    "training": {"learning_rate": 0.01, "seed": 42, "save_steps": 3, "extra": {"hub_token": "abc", "adam_beta1": 0.8}},
    "launch": {"num_processes": None, "timeout": 600.0},
    "tracking": {"trackers": ["wandb"]},
    "output_dir": "run",
}


def test_the_keys_that_count_are_those_that_change_the_weights() -> None:
    assert counting_keys(RECIPE) == {
        "model.dtype": "auto",
        "adapter.r": 16,
        "adapter.lora_alpha": 32,
        "data.train[0].format": "auto",
        "data.train[0].weight": 1.0,
        "data.max_length": 512,
        "training.learning_rate": 0.01,
        "training.seed": 42,
        "training.extra.hub_token": "***",
        "training.extra.adam_beta1": 0.8,
    }


def test_a_key_that_a_release_adds_differs_in_nothing_while_it_has_its_default() -> None:
    assert drifts({}, {"training.seed": 42}) == []
    assert drifts({}, {"training.seed": 43}) == [Drift("training.seed", None, 43)]
    assert drifts({"data.train[0].weight": 1.0}, {"data.train[0].weight": 1.0, "data.train[1].weight": 2.0}) == [
        Drift("data.train[1].weight", None, 2.0)
    ]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run that has begun."""
    folder = RunFolder(tmp_path / "run")
    made_of = {"recipe": counting_keys(RECIPE), "found": {"parallelism": WHOLE, "world_size": 1}}
    folder.begin("", {"recipe_hash": "abc", "made_of": made_of}, [], None)
    return folder


@pytest.mark.parametrize(
    ("name", "accepts"),
    [
        ("learning_rate", True),
        ("training.learning_rate", True),
        ("training", True),
        ("rate", False),
        ("learning", False),
        ("data", False),
        ("training.learning_rat", False),
    ],
)
def test_a_difference_is_accepted_by_its_key_its_last_word_or_its_section(
    run: RunFolder, name: str, accepts: bool
) -> None:
    changed = [Drift("training.learning_rate", 0.01, 0.02)]
    if accepts:
        assert accept(changed, run, [name]) == tuple(changed)
    else:
        with pytest.raises(RefusedError, match=r"training\.learning_rate: 0\.01 → 0\.02"):
            accept(changed, run, [name])


def test_a_refusal_lists_everything_and_says_what_would_accept_it(run: RunFolder) -> None:
    changed = [
        Drift("training.learning_rate", 0.01, 0.02),
        Drift("data.rows", "a" * 64, "b" * 64),
        Drift("base.model.safetensors", "c" * 64, None),
        Drift("adapter.r", 16, 8),
        Drift("training.seed", 1, 2),
    ]
    with pytest.raises(RefusedError) as caught:
        accept(changed, run, ["seed"])
    assert str(caught.value).splitlines()[1:] == [
        "  training.learning_rate: 0.01 → 0.02",
        "  data.rows: aaaaaaaaaaaa → bbbbbbbbbbbb",
        "  base.model.safetensors: cccccccccccc → nothing",
        "  adapter.r: 16 → 8 (cannot be accepted: the saved weights have another shape)",
        "Undo the change, choose another output_dir, pass --overwrite to train again, or accept it: --allow-drift "
        "seed,training.learning_rate,data.rows,base",
    ]
    with pytest.raises(RefusedError) as caught:
        accept(changed[3:4], run, ["adapter", "r"])
    assert "--allow-drift" not in str(caught.value)


def test_what_was_accepted_once_needs_no_name_again(run: RunFolder) -> None:
    drift = Drift("training.learning_rate", 0.01, 0.02)
    entry = {"name": drift.name, "old": drift.old, "new": drift.new}
    write_json(run.record, {"recipe_hash": "abc", "resumed": [{"step": 4, "accepted": [entry]}]})
    assert accept([drift], run, []) == (drift,)
    with pytest.raises(RefusedError):
        accept([Drift("training.learning_rate", 0.01, 0.03)], run, [])


@pytest.mark.parametrize(("old", "new"), [(None, 16.0), (16.0, None)])
def test_groups_of_parameters_that_come_or_go_are_never_accepted(run: RunFolder, old: Any, new: Any) -> None:
    with pytest.raises(
        RefusedError, match=r"loraplus_lr_ratio: .* \(cannot be accepted: .* other groups of parameters"
    ):
        accept([Drift("adapter.loraplus_lr_ratio", old, new)], run, ["loraplus_lr_ratio"])
    changed = [Drift("adapter.loraplus_lr_ratio", 16.0, 8.0)]
    assert accept(changed, run, ["loraplus_lr_ratio"]) == tuple(changed)


@pytest.mark.parametrize(
    "name", ["learning_rate", "data", "data.rows", "data.train[0].format", "base", "versions.torch", "training.extra.x"]
)
def test_a_name_that_something_has_may_be_given(name: str) -> None:
    check_names([name])


def test_a_name_that_nothing_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="nothing is called 'learning_rat'; did you mean learning_rate"):
        check_names(["data", "learning_rat"])
    for misspelt, meant in (("versions.torhc", "versions.torch"), ("data.rosw", "data.rows")):
        with pytest.raises(RecipeError, match=f"nothing is called '{misspelt}'; did you mean {meant}"):
            check_names([misspelt])
    with pytest.raises(RecipeError, match="nothing is called 'zzz'; name a key of the recipe, or one of data"):
        check_names(["zzz"])


def test_the_newest_checkpoint_says_what_the_run_was_made_of(run: RunFolder) -> None:
    assert made_before(run)["found"]["world_size"] == 1
    made_of = {"recipe": counting_keys(RECIPE), "found": {"parallelism": WHOLE, "world_size": 2}}
    with staged_folder(run.checkpoints / "checkpoint-4", {"made_of": made_of}) as staging:
        (staging / "weights").touch()
    assert made_before(run) == made_of
    assert find(run, made_of, []).step == 4
    with pytest.raises(RefusedError, match="world_size: 2 → 1"):
        find(run, {**made_of, "found": {"parallelism": WHOLE, "world_size": 1}}, [])
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    assert find(run, {**made_of, "found": {"parallelism": WHOLE, "world_size": 1}}, []).checkpoint is None


def test_what_a_manifest_with_a_flipped_bit_says_is_not_believed(run: RunFolder) -> None:
    made_of = {"recipe": counting_keys(RECIPE), "found": {"parallelism": WHOLE, "world_size": 2}}
    for step in (4, 8):
        with staged_folder(run.checkpoints / f"checkpoint-{step}", {"made_of": made_of}):
            pass
    manifest = run.checkpoints / "checkpoint-8" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 2', '"world_size": 3'))
    assert made_before(run) == made_of
    assert find(run, made_of, []).step == 4


def test_what_a_checkpoints_state_is_tied_to_cannot_be_accepted(run: RunFolder) -> None:
    made_of = {"recipe": {}, "found": {"parallelism": "DeepSpeed ZeRO-2", "world_size": 2}}
    fewer = {"recipe": {}, "found": {"parallelism": "DeepSpeed ZeRO-2", "world_size": 1}}
    shutil.rmtree(run.checkpoints / "checkpoint-4", ignore_errors=True)
    for step, bound in ((6, []), (8, ["parallelism", "world_size"])):
        with staged_folder(run.checkpoints / f"checkpoint-{step}", {"made_of": made_of, "bound": bound}):
            pass
        if not bound:
            assert len(find(run, fewer, ["world_size"]).accepted) == 1
    with pytest.raises(RefusedError, match=r"world_size: 2 → 1 \(cannot be accepted"):
        find(run, fewer, ["world_size"])
    with pytest.raises(RefusedError, match=r"parallelism: DeepSpeed ZeRO-2 → .* \(cannot be accepted"):
        find(run, {"recipe": {}, "found": {"parallelism": WHOLE, "world_size": 2}}, ["parallelism"])


def test_a_run_that_kept_no_keys_is_another_recipes(run: RunFolder) -> None:
    write_json(run.record, {"recipe_hash": "abc"})
    with pytest.raises(RefusedError, match="holds a run of another recipe"):
        check_keys(run, RECIPE, ["training"])


# -- whole commands --------------------------------------------------------------------------------------------------

CHANGES = {
    "adapter.lora_dropout": 0.1,
    "training.max_steps": 12,
    "training.num_train_epochs": 100,
    "training.save_steps": 4,
    "training.per_device_train_batch_size": 2,
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    """A run that was cut short after checkpoint-8; `whole` is the same run, undisturbed."""
    lab = lab_in(tmp_path_factory.mktemp("cut"), bases, warm)
    lab.train({**CHANGES, "output_dir": "whole"}).ok()
    env = {"FAULT": "kill:1:.checkpoint-12.tmp"}
    assert (
        warm.run("train", lab.recipe(CHANGES), cwd=lab.folder, entry="faults:main", env=_faults(env)).returncode == -9
    )
    return lab


def _faults(env: dict[str, str]) -> dict[str, str]:
    import os

    return {**env, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(Path(__file__).parent)])}


@pytest.fixture
def again(cut: Lab, tmp_path: Path, bases: Path, warm: Warm) -> Lab:
    """A copy of it."""
    lab = lab_in(tmp_path, bases, warm)
    shutil.copytree(cut / "run", lab / "run")
    return lab


def test_nothing_has_changed(again: Lab, cut: Lab) -> None:
    outcome = again.train(CHANGES).ok()
    assert "resume   from run/checkpoints/checkpoint-8" in outcome.stderr
    assert "accepted" not in outcome.stderr
    assert again.adapter() == cut.adapter("whole")
    record = json.loads((again / "run/run.json").read_text())
    assert [(entry["step"], entry["accepted"]) for entry in record["resumed"]] == [(8, [])]


def _data(lab: Lab) -> dict[str, Any]:
    write_rows(lab / "train.jsonl", reversed(chats(16)))
    return {}


def _base(lab: Lab) -> dict[str, Any]:
    config = lab.own_base("chatml") / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    return {}


def _code(lab: Lab) -> dict[str, Any]:
    (lab.own_base("chatml") / "modeling_own.py").write_text("")
    return {"model.trust_remote_code": True}


def _template(lab: Lab) -> dict[str, Any]:
    template = lab.own_base("chatml") / "chat_template.jinja"
    template.write_text(template.read_text().replace("You answer briefly.", "You answer."))
    return {}


def _tokenizer(lab: Lab) -> dict[str, Any]:
    path = lab.own_base("chatml") / "tokenizer.json"
    facts = json.loads(path.read_text())
    merges = facts["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    path.write_text(json.dumps(facts))
    return {}


def _versions(lab: Lab) -> dict[str, Any]:
    place = lab / "trl-0.0.1.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 0.0.1\n")
    return {}


def key(name: str, value: Any) -> Callable[[Lab], dict[str, Any]]:
    """A recipe with another value."""
    return lambda lab: {name: value}


DRIFTS: dict[str, tuple[Callable[[Lab], dict[str, Any]], str, str]] = {
    "data": (_data, "data.rows: ", "data"),
    "base": (_base, "base.config.json: ", "base"),
    "code": (_code, "base.modeling_own.py: nothing → e3b0c44298fc", "base"),
    "template": (_template, "template: ", "template,data"),
    "tokenizer": (_tokenizer, "tokenizer: ", "tokenizer,data"),
    "batch": (key("training.global_batch_size", 8), "training.global_batch_size: 4 → 8 (cannot be", ""),
    "micro-batch": (
        key("training.per_device_train_batch_size", 4), "training.per_device_train_batch_size: 2 → 4",
        "per_device_train_batch_size",
    ),
    "seed": (key("training.seed", 7), "training.seed: 42 → 7", "seed"),
    "learning rate": (key("training.learning_rate", 0.02), "training.learning_rate: 0.01 → 0.02", "learning_rate"),
    "alpha": (key("adapter.lora_alpha", 16), "adapter.lora_alpha: 8 → 16", "adapter"),
    "r": (key("adapter.r", 8), "adapter.r: 4 → 8 (cannot be accepted: the saved weights have another shape)", ""),
    "targets": (key("adapter.target_modules", ["q_proj"]), "adapter.target_modules: auto → ['q_proj'] (cannot", ""),
    "versions": (_versions, "versions.trl: ", "versions"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(DRIFTS))
def test_a_change_is_refused_by_name_and_what_was_accepted_counts(again: Lab, kind: str) -> None:
    change, said, names = DRIFTS[kind]
    changes = {**CHANGES, **change(again)}
    env = again.importable()
    before = (again / "run/run.json").read_bytes()
    refused = again.train(changes, env=env)
    assert refused.returncode == 5, refused.stderr
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (again / "run/run.json").read_bytes() == before
    if names:
        outcome = again.train(changes, "--allow-drift", names, env=env).ok()
        assert f"accepted: {said}" in outcome.stderr
        resumed = json.loads((again / "run/run.json").read_text())["resumed"][-1]
        assert said.split(":")[0] in [entry["name"] for entry in resumed["accepted"]]


def test_an_accepted_learning_rate_is_the_one_that_trains(again: Lab) -> None:
    changes = {**CHANGES, "training.learning_rate": 0.02}
    again.train({**changes, "output_dir": "other"}).ok()
    again.train(changes, "--allow-drift", "learning_rate").ok()
    rates = {run: [line["learning_rate"] for line in again.metrics(run) if "loss" in line] for run in ("run", "other")}
    assert rates["run"][8:] == rates["other"][8:]
    assert rates["run"][:8] == [rate / 2 for rate in rates["other"][:8]]


@pytest.mark.parametrize(("key", "value"), [("max_steps", 4), ("num_train_epochs", 1)])
def test_fewer_steps_than_are_done_are_refused_and_nothing_is_touched(again: Lab, key: str, value: int) -> None:
    changes = {**CHANGES, "training.max_steps": None, f"training.{key}": value}
    before = (again / "run/run.json").read_bytes()
    outcome = again.train(changes, "--allow-drift", "max_steps,num_train_epochs")
    assert outcome.returncode == 5, outcome.stderr
    assert "has made 8 steps, and this recipe asks for 4, by training.max_steps, or by" in outcome.stderr
    assert (again / "run/run.json").read_bytes() == before
    assert not (again / "run/exit.json").exists()
    changes[f"training.{key}"] = 2 * value
    again.train(changes, "--allow-drift", "max_steps,num_train_epochs").ok()
    assert again.ended()["step"] == 8


def test_names_may_be_given_one_by_one(again: Lab) -> None:
    changes = {**CHANGES, "training.learning_rate": 0.02, "training.seed": 7}
    outcome = again.train(changes, "--allow-drift", "learning_rate", "--allow-drift", "seed").ok()
    assert outcome.stderr.count("accepted: training.") == 2


def test_a_misspelt_name_is_refused_at_once(again: Lab) -> None:
    outcome = again.train(CHANGES, "--allow-drift", "learning_rat", "--allow-drift", "seed")
    assert outcome.returncode == 2
    assert "did you mean learning_rate" in outcome.stderr


def test_the_rows_may_move_and_what_does_not_touch_the_weights_may_change(again: Lab, cut: Lab) -> None:
    (again / "train.jsonl").rename(again / "moved.jsonl")
    changes = {"data.train": "moved.jsonl", "training.logging_steps": 3, "training.save_steps": 1}
    again.train({**CHANGES, **changes, "training.save_total_limit": 3}).ok()
    assert again.adapter() == cut.adapter("whole")
    kept = {path.name for path in (again / "run/checkpoints").iterdir()}
    assert kept == {"checkpoint-10", "checkpoint-11", "checkpoint-12"}
    assert [line["step"] for line in again.metrics() if "loss" in line] == [*range(1, 10), 12]


def test_a_line_of_the_log_is_of_all_its_steps_though_the_run_was_cut_between_them(lab: Lab) -> None:
    changes = {**CHANGES, "training.logging_steps": 5}
    lab.train({**changes, "output_dir": "whole"}).ok()
    env = _faults({"FAULT": "kill:1:.checkpoint-12.tmp"})
    assert lab.train(changes, entry="faults:main", env=env).returncode == -9
    lab.train(changes).ok()
    logs = [
        [(line["step"], line.get("loss"), line.get("trained_tokens")) for line in lab.metrics(run) if "loss" in line]
        for run in ("run", "whole")
    ]
    assert [step for step, *_ in logs[0]] == [1, 5, 10, 12]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_a_line_of_the_log_of_two_ranks_is_of_all_its_steps_also_where_one_goes_on(lab: Lab, mode: str) -> None:
    changes = {**CHANGES, "training.logging_steps": 5, "training.per_device_train_batch_size": 1}
    changes |= {"launch.config": mode} if mode != "ddp" else {}
    for outcome in lab.warm.ranks(2, lab.recipe({**changes, "output_dir": "whole"}), cwd=lab.folder):
        outcome.ok()
    recipe = lab.recipe(changes)
    env = _faults({"FAULT": "kill:1:.checkpoint-12.tmp"})
    children = lab.warm.start_ranks(2, recipe, cwd=lab.folder, entry="faults:train", env=env)
    assert children[0].wait(60).returncode == -9
    for child in children:
        child.kill()
    shutil.copytree(lab / "run", lab / "one")
    for outcome in lab.warm.ranks(2, recipe, cwd=lab.folder):
        outcome.ok()
    alone = {name: value for name, value in changes.items() if name != "launch.config"} | {"output_dir": "one"}
    lab.train(
        {**alone, "training.per_device_train_batch_size": 2},
        "--allow-drift",
        "world_size,parallelism,per_device_train_batch_size",
    ).ok()
    logs = {
        run: [[line[key] for key in ("step", "loss", "trained_tokens")] for line in lab.metrics(run) if "loss" in line]
        for run in ("run", "one", "whole")
    }
    assert logs["run"] == logs["whole"]
    assert [line[0] for line in logs["one"]] == [line[0] for line in logs["whole"]]
    assert [line[2] for line in logs["one"]] == [line[2] for line in logs["whole"]]
    assert [line[1] for line in logs["one"]] == pytest.approx([line[1] for line in logs["whole"]], rel=0.05)


def test_a_run_that_goes_on_is_measured_as_often_as_its_recipe_now_says(lab: Lab) -> None:
    rows = chats(24)
    write_rows(lab / "train.jsonl", rows[:16])
    write_rows(lab / "val.jsonl", rows[16:])
    changes = {**CHANGES, "data.validation": "val.jsonl", "training.eval_steps": 6}
    struck = lab.train(changes, entry="faults:main", env=_faults({"FAULT": "kill:1:.checkpoint-12.tmp"}))
    assert struck.returncode == -9
    lab.train({**changes, "training.eval_steps": 1}).ok()
    assert [line["step"] for line in lab.metrics() if "eval_loss" in line] == [6, 9, 10, 11, 12]


def test_a_file_put_into_the_newest_checkpoint_stays_and_the_run_goes_on_from_the_one_before(
    again: Lab, cut: Lab
) -> None:
    (again / "run/checkpoints/checkpoint-8/notes.txt").write_text("mine")
    manifest = again / "run/checkpoints/checkpoint-8/manifest.json"
    flipped = manifest.read_text().replace('"training.learning_rate": 0.01', '"training.learning_rate": 0.03')
    assert flipped != manifest.read_text()
    manifest.write_text(flipped)
    outcome = again.train({**CHANGES, "training.save_total_limit": 1}).ok()
    assert "passed over checkpoint-8: manifest.json differs from its seal" in outcome.stderr
    assert "checkpoint-8 is called checkpoint-8.aside now" in outcome.stderr
    assert (again / "run/checkpoints/checkpoint-8.aside/notes.txt").read_text() == "mine"
    assert again.adapter() == cut.adapter("whole")
