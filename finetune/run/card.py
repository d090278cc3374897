"""The adapter's model card: facts of the run, no placeholder, no path of this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.recipe.sections import DataOptions, ModelOptions, TrainingOptions
from finetune.run.record import versions

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        title: the model's name.
        base: hub id of the base, or the name of its folder.
        licence: SPDX name, or None where the base's card states none.
        method: training method and adapter, in words.
        data: names of the training sources, without folders.
        figures: rows of the table of settings and results.
        versions: package to version.
        library: "peft" for an adapter, "transformers" for whole weights.
        longer: whether it has tokens that the base lacks.
        loads: which of transformers' classes loads the base.
        lost: how many of an adapter's matrices plain PEFT loses when it opens it.
    """

    title: str
    base: str
    licence: str | None
    method: str
    data: tuple[str, ...]
    figures: dict[str, Any]
    versions: dict[str, str]
    library: str = "peft"
    tags: tuple[str, ...] = field(default=("finetune",))
    longer: bool = False
    loads: str = "AutoModelForCausalLM"
    lost: int = 0


def base_facts(name_or_path: str, folder: Path | None) -> tuple[str, str | None]:
    """The base's public name and licence, from its hub id and the card in its folder.

    Args:
        name_or_path: as the recipe names it.
        folder: where its files are; None when they are not at hand.

    What a card calls its base model is what that model was made from. Only of a quantised copy it is the model itself.
    """
    if folder is None:
        return name_or_path, None
    is_local = Path(name_or_path).expanduser().is_dir()
    matter: dict[str, Any] = {}
    card = folder / "README.md"
    if card.is_file() and (found := _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))):
        try:
            loaded = yaml.safe_load(found.group(1))
        except yaml.YAMLError:
            loaded = None
        matter = loaded if isinstance(loaded, dict) else {}
    base = matter.get("base_model") if matter.get("base_model_relation") == "quantized" else None
    licence = matter.get("license")
    name = _first(base) or folder.resolve().name if is_local else name_or_path
    return name, _first(licence)


def _first(value: Any) -> str | None:
    """The text, or the first of a list of texts, both of which the hub allows."""
    if isinstance(value, list):
        value = value[0] if value else None
    return str(value) if value else None


def _public(source: str) -> str:
    """A source as others may know it: a hub id as it is, a file by its name alone."""
    path = Path(source).expanduser()
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".") and not path.suffix[1:].isalpha()
    return source if hub and not path.exists() else path.name


def card(facts: CardFacts) -> str:
    """The card as Markdown with the hub's front matter."""
    matter: dict[str, Any] = {"base_model": facts.base, "library_name": facts.library}
    if facts.licence:
        matter["license"] = facts.licence
    matter["pipeline_tag"] = "text-generation"
    matter["tags"] = list(facts.tags)
    rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.figures.items())
    stack = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return f"""---
{front}---

# {facts.title}

{facts.method} of `{facts.base}`, trained on {", ".join(f"`{name}`" for name in facts.data)}.

| | |
|---|---|
{rows}

## Use

{_use(facts)}

Made with {stack}.
"""


def _use(facts: CardFacts) -> str:
    """How to load it."""
    if facts.lost:
        return (
            f"PEFT by itself loses {facts.lost} matrices of this adapter when it opens it, so merge it first, and load "
            "what that gives with transformers: `finetune merge` with the folder of the run."
        )
    way = facts.library
    if facts.longer and way == "peft":
        way = "peft, new tokens" if facts.loads == "AutoModelForCausalLM" else "peft, new tokens, resized"
    return _USE[way].replace("AUTO", facts.loads).replace("BASE", facts.base)


_USE = {
    "peft": """```python
from peft import PeftModel
from transformers import AUTO, AutoTokenizer

base = AUTO.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained("BASE")
```""",
    "peft, new tokens": """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("this folder")  # gives the base rows for the new tokens first
tokenizer = AutoTokenizer.from_pretrained("this folder")
```""",
    "peft, new tokens, resized": """```python
from peft import PeftModel
from transformers import AUTO, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
base = AUTO.from_pretrained("BASE")
base.resize_token_embeddings(max(len(tokenizer), base.get_input_embeddings().num_embeddings))
model = PeftModel.from_pretrained(base, "this folder")
```""",
    "transformers": """```python
from transformers import AUTO, AutoTokenizer

model = AUTO.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```""",
}


def trained_card(
    folder: Path,
    base_folder: Path | None,
    model: ModelOptions,
    data: DataOptions,
    training: TrainingOptions,
    trains: str,
    counts: dict[str, Any],
    figures: dict[str, Any],
    library: str,
    loads: str = "AutoModelForCausalLM",
    lost: int = 0,
) -> str:
    """The card of what a run trained.

    Args:
        folder: the run's folder, whose name becomes the title.
        base_folder: the base's folder, for its licence.
        model, data, training: sections of the recipe.
        trains: what was trained, in words.
        counts: `rows_kept` and `trained_tokens` of the training data.
        figures: what was measured.
        library: "peft" or "transformers".
        loads: which of transformers' classes loads the base.
        lost: how many of the adapter's matrices plain PEFT loses.
    """
    name, licence = base_facts(model.name_or_path, base_folder)
    settings = {
        "rows": counts["rows_kept"],
        "trained tokens": counts["trained_tokens"],
        "learning rate": training.learning_rate,
        "rows a step": training.global_batch_size,
        "seed": training.seed,
    }
    return card(
        CardFacts(
            title=folder.resolve().name,
            base=name,
            licence=licence,
            method=f"Supervised fine-tuning ({trains})",
            data=tuple(_public(source.name or source.path) for source in data.train),
            figures={**settings, **{key.replace("_", " "): value for key, value in figures.items()}},
            versions={key: value for key, value in versions().items() if key in _NAMED},
            library=library,
            longer=bool(model.new_tokens or model.new_special_tokens),
            loads=loads,
            lost=lost,
        )
    )


_NAMED = ("finetune", "transformers", "peft", "trl", "torch")
