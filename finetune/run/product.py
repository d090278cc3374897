"""What a path stands for: a run, an adapter, a merged model, or a base."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import ExportError, RefusedError
from finetune.run.folder import RunFolder, read_json
from finetune.run.record import base_hashes

Known = Callable[[Sequence[Path]], list[str]]
_WORDS = frozenset({"tokenizer.json", "tokenizer_config.json"})  # hashed too; an adapter may bring its own


@dataclass(frozen=True)
class Product:
    """Something that answers.

    Attributes:
        folder: where results about it are written: the run's folder, else its own; the working folder for a base,
            which is not ours to write into.
        adapter: the adapter folder; None for whole weights.
        base: folder or hub id of the base an adapter belongs to, or of the whole weights; the folder that the
            training used where a relative one is not found from here.
        recipe: the recipe it was trained with, where one stands beside it.
        facts: the adapter's finetune.json; empty for one made elsewhere.
        label: how tables call it.
    """

    folder: Path
    adapter: Path | None
    base: str
    recipe: Path | None
    facts: dict[str, Any]
    label: str


def identify(target: str) -> Product:
    """Look at `target`.

    Raises:
        RefusedError: it is nothing that answers, or a run that has no product yet.
    """
    path = Path(target)
    run = RunFolder(path)
    if run.record.is_file():
        if run.product is None:
            ended = read_json(run.exit).get("reason", "it has not ended")
            raise RefusedError(f"{target}: this run has no adapter yet ({ended}); `finetune train` again finishes it")
        return _whole_or_adapter(run.product, path)
    if not path.exists() and not target.startswith((".", "/", "~")) and not Path(target.split("/")[0]).exists():
        return Product(Path(), None, target, None, {}, "model")  # a model id of the hub
    return _whole_or_adapter(path, path)


def _whole_or_adapter(path: Path, folder: Path) -> Product:
    if (folder.parent / "run.json").is_file():
        folder = folder.parent  # adapter/ or merged/ inside a run
    recipe = next((p for p in (folder / "recipe.yaml", path.parent / "recipe.yaml") if p.is_file()), None)
    config = path / "adapter_config.json"
    if config.is_file():
        try:
            base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
            if not isinstance(base, str) or not base:
                raise ValueError(f"base_model_name_or_path is {base!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise RefusedError(f"{config}: cannot be read, or names no base model ({error})") from error
        facts = read_json(path / "finetune.json")
        return Product(folder, path, _base_place(base, read_json(folder / "run.json")), recipe, facts, "adapter")
    if (path / "config.json").is_file():
        merged = (path / "proof.json").is_file()
        made_here = merged or (folder / "run.json").is_file()
        return Product(folder if made_here else Path(), None, str(path), recipe, {}, "merged" if merged else "model")
    raise RefusedError(
        f"{path}: neither a run (run.json), nor an adapter (adapter_config.json), nor a model (config.json); "
        "`finetune runs` lists runs"
    )


def _base_place(name: str, record: dict[str, Any]) -> str:
    """Where the base is: under its name, or, seen from another working folder, where the training found it.

    What lies there now may be something else; `refuse_other_base` looks. The place stands in run.json alone, because an
    adapter travels, and a path of this machine should not travel with it.
    """
    if os.path.exists(os.path.expanduser(name)):
        return name
    path = (record.get("base") or {}).get("folder")
    return path if isinstance(path, str) and os.path.isdir(path) else name


def refuse_other_base(
    product: Product, name: str, weights: tuple[Path, ...], folder: Path | None, known: Known | None = None
) -> None:
    """The base must hold the very bytes that the adapter was trained on; one made elsewhere tells no hashes.

    Args:
        product: the adapter; whole weights pass.
        name: the base as messages call it.
        weights: its weight files.
        folder: its local folder.
        known: hashes files, and may remember those that have not changed.

    Raises:
        ExportError: files differ or are gone, all of them named.
    """
    differ = changed_files((product.facts.get("base") or {}).get("sha256") or {}, weights, folder, known)
    if differ:
        raise ExportError(
            f"{name} is not the base that was trained on: {', '.join(differ)} changed since; restore it, or train "
            "again on the new one"
        )


def changed_files(
    trained_on: dict[str, str], weights: tuple[Path, ...], folder: Path | None, known: Known | None = None
) -> list[str]:
    """The weight files, the config and, where it was run, the code of a base that are not those an adapter was trained
    on, whatever their names.

    Args:
        trained_on: SHA-256 by file name, as the adapter tells them; empty for one made elsewhere.
        weights: the base's weight files.
        folder: its local folder.
        known: hashes files, and may remember those that have not changed.
    """
    if not trained_on:
        return []  # reads no weights for nothing
    return differing(trained_on, base_hashes(weights, folder, known, code=_with_code(trained_on)))


def differing(trained_on: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Those of a base whose hashes are at hand.

    Args:
        trained_on: SHA-256 by file name, as the adapter tells them.
        found: those of the base; its code counts where the adapter was trained with it.
    """
    code = _with_code(trained_on)
    now = {name: value for name, value in found.items() if name not in _WORDS and (code or not name.endswith(".py"))}
    then = {name: value for name, value in trained_on.items() if name not in _WORDS}
    differ = [name for name in then.keys() & now.keys() if then[name] != now[name]]
    differ += [f"{name} (gone)" for name in then.keys() - now.keys()]
    differ += [f"{name} (new)" for name in now.keys() - then.keys()]
    return sorted(differ)


def _with_code(hashes: Mapping[str, str]) -> bool:
    """Whether a base's own code is among what was hashed."""
    return any(name.endswith(".py") for name in hashes)
