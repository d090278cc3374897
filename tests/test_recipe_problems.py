"""Everything that is wrong with a recipe is told at once, with its place, in words a user knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import ExitCode, RecipeError
from finetune.recipe import fields
from finetune.recipe.load import load_recipe
from finetune.recipe.origin import Origin
from finetune.recipe.problems import SHOWN, Problem, RecipeProblems
from finetune.recipe.show import recipe_yaml, scalar

MINIMAL = "model: {name_or_path: base}\ndata: {train: rows.jsonl}\noutput_dir: runs/a\n"
TEN = """\
model:
  name_or_path: base
  learning_rate: 3
adapter:
  r: -1
  target_modules: q_proj
data:
  train: {pth: x.jsonl, weight: "2"}
training:
  learning_rat: 1e-4
  seed: 3.0
  activation_checkpointing: yes
  lr_scheduler_type: cosin
  extra: {bf16: true, hub_token: hf_abc, adam_beta1: .inf}
micro_batch_size: 4
tracking: none
"""


def lines(folder: Path, text: str) -> list[str]:
    """What a recipe of this text is refused with, without the folder."""
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeProblems) as caught:
        load_recipe(path)
    assert caught.value.exit_code == ExitCode.RECIPE
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def only(folder: Path, text: str) -> str:
    found = lines(folder, text)
    assert len(found) == 1, found
    return found[0]


def test_ten_mistakes_and_more_are_told_in_one_run_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert [line.split(" ")[0] + " " + line.split(" ")[1] for line in lines(tmp_path, TEN)] == [
        "r.yaml: output_dir:",
        "r.yaml:3:3: model.learning_rate:",
        "r.yaml:5:6: adapter.r:",
        "r.yaml:6:19: adapter.target_modules:",
        "r.yaml:8:11: data.train[0].pth:",
        "r.yaml:8:33: data.train[0].weight:",
        "r.yaml:10:3: training.learning_rat:",
        "r.yaml:11:9: training.seed:",
        "r.yaml:12:29: training.activation_checkpointing:",
        "r.yaml:13:22: training.lr_scheduler_type:",
        "r.yaml:14:11: training.extra.bf16:",
        "r.yaml:14:23: training.extra.hub_token:",
        "r.yaml:14:54: training.extra.adam_beta1:",
        "r.yaml:15:1: micro_batch_size:",
        "r.yaml:16:11: tracking:",
    ]


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        (
            "adapter: {r: '8'}",
            'adapter.r: expected a whole number from 1 to 65,536, found the text "8"; write it without quotes',
        ),
        ("adapter: {r: 1_6}", 'found the text "1_6"; write 16'),
        ("adapter: {r: true}", "adapter.r: expected a whole number from 1 to 65,536, found true"),
        ("adapter: {r: 8.5}", "adapter.r: expected a whole number from 1 to 65,536, found 8.5"),
        ("adapter: {r: null}", "found nothing (null); leave the key out for its default, 16"),
        ("adapter: {r: [8]}", "found a list; write the value without brackets"),
        ("adapter: {r: {a: 1}}", "found a mapping with a"),
        ("adapter: {lora_dropout: 1}", "expected a number of at least 0 and below 1, found 1"),
        ("adapter: {lora_dropout: .nan}", "adapter.lora_dropout: is not a finite number"),
        ("adapter: {target_modules: []}", "adapter.target_modules: name at least one module, or write auto"),
        ("adapter: {target_modules: [1]}", "adapter.target_modules[0]: expected text, found 1; put it in quotes"),
        ("adapter: {method: qlora}", "write lora, with model.quantization: nf4"),
        ("adapter: {use_rslora: no}", 'expected true or false, found the text "no"; write false'),
        ("adapter: {use_rslora: 'true'}", "write it without quotes"),
        ("adapter: qlora", "adapter: is a section: expected its keys below it"),
        ("adapter: [r]", "adapter: is a section: expected its keys below it, found a list"),
        ("training: {learning_rate: 0}", "training.learning_rate: expected a number above 0, found 0"),
        ("training: {learning_rate: 1e999}", "is not a finite number"),
        ("training: {optim: 3}", "training.optim: expected text, found 3; put it in quotes"),
        ("training: {extra: 3}", "training.extra: expected a mapping of names to values, found 3"),
        ("training: {activation_checkpointing: on}", "write true"),
        (
            "training: {global_batch_size: 16, per_device_train_batch_size: 3}",
            "3 does not divide training.global_batch_size, 16; 2 does",
        ),
        ("export: {max_shard_size: 5 gigs}", "Largest weight file, as 500MB or 5GB"),
        ("launch: {device: cuda}", 'found the text "cuda"; write accelerator'),
        (
            "tracking: {trackers: wandb}",
            'tracking.trackers: expected a list of texts, found the text "wandb"; write a list: [wandb]',
        ),
        ("evaluate: {data: 5}", "evaluate.data: expected a path, or a list of sources, found 5"),
        ("evaluate: {data: [5]}", "evaluate.data[0]: expected a path, or a mapping with path, found 5"),
        (
            "evaluate: {data: {format: text}}",
            "evaluate.data[0].path: is required and missing; add under evaluate.data[0]: path:",
        ),
        ("evaluate: {data: ''}", 'evaluate.data[0].path: expected text, not empty, found the text ""'),
        ("wandb: {api_key: x}", "wandb.api_key: a recipe holds no secrets"),
        ("trainning: {seed: 1}", "trainning: unknown key; did you mean training?"),
        ("zzz: 1", "zzz: unknown key; a recipe has model, adapter, data"),
    ],
)
def test_a_wrong_value_is_told_in_human_words(tmp_path: Path, addition: str, expected: str) -> None:
    found = lines(tmp_path, f"{MINIMAL}{addition}\n")
    assert any(expected in line for line in found), found
    assert all(line.startswith("r.yaml:4:") for line in found)
    for jargon in ("Input should", "valid integer", "pydantic", "type=", "Value error", "NoneType"):
        assert not any(jargon in line for line in found)


def test_quantised_weights_are_not_trained_in_full(tmp_path: Path) -> None:
    text = MINIMAL.replace("base}", "base, quantization: nf4}") + "adapter: {method: none}\n"
    assert "r.yaml:1:43: model.quantization: quantised weights cannot be trained" in only(tmp_path, text)


def test_what_is_missing_is_told_with_the_place_to_add_it(tmp_path: Path) -> None:
    assert lines(tmp_path, "adapter: {r: 8}\ndata:\n  packing: true\n") == [
        "r.yaml: model.name_or_path: is required and missing; add under model: name_or_path: <text, not empty>",
        "r.yaml: output_dir: is required and missing; add at the top level: output_dir: <text, not empty>",
        "r.yaml:2:1: data.train: is required and missing; add under data: train: <a path, or a list of sources>",
    ]


def test_a_key_that_was_offered_is_not_also_called_missing(tmp_path: Path) -> None:
    text = "base_model: x\ndatset: {train: a}\nouput_dir: o\ndata: {trian: a}\n"
    assert [line.split(":")[1] for line in lines(tmp_path, text)] == ["1", "2", "3", "4"]


def test_reading_problems_and_recipe_problems_come_together(tmp_path: Path) -> None:
    text = MINIMAL + "adapter:\n  r: &a 8\n  lora_alpha: *a\n  use_rslora: 3\n<<: {x: 1}\n"
    found = lines(tmp_path, text)
    assert [line.split(" ")[0] for line in found] == ["r.yaml:5:6:", "r.yaml:6:15:", "r.yaml:7:15:", "r.yaml:8:1:"]


def test_a_refused_required_value_is_not_also_called_missing(tmp_path: Path) -> None:
    assert "tags" in only(tmp_path, MINIMAL.replace("rows.jsonl", "!x rows.jsonl"))


def test_a_file_that_is_no_recipe_is_refused_quickly_and_briefly(tmp_path: Path) -> None:
    found = lines(tmp_path, "".join(f"thing{index}: {index}\n" for index in range(5000)))
    assert len(found) == SHOWN + 1
    assert found[-1].startswith("... and ")


def test_problems_sort_by_file_and_place_and_do_not_repeat() -> None:
    places = [
        Origin("override", "override 1: x"),
        Origin("file", "b", 9, 1),
        Origin("file", "b", 2, 5),
        Origin("file", "b"),
    ]
    problems = [Problem(place, "k", "m") for place in (*places, places[1], Origin("file", "a", 30, 1))]
    error = RecipeProblems(problems, ["b", "a"])
    assert [str(problem.origin) for problem in error.problems] == ["b", "b:2:5", "b:9:1", "a:30:1", "override 1: x"]


def test_no_key_comes_or_goes_unannounced(root: Path) -> None:
    """tests/recipe_keys.txt lists the keys; a change of it belongs into CHANGELOG.md."""
    listed = (root / "tests" / "recipe_keys.txt").read_text(encoding="utf-8").split()
    assert len(listed) >= 60
    assert listed == sorted(fields.known_keys())


def test_every_key_says_what_it_does_and_what_it_accepts() -> None:
    known = fields.known_keys()
    assert len(known) >= 60
    for key in known.values():
        assert len(key.help) >= 10, key.path
        assert key.help.endswith("."), key.path
        assert key.expected, key.path
    assert known["adapter.r"].expected == "a whole number from 1 to 65,536"
    assert known["adapter.r"].default == 16
    assert known["training.eval_steps"].expected == "a whole number from 1 to 1,000,000,000, or null"


VALID = {
    "model": {"name_or_path": "base", "dtype": "auto"},
    "adapter": {"r": 8, "target_modules": ["q_proj"]},
    "data": {"train": [{"path": "a.jsonl", "weight": 2.0}], "validation": "v.jsonl"},
    "training": {"learning_rate": 1e-4, "extra": {"adam_beta1": 0.9}},
    "launch": {"num_processes": 2},
    "output_dir": "runs/a",
}
WAYS = [(), ("model",), ("model", "dtype"), ("adapter", "r"), ("adapter", "target_modules"), ("data", "train")]
WAYS += [("data", "train", 0), ("data", "train", 0, "weight"), ("data", "validation"), ("training", "learning_rate")]
WAYS += [("training",), ("training", "extra"), ("launch",), ("output_dir",), ("new",), ("training", "new")]
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS.filter(bool), inner, max_size=3),
    max_leaves=6,
)


def mutated(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """`value` with one place replaced; as it was where the way does not lead anywhere."""
    if not way:
        return new
    if isinstance(value, dict):
        return {**value, way[0]: mutated(value.get(way[0]), way[1:], new)}
    if isinstance(value, list) and isinstance(way[0], int) and way[0] < len(value):
        return [mutated(item, way[1:], new) if index == way[0] else item for index, item in enumerate(value)]
    return value


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(WAYS[1:]), ANYTHING), min_size=1, max_size=3))
def test_a_mutated_recipe_is_loaded_or_refused(tmp_path: Path, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    value: Any = VALID
    for way, new in changes:
        value = mutated(value, way, new)
    path = tmp_path / "r.yaml"
    path.write_text(f"{scalar(value)}\n", encoding="utf-8")
    refused = ""
    try:
        loaded = load_recipe(path)
    except RecipeError as error:
        refused = str(error)
    assert all(line.startswith(f"{path}:") for line in refused.splitlines())
    if not refused:
        path.write_text(recipe_yaml(loaded, origins=True), encoding="utf-8")
        assert load_recipe(path).recipe == loaded.recipe


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=40) | st.builds("{}={}".format, TEXTS, TEXTS), max_size=3))
def test_any_overrides_are_taken_or_refused(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    refused = ""
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        refused = str(error)
    assert not refused or refused.startswith("override ")


def test_a_faulty_recipe_is_refused_in_half_a_second_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(TEN, encoding="utf-8")
    code = """
import sys, time
from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe
try:
    load_recipe(sys.argv[1])
except RecipeError as error:
    print(len(str(error).splitlines()), time.process_time(), *sorted(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=os.environ
    )
    count, seconds, *modules = done.stdout.split()
    assert int(count) == 15
    assert float(seconds) <= 0.5
    assert "pydantic" in modules
    assert not {"torch", "transformers", "trl", "datasets", "numpy", "typer", "rich"} & set(modules)
