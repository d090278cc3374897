"""`finetune evaluate`: what runs, adapters, merged models and bases answer, scored and laid side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import Lab, chats, lab_in, write_rows
from warm import Outcome, Warm

ANSWER = "it is late"

# Every question has one answer, so that a tiny model learns it in a second.
CHANGES = {
    "adapter.r": 8,
    "training.learning_rate": 0.02,
    "training.max_steps": 80,
    "training.num_train_epochs": 100,
    "evaluate": {"data": "held.jsonl", "max_new_tokens": 12, "batch_size": 4},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    """A run that has learnt the answer, with its merged model."""
    lab = lab_in(tmp_path_factory.mktemp("trained"), bases, warm)
    for name in ("train", "held"):
        rows = chats(16 if name == "train" else 6, seed=len(name))
        for row in rows:
            row["messages"][-1]["content"] = ANSWER
        write_rows(lab / f"{name}.jsonl", rows)
    lab.train(CHANGES).ok()
    warm.run("merge", "run", cwd=lab.folder).ok()
    return lab


def evaluate(lab: Lab, *words: str) -> Outcome:
    return lab.warm.run("evaluate", *words, cwd=lab.folder)


def test_a_run_is_scored_before_and_after(trained: Lab) -> None:
    outcome = evaluate(trained, "run").ok()
    written = json.loads((trained / "run/evaluation.json").read_text())
    assert written["rows"] == 6
    assert written["scores"] == {"base": {"exact_match": 0.0}, "adapter": {"exact_match": 1.0}}
    assert [row["place"] for row in written["answers"]] == [f"held.jsonl:{line}" for line in range(1, 7)]
    assert {row["adapter"]["answer"] for row in written["answers"]} == {ANSWER}
    assert {row["reference"] for row in written["answers"]} == {ANSWER}
    table = outcome.stdout
    for words in ("6 held-out rows", "base", "adapter", "exact match", "0.00", "1.00", "question", "reference", ANSWER):
        assert words in table
    assert "run/evaluation.json" in table
    assert "6/6 answered" in outcome.stderr


def test_with_json_stdout_is_one_object(trained: Lab) -> None:
    facts = evaluate(trained, "run", "--json", "--limit", "2").ok().json
    assert facts["rows"] == 2
    assert facts["scores"]["adapter"] == {"exact_match": 1.0}
    assert facts["file"] == "run/evaluation.json"
    assert [answer["adapter"] for answer in facts["answers"]] == [ANSWER, ANSWER]
    assert set(facts["seconds"]) == {"base", "adapter"}


def test_the_base_can_be_left_out(trained: Lab) -> None:
    assert set(evaluate(trained, "run", "--no-base", "--json").ok().json["scores"]) == {"adapter"}


def test_answers_do_not_depend_on_the_batch(trained: Lab) -> None:
    """The untrained base's answers differ from row to row, so padding that leaks would show in them."""
    answers = {}
    for size in (1, 6):
        name = trained.recipe({**CHANGES, "evaluate.batch_size": size}, f"batch-{size}.yaml")
        evaluate(trained, "run", "--recipe", name).ok()
        written = json.loads((trained / "run/evaluation.json").read_text())
        answers[size] = [row["base"]["answer"] for row in written["answers"]]
    assert len(set(answers[1])) > 1
    assert answers[1] == answers[6]


def test_an_adapter_folder_alone_needs_a_recipe(trained: Lab) -> None:
    shutil.copytree(trained / "run/adapter", trained / "elsewhere/bare")
    outcome = evaluate(trained, "elsewhere/bare")
    assert outcome.returncode == 2
    assert "--recipe" in outcome.stderr
    scores = evaluate(trained, "elsewhere/bare", "--recipe", "recipe.yaml", "--json").ok().json["scores"]
    assert scores == {"base": {"exact_match": 0.0}, "adapter": {"exact_match": 1.0}}


def test_the_adapter_folder_of_a_run_finds_the_recipe_of_the_run(trained: Lab) -> None:
    assert evaluate(trained, "run/adapter", "--json").ok().json["file"] == "run/evaluation.json"


def test_a_merged_model_answers_like_its_adapter(trained: Lab) -> None:
    facts = evaluate(trained, "run/merged", "--json").ok().json
    assert facts["scores"] == {"merged": {"exact_match": 1.0}}
    assert facts["file"] == "run/evaluation-merged.json"


