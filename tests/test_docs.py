"""The documents are true: commands parse, recipes load, rows convert, files exist, tables are fresh."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoTokenizer
from typer.exceptions import TyperException

from finetune.cli import main as roof
from finetune.data.cache import Cache
from finetune.data.engine import Settings
from finetune.data.examples import check_sources, refuse
from finetune.data.prepare import prepare
from finetune.data.preview import PreviewedRow, Previewer
from finetune.data.tokenizer import Vocabulary
from finetune.errors import DataError, ExitCode
from finetune.families import FAMILIES
from finetune.formats import FORMATS
from finetune.recipe.load import load_recipe
from finetune.recipe.problems import RecipeProblems
from finetune.recipe.sections import AuditOptions, DataOptions, Source
from finetune.recipe.shipped import shipped_recipes
from finetune.registry import resolve

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OURS = ("recipes/", "configs/", "data/", "docs/", "tests/", "finetune/")
MADE = ("data/smollm2-135m-instruct",)  # `finetune base` makes it


@dataclass(frozen=True)
class Command:
    """A line of a shell block.

    Attributes:
        page: the document.
        line: the line as it stands there.
        words: its words, without a comment.
    """

    page: Path
    line: str
    words: tuple[str, ...]


def name(value: Any) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


def blocks(page: Path, kind: str) -> list[str]:
    """The contents of a page's fenced blocks of one kind."""
    return [text for info, text in BLOCK.findall(page.read_text(encoding="utf-8")) if info == kind]


