"""The floors of the house: imports go down only, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "finetune"

FLOORS = {
    "errors": 0, "registry": 0, "files": 0, "clash": 0, "privacy": 0, "compat": 0, "lean": 0, "strict_json": 0,
    "recipe": 1, "families": 1, "formats": 1,
    "data": 2, "model": 2, "run": 2, "plan": 2,
    "methods": 3, "exports": 3, "scorers": 3,
    "cli": 5, "__main__": 5,
}  # fmt: skip
STORY = 4  # a module at the top level that is not named above tells a story: train, evaluate, merge, base, ...
ROOMS = ("data", "model", "run", "plan")
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "bitsandbytes", "deepspeed", "numpy",
         "pandas", "pyarrow", "wandb", "tensorboard", "trackio"}  # fmt: skip
# Launchers start `python -m finetune.train`: that file is a door of the roof as well as a story.
DOORS = {("train.py", "finetune.cli.main")}
EMPTY_WORDS = {"utils", "util", "common", "helpers", "helper", "manager", "handler", "handlers", "misc"}


def sources() -> list[Path]:
    """Every module of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def room(path: Path) -> str:
    """The floor's unit a file belongs to: its folder, or its own name at the top level."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def floor(unit: str) -> int:
    return FLOORS.get(unit, STORY)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(nodes: Iterator[ast.AST] | list[ast.stmt], path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; `from finetune import train` gives finetune.train."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            if module == "finetune":
                yield from ((node.lineno, f"finetune.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: all but function bodies and what only type checkers read."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for inner in getattr(node, field, []):
                yield from at_import(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def sideways_or_up(path: Path) -> list[str]:
    """Imports of `path` that go up, or into another unit of the same floor."""
    here = room(path)
    faults = []
    for line, name in imports(ast.walk(parsed(path)), path):
        parts = name.split(".")
        if parts[0] != "finetune" or len(parts) == 1 or parts[1] in (here, "__version__"):
            continue
        if (str(path.relative_to(PACKAGE)), name) in DOORS:
            continue
        if floor(parts[1]) > floor(here):
            faults.append(f"{path.relative_to(ROOT)}:{line}: imports {name}, which is a higher floor")
        elif parts[1] in ROOMS and here in ROOMS:
            faults.append(f"{path.relative_to(ROOT)}:{line}: imports {name}; rooms do not see each other")
    return faults


def heavy_at_import(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: imports {name} at module level"
        for line, name in imports(list(at_import(parsed(path).body)), path)
        if name.split(".")[0] in HEAVY
    ]


def test_the_guard_reads_the_whole_package() -> None:
    files = sources()
    assert len(files) >= 40
    units = {room(path) for path in files}
    assert units >= set(FLOORS)
    assert sum(1 for path in files for _ in imports(ast.walk(parsed(path)), path)) >= 200


def test_modules_import_from_lower_floors_only() -> None:
    faults = [fault for path in sources() for fault in sideways_or_up(path)]
    assert not faults, "\n".join(faults)


def test_only_the_engine_imports_heavy_libraries_at_module_level() -> None:
    light = [path for path in sources() if room(path) not in ROOMS]
    assert len(light) >= 25
    faults = [fault for path in light for fault in heavy_at_import(path)]
    assert not faults, "\n".join(faults)


def test_stories_and_the_command_line_import_the_engine_inside_functions() -> None:
    """Importing an engine module at the top of a story would import torch with it."""
    faults = []
    upper = [path for path in sources() if floor(room(path)) >= 3]
    assert len(upper) >= 8
    for path in upper:
        for line, name in imports(list(at_import(parsed(path).body)), path):
            parts = name.split(".")
            if parts[0] == "finetune" and len(parts) > 1 and parts[1] in ROOMS and needs_torch(name):
                faults.append(f"{path.relative_to(ROOT)}:{line}: imports {name}, which imports something heavy")
    assert not faults, "\n".join(faults)


def needs_torch(name: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether importing our module `name` imports a heavy library, itself or through our other modules."""
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if name in seen or not path.exists():
        return False
    if heavy_at_import(path):
        return True
    inner = imports(list(at_import(parsed(path).body)), path)
    return any(needs_torch(found, seen | {name}) for _, found in inner if found.startswith("finetune."))


def test_names_say_what_a_thing_is() -> None:
    """No file, class or function is called by an empty word, alone or at its end (`utils`, `data_utils`)."""
    faults, count = [], 0
    for path in [*sources(), *(ROOT / "tests").rglob("*.py")]:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        defined = [node.name for node in ast.walk(parsed(path)) if isinstance(node, kinds)]
        for name in [path.stem, *(name for name in defined if not name.startswith("test_"))]:
            count += 1
            if re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")[-1] in EMPTY_WORDS:
                faults.append(f"{path.relative_to(ROOT)}: {name}")
    assert count >= 200
    assert not faults, "\n".join(faults)


def test_every_file_opens_with_what_it_is() -> None:
    silent = [str(path.relative_to(ROOT)) for path in sources() if not ast.get_docstring(parsed(path))]
    assert not silent


@pytest.mark.parametrize(
    ("unit", "source", "message"),
    [
        ("data/read.py", "from finetune.model.load import x", "rooms do not see each other"),
        ("data/read.py", "def f():\n    import finetune.run.folder", "rooms do not see each other"),
        ("recipe/load.py", "from finetune import train", "higher floor"),
        ("errors.py", "import finetune.recipe.section", "higher floor"),
        ("train.py", "from finetune.cli.runs import runs", "higher floor"),
        ("merge.py", "from finetune.cli.main import main", "higher floor"),
    ],
)
def test_the_guard_sees_a_wrong_import(
    unit: str, source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "finetune")
    path = tmp_path / "finetune" / unit
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(sideways_or_up(path)) == 1
    assert message in sideways_or_up(path)[0]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch", 1),
        ("try:\n    import torch.nn\nexcept ImportError:\n    from trl import x", 2),
        ("class A:\n    from peft import x", 1),
        ("def f():\n    import torch", 0),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", 0),
        ("import torchless", 0),
    ],
)
def test_the_guard_sees_a_heavy_import(
    source: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(source)
    assert len(heavy_at_import(path)) == count
