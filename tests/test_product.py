"""What a path stands for: a run, an adapter, a merged model, a base, or nothing that answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.errors import RefusedError
from finetune.run.product import changed_files, differing, identify
from finetune.run.record import base_hashes


def adapter(folder: Path, base: object = "org/base") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder without a product."""
    root = tmp_path / "runs" / "one"
    root.mkdir(parents=True)
    (root / "run.json").write_text("{}")
    (root / "recipe.yaml").write_text("x: 1\n")
    return root


def test_a_run_is_its_adapter(run: Path) -> None:
    adapter(run / "adapter")
    (run / "adapter" / "finetune.json").write_text('{"quantization": null}')
    found = identify(str(run))
    assert (found.folder, found.adapter, found.base) == (run, run / "adapter", "org/base")
    assert (found.recipe, found.facts, found.label) == (run / "recipe.yaml", {"quantization": None}, "adapter")


def test_an_adapter_inside_a_run_is_known_to_be_the_runs(run: Path) -> None:
    adapter(run / "adapter")
    assert identify(str(run / "adapter")) == identify(str(run))


def test_a_run_of_whole_weights_is_its_model(run: Path) -> None:
    model(run / "model")
    found = identify(str(run))
    assert (found.folder, found.adapter, found.base, found.label) == (run, None, str(run / "model"), "model")


def test_a_merged_model_inside_a_run_is_called_so(run: Path) -> None:
    model(run / "merged")
    (run / "merged" / "proof.json").write_text("{}")
    found = identify(str(run / "merged"))
    assert (found.folder, found.adapter, found.base, found.label) == (run, None, str(run / "merged"), "merged")
    assert found.recipe == run / "recipe.yaml"


def test_an_adapter_made_elsewhere_has_no_facts(tmp_path: Path) -> None:
    path = adapter(tmp_path / "theirs", "/some/base")
    found = identify(str(path))
    assert (found.folder, found.adapter, found.base, found.recipe, found.facts) == (path, path, "/some/base", None, {})


def test_a_recipe_beside_an_adapter_is_found(tmp_path: Path) -> None:
    path = adapter(tmp_path / "x" / "adapter")
    (tmp_path / "x" / "recipe.yaml").write_text("")
    assert identify(str(path)).recipe == tmp_path / "x" / "recipe.yaml"


def test_another_base_is_told_by_its_files_whatever_their_names(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    shards = tuple(base / f"model-0000{at}-of-00002.safetensors" for at in (1, 2))
    for at, shard in enumerate(shards):
        shard.write_bytes(bytes([at]))
    (base / "tokenizer.json").write_text("{}")
    hashes = base_hashes(shards, base)
    assert len(hashes) == 4
    (base / "tokenizer.json").write_text('{"other": 1}')
    assert changed_files(hashes, shards, base) == []
    assert changed_files({}, shards, base) == []
    asked: list[Path] = []

    def known(paths: Sequence[Path]) -> list[str]:
        asked.extend(paths)
        return [hashes[path.name] for path in paths]

    assert changed_files(hashes, shards, base, known) == []
    assert {path.name for path in asked} == hashes.keys(), "what is remembered is not read"
    one = base / "model.safetensors"
    one.write_bytes(b"other weights under another name")
    assert changed_files(hashes, (one,), base) == [
        "model-00001-of-00002.safetensors (gone)",
        "model-00002-of-00002.safetensors (gone)",
        "model.safetensors (new)",
    ]
    assert changed_files(hashes, (*shards, one), base) == ["model.safetensors (new)"]
    (base / "config.json").unlink()
    shards[0].write_bytes(b"changed")
    assert changed_files(hashes, shards, base) == ["config.json (gone)", shards[0].name]


def test_the_code_of_a_base_counts_where_it_was_run(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    script = base / "modeling_own.py"
    script.write_text("scale = 1")
    without, run = base_hashes((), base), base_hashes((), base, code=True)
    assert run.keys() - without.keys() == {script.name}
    script.write_text("scale = 2")
    assert changed_files(without, (), base) == []
    assert differing(without, base_hashes((), base, code=True)) == []
    assert changed_files(run, (), base) == [script.name]
    (base / "more.py").write_text("")
    script.unlink()
    assert changed_files(run, (), base) == ["modeling_own.py (gone)", "more.py (new)"]


def test_a_base_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = identify(str(model(tmp_path / "base")))
    assert (found.adapter, found.base, found.label) == (None, str(tmp_path / "base"), "model")


def test_what_cannot_be_a_path_is_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = identify("org/name")
    assert (found.adapter, found.base, found.recipe, found.label) == (None, "org/name", None, "model")


@pytest.mark.parametrize("target", ["./org/name", "/nowhere/x", "here/name", "~/no-such"])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(RefusedError, match=r"neither a run .* nor an adapter .* nor a model"):
        identify(target)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("a recipe")])
def test_what_holds_nothing_that_answers_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(RefusedError, match="`finetune runs` lists runs"):
        identify(str(tmp_path / "x"))


def test_a_run_without_a_product_says_how_it_ended(run: Path) -> None:
    with pytest.raises(RefusedError, match=r"this run has no adapter yet \(it has not ended\)"):
        identify(str(run))
    (run / "exit.json").write_text('{"reason": "stopped on request"}')
    with pytest.raises(RefusedError, match="stopped on request"):
        identify(str(run))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base_model_name_or_path": null}',
                                     '{"base_model_name_or_path": ""}', '{"base_model_name_or_path": 3}'])  # fmt: skip
def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path, content: str) -> None:
    (adapter(tmp_path / "x") / "adapter_config.json").write_text(content)
    with pytest.raises(RefusedError, match=r"adapter_config\.json: cannot be read, or names no base model"):
        identify(str(tmp_path / "x"))


def test_a_base_not_found_under_its_name_is_looked_for_where_the_training_found_it(tmp_path: Path) -> None:
    path = adapter(tmp_path / "x" / "adapter", "bases/small")
    there = model(tmp_path / "bases" / "small")
    (tmp_path / "x" / "run.json").write_text(json.dumps({"base": {"folder": str(there)}}))
    assert identify(str(path)).base == str(there)
    there.rename(tmp_path / "gone")
    assert identify(str(path)).base == "bases/small"


def test_a_base_found_under_its_name_is_that_one(tmp_path: Path) -> None:
    named, other = model(tmp_path / "named"), model(tmp_path / "other")
    path = adapter(tmp_path / "x" / "adapter", str(named))
    (tmp_path / "x" / "run.json").write_text(json.dumps({"base": {"folder": str(other)}}))
    assert identify(str(path)).base == str(named)