def commands() -> list[Command]:
    """Every command of every shell block, and those of the demo and of inline code."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
        outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
        lines += [code for code in re.findall(r"`([^`\n]+)`", outside) if re.match(r"finetune [a-z]+ \S*/", code)]
        found += [command for line in lines for command in parsed(page, line)]
    demo = ROOT / "docs" / "demo.sh"
    for line in demo.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(?:run|  )\s*(finetune .*?)(?:\s{2,}.*)?$", line)
        found += parsed(demo, match.group(1)) if match else []
    return found


def parsed(page: Path, line: str) -> list[Command]:
    words = shlex.split(line, comments=True)
    if "&&" in words:
        words = words[words.index("&&") + 1 :]
    words = words[: words.index(">")] if ">" in words else words
    return [Command(page, line, tuple(words))] if words else []


COMMANDS = commands()
FINETUNE = [command for command in COMMANDS if command.words[0] == "finetune"]


def parameters(words: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """What the real command line makes of `finetune WORDS...`: the verb and its parameters; nothing is run.

    Raises:
        TyperException: an unknown verb, flag, or a wrong value.
    """
    group: Any = typer.main.get_command(roof.app)
    context = group.make_context("finetune", list(words))
    verb = ""
    while hasattr(group, "resolve_command"):
        found, group, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        verb = f"{verb} {found}".strip()
        context = group.make_context(found, rest, parent=context)
    return verb, context.params


def run_folders() -> set[str]:
    """Where the recipes and the commands of the documents write their runs."""
    folders = {load_recipe(path).recipe.output_dir for path in shipped_recipes().values()}
    return folders | {word.split("=")[1] for command in FINETUNE for word in command.words if "output_dir=" in word}


# -- commands ----------------------------------------------------------------------------------------------------------


def test_every_page_is_read_and_commands_are_found() -> None:
    assert {page.name for page in PAGES} >= {
        "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "recipe.md", "data.md", "training.md", "checkpoints.md",
        "evaluate.md", "merge.md", "exit-codes.md",
    }  # fmt: skip
    assert len(FINETUNE) >= 50
    assert len({command.page for command in FINETUNE}) >= 7
    verbs = {parameters(command.words[1:])[0] for command in FINETUNE}
    assert verbs >= {"train", "evaluate", "merge", "runs", "base", "families", "recipe show", "recipe explain"}
    assert verbs >= {"recipe check", "recipe copy", "recipe list", "recipe schema"}
    assert verbs >= {"data prepare", "data audit", "data preview", "data convert"}


@pytest.mark.parametrize("command", FINETUNE, ids=lambda c: f"{c.page.name}: {' '.join(c.words)}")
def test_a_command_parses_and_its_recipe_loads_with_its_overrides(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    verb, given = parameters(command.words[1:])
    recipe = given.get("recipe")
    if recipe is not None and "RECIPE" not in str(recipe):
        loaded = load_recipe(existing(command, str(recipe)), given.get("overrides") or [])
        if verb == "recipe explain":
            loaded.value(given["key"])
    if verb == "recipe copy":
        assert given["name"] in shipped_recipes()
    if verb in ("evaluate", "merge") and given["target"] not in MADE:
        parents = {str(path) for path in (Path(given["target"]), *Path(given["target"]).parents)}
        assert parents & run_folders(), "no command or recipe makes this run"


def existing(command: Command, recipe: str) -> Path:
    """The recipe a command names: a file of the repository, or the source of a copy that the page makes before."""
    if recipe.startswith("recipes/"):
        return ROOT / recipe
    for other in FINETUNE:
        if other.page == command.page and other.words[1:3] == ("recipe", "copy") and other.words[-1] == recipe:
            return shipped_recipes()[other.words[3]]
    raise AssertionError(f"{recipe} does not exist, and {command.page.name} does not make it")


def test_a_wrong_command_would_be_seen() -> None:
    for words in (("trian", "x"), ("train", "x", "--overwritten"), ("evaluate", "x", "--limit", "0"), ("merge",)):
        with pytest.raises(TyperException):
            parameters(words)


def test_other_commands_name_targets_and_files_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = [command for command in COMMANDS if command.words[0] == "make"]
    assert len(made) >= 6
    for command in made:
        assert {word for word in command.words[1:] if "=" not in word} <= targets, command.line
    scripts = [command for command in COMMANDS if command.words[0] == "python"]
    assert scripts
    for command in scripts:
        assert (ROOT / command.words[1]).is_file(), command.line
    launchers = [command for command in COMMANDS if command.words[0] in ("accelerate", "torchrun", "deepspeed")]
    assert len(launchers) >= 3
    for command in launchers:
        recipe, *overrides = command.words[command.words.index("finetune.train") + 1 :]
        load_recipe(ROOT / recipe, [word for word in overrides if "=" in word])
        parameters(("train", recipe, *overrides))  # its own options are there, too
        if "--config_file" in command.words:
            assert (ROOT / command.words[command.words.index("--config_file") + 1]).is_file(), command.line
    known = {"finetune", "make", "python", "vllm", "[", "accelerate", "torchrun", "deepspeed"}
    assert {command.words[0] for command in COMMANDS} <= known


def test_extras_named_in_the_documents_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [path.read_text(encoding="utf-8") for path in [*PAGES, *(ROOT / "recipes").rglob("*.yaml")]]
    named = [extra for text in texts for extra in re.findall(r"finetune-recipes\[(\w+)\]", text)]
    assert len(named) >= 3
    assert set(named) <= set(project["optional-dependencies"])


# -- paths and links ---------------------------------------------------------------------------------------------------


def test_every_path_in_code_exists() -> None:
    count = 0
    for page in PAGES:
        outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for code in re.findall(r"`([^`\n]+)`", outside):
            if code.startswith(OURS) and re.fullmatch(r"[\w./-]+", code) and not code.startswith(MADE):
                count += 1
                assert (ROOT / code).exists(), f"{page.name}: {code}"
    assert count >= 100


def test_every_link_leads_to_a_file() -> None:
    count = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            if not target.startswith(("https://", "#")):
                count += 1
                assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"
    assert count >= 20


# -- architecture ------------------------------------------------------------------------------------------------------


def listed() -> list[str]:
    """The files in the tables of ARCHITECTURE.md, each under the folder that its heading names."""
    found, folder = [], None
    for line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = re.match(r"### `(finetune/[\w/]*)`", line)
            folder = heading.group(1) if heading else None
        elif folder and (row := re.match(r"\| `([\w.]+\.py)` \| (\S.*) \|$", line)):
            found.append(folder + row.group(1))
    return found


def test_architecture_lists_every_module_once_and_no_other() -> None:
    modules = {name(path) for path in (ROOT / "finetune").rglob("*.py")}
    # A folder's __init__.py is a mere docstring unless the folder is an open table.
    open_tables = {f"finetune/{room}/__init__.py" for room in ("families", "formats", "methods", "exports", "scorers")}
    expected = {path for path in modules if not path.endswith("__init__.py")} | open_tables
    expected -= {f"finetune/families/{family}.py" for family in FAMILIES}  # docs/models.md has a row of each
    found = listed()
    assert len(found) >= 70
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_architecture_names_functions_where_they_stand() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    pairs = re.findall(r"`(finetune/[\w/]+\.py)` · `(\w+)`", text)
    assert len(pairs) >= 12
    for path, wanted in pairs:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert wanted in defined, f"{path} has no {wanted}"


def test_the_line_that_architecture_shows_stands_in_the_trainer_s_arguments() -> None:
    line = '"learning_rate": options.learning_rate'
    assert line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert line in (ROOT / "finetune" / "run" / "arguments.py").read_text(encoding="utf-8")


# -- recipes and rows --------------------------------------------------------------------------------------------------

YAML = [(page, number, text) for page in PAGES for number, text in enumerate(blocks(page, "yaml"))]


def test_there_are_recipes_to_look_at() -> None:
    assert len(YAML) >= 8


@pytest.mark.parametrize(("page", "number", "text"), YAML, ids=name)
def test_a_recipe_in_a_document_is_valid(page: Path, number: int, text: str, tmp_path: Path) -> None:
    """A whole recipe stands for itself; one that lacks something is laid over the quickstart."""
    (tmp_path / "quickstart.yaml").write_text((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
    whole = "extends:" in text or ("output_dir:" in text and "model:" in text)
    path = tmp_path / "fragment.yaml"
    path.write_text(text if whole else f"extends: quickstart.yaml\n{text}", encoding="utf-8")
    assert any(origin.source == str(path) for origin in load_recipe(path).origins.values())


def test_the_wrong_recipe_is_answered_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "recipe.md"
    (recipe,), (answer,) = blocks(page, "yaml wrong"), blocks(page, "text")
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(recipe, encoding="utf-8")
    with pytest.raises(RecipeProblems) as caught:
        load_recipe("wrong.yaml")
    assert str(caught.value) + "\n" == answer


# What a script in docs/ writes: how many rows its page has at least, and how they begin.
WRITTEN = {"keys": (55, "\n| `"), "families": (2 * 29, "\n| `"), "recipes": (20, "\n| ["), "adapters": (30, "\n| ")}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_script_writes_into_a_page_is_fresh(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To renew it: python docs/NAME.py"""
    monkeypatch.syspath_prepend(ROOT / "docs")
    written = importlib.import_module(name).WRITTEN
    page = written.path.read_text(encoding="utf-8")
    assert written.renewed() == page
    least, row = WRITTEN[name]
    assert page.count(row) >= least


