"""`finetune recipe`: every verb, its JSON, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finetune.cli.recipe import app
from finetune.errors import ExitCode
from finetune.recipe.load import load_recipe

TEXT = "# Mine.\nmodel: {name_or_path: base}\ndata: {train: rows.jsonl}\noutput_dir: runs/a\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(TEXT, encoding="utf-8")
    return "r.yaml"


def printed(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result.stdout


def test_show_prints_a_recipe_that_loads(recipe: str) -> None:
    text = printed("show", recipe, "adapter.r=4", "training.learning_rate=1e-3")
    Path("shown.yaml").write_text(text, encoding="utf-8")
    assert (
        load_recipe("shown.yaml").recipe == load_recipe(recipe, ["adapter.r=4", "training.learning_rate=1e-3"]).recipe
    )
    assert "# override 1: adapter.r=4" in printed("show", recipe, "adapter.r=4", "--origins")


def test_show_as_json(recipe: str) -> None:
    facts: dict[str, Any] = json.loads(printed("show", recipe, "--json", "--origins"))
    assert facts["recipe"] == load_recipe(recipe).resolved()
    assert facts["hash"] == load_recipe(recipe).hash()
    assert facts["origins"]["model.name_or_path"] == "r.yaml:2:9"


def test_explain_says_value_origin_and_help(recipe: str) -> None:
    text = printed("explain", recipe, "adapter.r", "adapter.r=4")
    assert text.splitlines()[:3] == [
        "adapter.r: 4",
        "  from      override 1: adapter.r=4",
        "  expected  a whole number from 1 to 65,536",
    ]
    assert text.endswith("Rank of the LoRA matrices.\n")
    assert "keys      method, r, lora_alpha" in printed("explain", recipe, "adapter")
    assert json.loads(printed("explain", recipe, "adapter.r", "--json"))["default"] == 16


def test_check_tells_problems_in_json_with_its_code(recipe: str) -> None:
    assert printed("check", recipe) == (
        "r.yaml: ok (3 keys set, the rest by default); `finetune train` reads what it names\n"
    )
    assert json.loads(printed("check", recipe, "--json"))["ok"] is True
    answer = json.loads(printed("check", recipe, "adapter.rr=1", "zzz=1", "--json", code=ExitCode.RECIPE))
    assert answer["ok"] is False
    assert [problem["key"] for problem in answer["problems"]] == ["adapter.rr", "zzz"]


def test_schema_list_and_copy(recipe: str) -> None:
    assert json.loads(printed("schema"))["properties"]["extends"]
    listed = json.loads(printed("list", "--json"))
    assert len(printed("list").splitlines()) == max(len(listed), 1)
    for item in listed[:1]:
        written = json.loads(printed("copy", item["name"], "copied.yaml", "--json"))["written"]
        assert written[0] == "copied.yaml"
        assert load_recipe("copied.yaml")


def test_a_faulty_recipe_at_the_door_has_no_traceback(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(TEXT + "adapter: {rr: 1}\n", encoding="utf-8")
    done = cli("recipe", "check", "bad.yaml")
    assert done.returncode == ExitCode.RECIPE
    assert "bad.yaml:5:11: adapter.rr: unknown key; did you mean adapter.r?" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr


def test_show_states_the_precisions_on_this_machine(recipe: str) -> None:
    facts = json.loads(printed("show", recipe, "model.dtype=float32", "--here", "--json"))
    assert facts["derived"] == {
        "model.dtype": "float32",
        "dtype of matrix products": "float32",
        "dtype of the base": "float32",
        "dtype of the trained weights": "float32",
        "dtype of the optimizer state": "float32",
    }
