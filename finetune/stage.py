"""The stage of a rehearsal: a tiny base, a tokenizer and rows in place of those that a recipe names.

What is at hand is taken: config and tokenizer of a local folder or of the hub, rows on this machine. What is not is
replaced by what comes nearest, and that is said.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import EnvironmentFault

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.model.folder import Base
    from finetune.model.shrink import Tokens
    from finetune.model.stored import Stored
    from finetune.recipe.sections import Recipe, Source

SOURCES = ("data.train", "data.validation", "evaluate.data")
LEARNT_FROM = 1000  # rows of each source that a stand-in tokenizer is learnt from
_TOKENIZER = ("*token*.json", "*.jinja", "vocab*", "merges*", "*.model", "*.tiktoken", "generation_config.json")


@dataclass(frozen=True)
class Told:
    """One line of what a rehearsal showed, or could not show.

    Attributes:
        part: what it is about, in a word.
        text: one sentence, with figures.
        figures: the same figures by name, and more of them; empty where there are none.
    """

    part: str
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What is known of the recipe's model.

    Attributes:
        base: its folder, without weights; None where it is not at hand.
        family: its family; None where no file knows it.
        model_type: as config.json says it.
        template: name of TRL's file with the chat template of such models, for a tokenizer that stands in; or empty.
        missing: why the base is not at hand; empty when it is.
        stored: how its files hold quantised weights, by its config or else by its name; None for ordinary ones.
    """

    base: Base | None
    family: Family | None
    model_type: str
    template: str = ""
    missing: str = ""
    stored: Stored | None = None


@dataclass(frozen=True)
class Stage:
    """What a recipe is played with.

    Attributes:
        base: folder of the twin.
        sources: what is read in place of the recipe's sources, by key.
        stood_in: whether the tokenizer is a stand-in.
        twin: the twin in a sentence.
        open: what this leaves untried.
    """

    base: Path
    sources: Mapping[str, Sequence[Source]]
    stood_in: bool
    twin: str
    open: list[Told] = field(default_factory=list)


def find_model(recipe: Recipe) -> Model:
    """Look for the recipe's base, or go by its name where the hub cannot be reached. Imports no torch.

    Raises:
        FinetuneError: what training would say of the base; EnvironmentFault where neither the hub nor the name tells
            what it is.
    """
    from finetune.families import match
    from finetune.model.fetch import fetch
    from finetune.model.folder import INDEX, SINGLE, find, find_config
    from finetune.model.stored import stored

    options = recipe.model
    base = find_config(options.name_or_path)
    if base.folder is not None and options.revision is None:
        whole = (base.folder / SINGLE).is_file() or (base.folder / INDEX).is_file()
        base = find(options.name_or_path) if whole else base
    else:
        try:
            base = fetch(base, options.revision, options.trust_remote_code, weights=False)
        except EnvironmentFault as error:
            return _by_name(recipe, str(error).partition(";")[0].removeprefix("model.name_or_path: "))
    held = stored(base.name, base.config, options.quantization, recipe.adapter.method)
    family = match(options.family, base.model_type)
    template = _template_of(family, options.name_or_path) if family is not None else None
    return Model(base, family, base.model_type, template or "", stored=held)


def _template_of(family: Family, name: str) -> str | None:
    """The chat template of a model of this family by its name, empty for none; None where the name does not fit.

    Args:
        family: the family that may be meant.
        name: hub id, or folder.
    """
    return next((template for pattern, template in family.hub if re.fullmatch(pattern, _short(name))), None)


def _short(name: str) -> str:
    """What family files know a model of the hub by."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _published(recipe: Recipe, family: Family) -> Stored | None:
    """How the weights of a base that is not at hand are published, by its name; None where they are ordinary.

    Raises:
        ModelError: the recipe cannot train on them so.
    """
    from finetune.model.stored import stored

    name = recipe.model.name_or_path
    method = next((method for pattern, method in family.published if re.fullmatch(pattern, _short(name))), None)
    config = {"quantization_config": {"quant_method": method}} if method else {}
    return stored(name, config, recipe.model.quantization, recipe.adapter.method)


def _by_name(recipe: Recipe, missing: str) -> Model:
    """What a base that is not at hand is, by model.family and by its name.

    Raises:
        EnvironmentFault: they do not tell.
    """
    from finetune.families import FAMILIES, match
    from finetune.registry import resolve

    name = recipe.model.name_or_path
    if (asked := match(recipe.model.family, "")) is not None:
        template = _template_of(asked, name) or ""
        return Model(None, asked, asked.model_types[0], template, missing, _published(recipe, asked))
    for key in FAMILIES:
        family: Family = resolve("family", key, FAMILIES)
        if (known := _template_of(family, name)) is not None:
            return Model(None, family, family.model_types[0], known, missing, _published(recipe, family))
    raise EnvironmentFault(
        f"model.name_or_path: {missing}, and no family is known by that name; say which one it is of, as "
        "model.family=qwen3 (`finetune families` lists them), or name a folder with its config.json and tokenizer"
    )


def set_stage(recipe: Recipe, model: Model, folder: Path) -> Stage:
    """Make the twin with its tokenizer below `folder`, and choose the rows.

    Raises:
        FinetuneError: no twin can be made, or no rows.
    """
    told: list[Told] = []
    if model.missing:
        assert model.family is not None, "a base that is not at hand is known by its family"
        told.append(
            Told("model", f"its own config ({model.missing}); the tiny one of family {model.family.name} stood in")
        )
    sources = _sources(recipe, folder / "rows", told)
    base = folder / "base"
    base.mkdir()
    tokens, stops, stood_in = _tokenizer(recipe, model, base, sources, told)
    return Stage(base, sources, stood_in, _twin(recipe, model, base, tokens, stops, stood_in, told), told)


def _sources(recipe: Recipe, folder: Path, told: list[Told]) -> dict[str, list[Source]]:
    """What is read in place of the recipe's sources, by key."""
    from finetune.data.sample import sample
    from finetune.methods import METHODS
    from finetune.registry import resolve

    needs = resolve("method", recipe.training.method, METHODS).needs
    folder.mkdir()
    found: dict[str, list[Source]] = {}
    for key in SOURCES:
        section, name = key.split(".")
        for source in getattr(getattr(recipe, section), name):
            taken = sample(source, folder, sum(map(len, found.values())), needs)
            found.setdefault(key, []).append(taken.source)
            if taken.note:
                told.append(Told("data", taken.note))
    return found