def test_every_script_of_the_documents_is_held_to_its_page() -> None:
    found = {path.stem for path in (ROOT / "docs").glob("*.py") if "WRITTEN = " in path.read_text(encoding="utf-8")}
    assert found == set(WRITTEN)


def test_example_rows_convert_with_the_format_they_stand_under() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^##)", text, re.DOTALL | re.MULTILINE)
    assert [section for section, _ in sections] == list(FORMATS)
    count = 0
    for section, body in sections:
        rows = [
            json.loads(line) for info, block in BLOCK.findall(body) if info == "jsonl" for line in block.splitlines()
        ]
        assert rows, section
        for row in rows:
            count += 1
            assert [key for key in FORMATS if resolve("format", key, FORMATS).recognises(row)] == [section]
            resolve("format", section, FORMATS).to_example(row)
    assert count >= 8


def test_what_the_page_marks_as_trained_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of masks shows the rows of the page's chat, what is trained in brackets, under the named option."""
    page = ROOT / "docs" / "data.md"
    shown = [(info, text) for info, text in BLOCK.findall(page.read_text("utf-8")) if info.startswith("masks ")]
    assert len(shown) >= 4
    (chat,) = blocks(page, "jsonl masks")
    monkeypatch.chdir(tmp_path)
    Path("chat.jsonl").write_text(chat, encoding="utf-8")
    vocabulary = Vocabulary.of(AutoTokenizer.from_pretrained(ROOT / "tests" / "tokenizers" / "thinking"))
    assert vocabulary.eos_id is not None
    for info, text in shown:
        key, _, value = info.removeprefix("masks ").partition("=")
        chosen: Any = value.split(",") if "," in value else value != "false" and value
        options = DataOptions(train=(Source(path="chat.jsonl"),), **({key: chosen} if value else {}))
        settings = Settings(vocabulary, frozenset({vocabulary.eos_id}), options)
        with Cache("cache") as cache:
            rows = list(Previewer(settings).rows(prepare(options.train, settings, cache), None, None))
        made = [marked(row).rstrip("\n") for row in rows]
        assert made[: text.count("--------\n") + 1] == text.rstrip("\n").split("\n--------\n"), info
    assert len(rows) == 2  # of which the last block shows the first


