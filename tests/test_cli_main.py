"""The command line's roof: fast, light, and every ending with its exit code, also as JSON."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from finetune import __version__, errors
from finetune.cli import main as roof
from finetune.errors import FinetuneError

VERBS = ("train", "evaluate", "merge", "runs", "recipe", "data", "targets", "rehearse", "base", "families")
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "accelerate", "numpy", "pandas")


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[str]]:
    """Put a verb `end` under a command of its own that does what it is told."""

    def make(action: object) -> list[str]:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.callback()
        def _root() -> None:
            pass

        @app.command()
        def end(as_json: bool = typer.Option(False, "--json")) -> None:
            if isinstance(action, BaseException):
                raise action
            roof._answer(action, as_json)

        monkeypatch.setattr(roof, "app", app)
        return ["end"]

    return make


def kinds() -> list[type[FinetuneError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FinetuneError)]


def test_help_names_every_verb(cli) -> None:
    outcome = cli("--help").ok()
    for verb in VERBS:
        assert f"│ {verb} " in outcome.stdout
        assert cli(verb, "--help").returncode == 0
    assert outcome.stderr == ""


def test_version(cli) -> None:
    assert cli("--version").ok().stdout == f"finetune {__version__}\n"


def test_without_a_verb_the_help_is_shown(cli) -> None:
    outcome = cli()
    assert outcome.returncode == 2
    assert "Commands" in outcome.stdout
    assert outcome.stderr == ""


def cpu_seconds(*words: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "finetune", *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("runs",), ("families", "--json")])
def test_light_verbs_take_less_than_half_a_second_of_cpu(words: tuple[str, ...], tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert min(cpu_seconds(*words) for _ in range(3)) < 0.5


@pytest.mark.parametrize("words", [("--help",), ("train", "--help"), ("runs",), ("families",), ("recipe", "--help")])
def test_light_verbs_import_nothing_heavy(words: tuple[str, ...], tmp_path: Path) -> None:
    program = (
        "import sys; from finetune.cli.main import main; code = main(sys.argv[1:]); "
        "print('MODULES', code, *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    _, code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert len(modules) > 100
    assert not {name.split(".")[0] for name in modules} & set(HEAVY)


def test_usage_errors_end_with_two_and_say_where_help_is(cli) -> None:
    outcome = cli("trian")
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert outcome.stderr == "error: No such command 'trian'. Did you mean 'train'?\ntry: finetune --help\n"
    outcome = cli("train", "--json")
    assert outcome.returncode == 2
    assert outcome.json["error"]["kind"] == "UsageError"
    assert outcome.json["error"]["exit_code"] == 2
    assert "finetune train --help" in outcome.json["error"]["message"]


def test_every_fault_of_a_user_ends_with_its_exit_code_and_no_traceback(ending, capsys) -> None:
    assert len(kinds()) >= 12
    for kind in kinds():
        code = roof.main(ending(kind("a.yaml:3:1: no such key 'lr' [x]\n  write learning_rate")))
        captured = capsys.readouterr()
        assert code == kind.exit_code
        assert captured.out == ""
        assert captured.err == "error: a.yaml:3:1: no such key 'lr' [x]\n  write learning_rate\n"


def test_with_json_an_error_is_also_json_on_stdout(ending, capsys) -> None:
    for kind in kinds():
        code = roof.main([*ending(kind("größe fehlt")), "--json"])
        captured = capsys.readouterr()
        fault = {"kind": kind.__name__, "exit_code": code, "message": "größe fehlt"}
        assert json.loads(captured.out) == {"error": fault}
        assert captured.err == "error: größe fehlt\n"


def test_with_json_the_problems_of_a_recipe_come_one_by_one(cli, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "model:\n  name_or_path: x\n  dtyp: auto\ndata: {train: a.jsonl}\nouput_dir: b\n"
    )
    outcome = cli("recipe", "show", "bad.yaml", "--json")
    assert outcome.returncode == 2
    error = outcome.json["error"]
    assert error["kind"] == "RecipeError"
    assert error["problems"][0]["line"] == 3
    assert len(error["problems"]) >= 2
    assert error["message"] in outcome.stderr


def test_an_unexpected_error_keeps_its_traceback_and_says_where_to_report(ending, capsys) -> None:
    assert roof.main([*ending(ZeroDivisionError("by zero")), "--json"]) == 1
    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert captured.err.splitlines()[-1].startswith("this is a defect of finetune; please report it")
    assert json.loads(captured.out)["error"]["kind"] == "UnexpectedError"


def test_a_secret_in_the_text_of_an_error_is_not_printed(ending, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "Zq100s3cr3tV4lueOf")
    for error in (RuntimeError("401 with Zq100s3cr3tV4lueOf"), errors.DataError("no Zq100s3cr3tV4lueOf")):
        roof.main([*ending(error), "--json"])
        captured = capsys.readouterr()
        assert "***" in captured.err
        assert "Zq100" not in captured.err + captured.out


def test_an_interrupt_that_no_run_caught_ends_with_130(ending, capsys) -> None:
    assert roof.main(ending(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert roof.main([*ending(KeyboardInterrupt()), "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "Interrupted"


def test_results_are_json_even_where_a_figure_is_not_finite(ending, capsys) -> None:
    result = {"loss": float("nan"), "steps": [1, float("inf"), 2.5], "name": "Größe"}
    assert roof.main([*ending(result), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"loss": None, "steps": [1, None, 2.5], "name": "Größe"}
    assert "Größe" in out
    assert roof.main(ending(result)) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [("families",), ("families", "--json"), ("--help",)])
def test_a_reader_that_went_away_is_no_fault(words: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "finetune", *words], stdout=pipe, stderr=subprocess.PIPE)
    assert done.returncode == roof.BROKEN_PIPE
    assert done.stderr == b""


def test_families_lists_what_is_known(cli) -> None:
    from finetune.families import FAMILIES

    listed = cli("families", "--json").ok().json
    assert [family["name"] for family in listed] == list(FAMILIES)
    assert len(listed) >= 4
    assert all(family["model_types"] and family["attention"] for family in listed)
    table = cli("families").ok().stdout
    assert all(name in table for name in FAMILIES)


def test_telemetry_is_off_before_anything_else(ending, capsys, monkeypatch) -> None:
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "0")
    assert roof.main(ending({})) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "1"