def _tokenizer(
    recipe: Recipe, model: Model, folder: Path, sources: Mapping[str, Sequence[Source]], told: list[Told]
) -> tuple[Tokens, tuple[int, ...], bool]:
    """Put a tokenizer into the twin's folder: its ids for the twin, its stop tokens, and whether it is a stand-in."""
    from finetune.model.folder import has_tokenizer
    from finetune.model.shrink import Tokens
    from finetune.model.stand_in import PLAIN, shipped_template, write_stand_in

    if model.base is not None and model.base.folder is not None and has_tokenizer(model.base.folder):
        config = _text_config(model.base)
        for pattern in _TOKENIZER:
            for file in model.base.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        ids = (
            config.get(f"{name}_token_id", model.base.config.get(f"{name}_token_id")) for name in ("bos", "eos", "pad")
        )
        return Tokens(int(config["vocab_size"]), *ids), (), False
    own = recipe.data.chat_template
    if own is not None:
        template, what = Path(own).expanduser().read_text(encoding="utf-8"), "the recipe's chat template"
    elif model.template:
        template, what = shipped_template(model.template), f"the chat template {model.template} that TRL ships"
    else:
        template, what = PLAIN, "a plain chat template, which is not the model's"
    stops = model.family.stop if model.family is not None else ()
    made = write_stand_in(folder, _rows(sources), template, stops)
    told.append(
        Told(
            "tokenizer", f"the model's own; {made.size:,} byte-level tokens learnt from the rows stood in, with {what}"
        )
    )
    return Tokens(made.size, made.bos, made.eos, made.pad), made.stops, True


def _rows(sources: Mapping[str, Sequence[Source]]) -> Iterator[Any]:
    """The first raw rows of each source; of those that cannot be read training will speak."""
    from finetune.data.read import Row, read

    for source in (one for several in sources.values() for one in several):
        for item in islice(read(source), LEARNT_FROM):
            if isinstance(item, Row):
                yield item.values


def _text_config(base: Base) -> dict[str, Any]:
    """config.json, or its part about text."""
    inner = base.config.get("text_config")
    return dict(inner) if isinstance(inner, dict) else base.config


def _twin(
    recipe: Recipe,
    model: Model,
    folder: Path,
    tokens: Tokens,
    stops: tuple[int, ...],
    stood_in: bool,
    told: list[Told],
) -> str:
    """Write the twin, compare it with the real architecture where that is at hand, and describe it."""
    from finetune.model.publish import store_as
    from finetune.model.shrink import missing_kinds, twin_shape, write_twin
    from finetune.model.skeleton import skeleton
    from finetune.run.rehearsal import ROOM, depth_named

    config = _text_config(model.base) if model.base is not None else {}
    depth = depth_named(recipe.adapter)
    if depth and config.get("num_hidden_layers"):
        depth = int(config["num_hidden_layers"])  # so that a layer that is not there is missed here too
    shape = twin_shape(model.family, config, depth or None, ROOM * recipe.data.max_length)
    kept = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    size = max(tokens.size, 1 + max(recipe.adapter.trainable_token_indices, default=0))
    made = write_twin(folder, model.model_type, shape, replace(tokens, size=size), stops, kept)
    if model.base is not None:
        lacking = missing_kinds(skeleton(recipe.model, model.base, "bfloat16"), made)
        told += [Told("model", f"weights called {name}, which the twin lacks") for name in lacking]
    form = kept
    if model.stored is not None and model.stored.dequantised and store_as(folder, model.stored.method):
        form = f"{kept} and, as the real ones, {model.stored.name}"
    elif model.stored is not None:
        told.append(Told("weights", f"how they are read: {model.stored.told(kept)}; the twin's are {kept}"))
    count = sum(parameter.numel() for parameter in made.parameters())
    layers = shape["num_hidden_layers"]
    return f"{model.model_type}, {layers} layers, {count:,} random parameters stored as {form}"


def read_figures(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