def test_a_base_can_be_scored_with_a_recipe(trained: Lab) -> None:
    before = {path.name for path in (trained / "chatml").iterdir()}
    facts = evaluate(trained, "chatml", "--recipe", "recipe.yaml", "--json").ok().json
    assert facts["scores"] == {"model": {"exact_match": 0.0}}
    assert {path.name for path in (trained / "chatml").iterdir()} == before, "a base is not ours to write into"


def test_a_recipe_without_held_out_rows_is_refused(trained: Lab) -> None:
    name = trained.recipe({**CHANGES, "evaluate": {}}, "none.yaml")
    outcome = evaluate(trained, "run", "--recipe", name)
    assert outcome.returncode == 2
    assert "evaluate.data: the recipe names no held-out rows" in outcome.stderr


def test_bad_held_out_rows_are_told_with_their_lines(trained: Lab) -> None:
    write_rows(trained / "bad.jsonl", [*chats(2), {"messages": [{"role": "user", "content": "why?"}]}])
    name = trained.recipe({**CHANGES, "evaluate.data": "bad.jsonl"}, "bad.yaml")
    outcome = evaluate(trained, "run", "--recipe", name)
    assert outcome.returncode == 3
    assert "bad.jsonl:3" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_rows_that_the_scorer_cannot_take_are_refused_before_anything_answers(trained: Lab) -> None:
    name = trained.recipe({**CHANGES, "evaluate.scorer": "json_fields"}, "fields.yaml")
    outcome = evaluate(trained, "run", "--recipe", name)
    assert outcome.returncode == 3
    assert "held.jsonl:1: evaluate.scorer: json_fields needs answers that are JSON objects" in outcome.stderr
    assert "and 3 more rows" in outcome.stderr
    assert "answered" not in outcome.stderr


def test_an_unknown_scorer_names_the_nearest(trained: Lab) -> None:
    outcome = evaluate(trained, "run", "--recipe", trained.recipe({**CHANGES, "evaluate.scorer": "exact"}, "s.yaml"))
    assert outcome.returncode == 2
    assert "unknown scorer 'exact'" in outcome.stderr
    assert "exact_match" in outcome.stderr


@pytest.mark.parametrize("target", ["nothing/here", "./none", "train.jsonl"])
def test_what_does_not_answer_is_refused(trained: Lab, target: str) -> None:
    outcome = evaluate(trained, target, "--recipe", "recipe.yaml")
    assert outcome.returncode in (4, 5)
    assert target.removeprefix("./") in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_run_that_was_stopped_has_nothing_to_score(lab: Lab) -> None:
    lab.train({"model.name_or_path": "infinite"})
    outcome = evaluate(lab, "run")
    assert outcome.returncode == 5
    assert "no adapter yet" in outcome.stderr
    assert "loss nan" in outcome.stderr


def test_an_adapter_on_a_quantised_base_is_scored_on_it(lab: Lab) -> None:
    rows = chats(16)
    for row in rows:
        row["messages"][-1]["content"] = ANSWER
    write_rows(lab / "train.jsonl", rows)
    lab.train({**CHANGES, "model.quantization": "nf4", "evaluate.data": "train.jsonl"}).ok()
    assert evaluate(lab, "run", "--no-base", "--json").ok().json["scores"]["adapter"]["exact_match"] == 1.0


def test_a_base_that_changed_since_the_training_is_refused(lab: Lab) -> None:
    lab.own_base("chatml")
    lab.train({**CHANGES, "training.max_steps": 1, "evaluate.data": "train.jsonl"}).ok()
    weights = lab / "chatml/model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
    outcome = evaluate(lab, "run")
    assert outcome.returncode == 5
    assert "chatml is not the base that was trained on: model.safetensors changed since" in outcome.stderr
    assert not (lab / "run/evaluation.json").exists()


def test_a_run_is_scored_from_another_working_folder(trained: Lab, tmp_path: Path) -> None:
    """Its recipe names the base by a path that means nothing there."""
    recipe = trained.recipe({**CHANGES, "evaluate.data": str(trained / "held.jsonl")}, "absolute.yaml")
    words = ("evaluate", str(trained / "run"), "--recipe", str(trained / recipe), "--json")
    scores = trained.warm.run(*words, cwd=tmp_path).ok().json["scores"]
    assert scores == {"base": {"exact_match": 0.0}, "adapter": {"exact_match": 1.0}}