def marked(row: PreviewedRow) -> str:
    """A row's text with brackets around what is trained."""
    parts = [("⟦" if trained else "", "".join(token.text for token in group), "⟧" if trained else "")
             for trained, group in groupby(row.tokens, key=lambda token: token.trained)]  # fmt: skip
    return "".join(map("".join, parts))


def test_the_bounds_of_the_audit_are_those_documented() -> None:
    rows = re.findall(r"^\| `audit\.(\w+)` \| ([\d.]+) \|", (ROOT / "docs/data.md").read_text("utf-8"), re.MULTILINE)
    assert {key: float(value) for key, value in rows} == {
        key: field.default for key, field in AuditOptions.model_fields.items()
    }


def test_wrong_rows_are_answered_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "data.md"
    (rows,), (answer,) = blocks(page, "jsonl wrong"), blocks(page, "text")
    monkeypatch.chdir(tmp_path)
    Path("wrong.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        refuse(check_sources(DataOptions(train=(Source(path="wrong.jsonl"),))))
    assert str(caught.value) + "\n" == answer


# -- facts -------------------------------------------------------------------------------------------------------------


def test_every_exit_code_is_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+|–) \|", (ROOT / "docs/exit-codes.md").read_text("utf-8"), re.MULTILINE)
    codes = {key: value for key, value in vars(ExitCode).items() if key.isupper()}
    assert len(codes) >= 10
    assert {key: int(code) for code, key in rows if key != "–"} == codes
    assert {int(code) for code, key in rows if key == "–"} == {roof.BROKEN_PIPE}


def test_the_bound_of_the_proof_is_the_one_documented() -> None:
    from finetune.merge import LARGEST_LOSS

    assert f"at most {LARGEST_LOSS:.0%}".replace("%", " %") in (ROOT / "docs/merge.md").read_text(encoding="utf-8")


def test_the_run_folder_is_documented_whole() -> None:
    from finetune.run import folder

    names = {line.split()[0] for line in str(folder.__doc__).splitlines()[2:] if line.strip()}
    assert len(names) >= 8
    rows = re.findall(r"^\| `([\w./]+)` \|", (ROOT / "docs/training.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert names == set(rows)


def test_python_in_the_documents_compiles() -> None:
    found = [
        text for page in PAGES for info, text in BLOCK.findall(page.read_text("utf-8")) if info.startswith("python")
    ]
    assert len(found) >= 7
    for text in found:
        compile(text, "example", "exec")
