"""A merged model: an ordinary Hugging Face folder whose weights are base plus adapter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.files import write_json, write_text
from finetune.recipe.sections import ModelOptions

if TYPE_CHECKING:
    from finetune.families.family import Family
    from finetune.model.folder import Base

# What a base folder may hold that must not be copied: its weights, its card, and what belongs to another format.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".tmp")
_NOT_COPIED_NAMES = (
    "README.md",
    "manifest.json",
    "adapter_config.json",
    "evaluation.json",
    "finetune.json",
    "proof.json",
)
_TOKENIZER = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges")
_TEMPLATES = "additional_chat_templates"  # a folder of files NAME.jinja, as transformers writes and reads it


def write(
    base: Base,
    adapter: Path,
    output: Path,
    dtype: str,
    max_shard_size: str,
    card: str,
    facts: dict[str, Any],
    tokenizer_from: Path | None,
    options: ModelOptions | None = None,
) -> dict[str, Any]:
    """Write the merged model into an existing, empty folder.

    Args:
        base: the local base the adapter was trained on.
        adapter: the adapter folder.
        output: the folder.
        dtype: "auto" or a torch dtype's name.
        max_shard_size: as "5GB".
        card: the model card's text.
        facts: finetune.json of the adapter; empty for an adapter made elsewhere.
        tokenizer_from: a folder whose tokenizer files replace the base's; None keeps the base's.
        options: the model section of the recipe; its defaults for an adapter made elsewhere.

    Returns:
        The merge's report as plain data.

    Raises:
        ExportError: the base is quantised on disk, or the adapter does not fit.
    """
    from finetune.families import match
    from finetune.model.conversions import layout_of
    from finetune.model.dequantise import MERGED, tensors_of
    from finetune.model.embeddings import embeddings_of
    from finetune.model.generation import state_stops
    from finetune.model.merge import merge_weights
    from finetune.model.quantise import refuse_transposed
    from finetune.model.requantise import requantiser
    from finetune.model.skeleton import skeleton
    from finetune.model.stored import facts_of, name_of, stored
    from finetune.model.tying import may_touch_embeddings
    from finetune.model.update import read_adapter

    in_files = facts_of(base.config)
    if in_files is not None and str(in_files.get("quant_method", "bitsandbytes")) not in MERGED:
        raise ExportError(
            f"{base.name} is stored in {name_of(in_files)}, which no merge reads; merge onto its unquantised weights"
        )
    assert base.folder is not None, "a base is fetched before it is merged"
    options = options or ModelOptions(name_or_path=base.name)
    config, changes = read_adapter(adapter)
    requantise = requantiser(facts.get("quantization") or {})
    family = match(options.family, base.model_type)
    touches, composite = may_touch_embeddings(changes), isinstance(base.config.get("text_config"), dict)
    bare = skeleton(options, base, "float32") if touches or composite or family is None else None
    if bare is not None:
        refuse_transposed(base.name, bare, stored(base.name, base.config, "none"))
    if bare is not None and (composite or family is None):
        family = _with_layout(family, layout_of(bare, tensors_of(base).keys()))
    found = embeddings_of(bare) if bare is not None and touches else None
    follows = bool(config.get("ensure_weight_tying"))
    report = merge_weights(base, changes, output, dtype, max_shard_size, requantise, family, found, follows)
    _copy_files(base.folder, output)
    if tokenizer_from is not None:
        _copy_files(tokenizer_from, output, only_tokenizer=True)
    _copy_templates(base.folder, tokenizer_from, output)
    _state(output / "config.json", dtype, report.vocabulary, report.untied)
    added = state_stops(output, (facts.get("stops") or {}).get("ends") or ())
    write_text(output / "README.md", card)
    return {
        "merged_tensors": len(report.merged),
        "copied_tensors": report.copied,
        "bytes": report.bytes,
        "files": report.files,
        "kept_of_update": report.kept_of_update,
        "r": config.get("r"),
        "vocabulary": report.vocabulary,
        "untied": report.untied,
        "dequantised_from": name_of(in_files) if in_files is not None else None,
        "stops_added": list(added),
    }


def _with_layout(family: Family | None, layout: Family | None) -> Family | None:
    """A family with what transformers knows of these very files: those of a text model that is a part of another."""
    if family is None or layout is None:
        return family or layout
    return replace(
        family,
        renamed=(*family.renamed, *layout.renamed),
        stored=family.stored or layout.stored,
        transposed=family.transposed or layout.transposed,
    )


def _copy_files(source: Path, output: Path, only_tokenizer: bool = False) -> None:
    """Config, tokenizer, template, generation config and licence, byte for byte."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix in _NOT_COPIED or path.name in _NOT_COPIED_NAMES:
            continue
        if path.name.endswith(".index.json") or (only_tokenizer and not path.name.startswith(_TOKENIZER)):
            continue
        shutil.copyfile(path, output / path.name)


def _copy_templates(base: Path, tokenizer_from: Path | None, output: Path) -> None:
    """The templates that a tokenizer keeps beside its chat template: those of whichever folder gave that one."""
    brings_own = tokenizer_from is not None and (
        (tokenizer_from / "chat_template.jinja").is_file() or (tokenizer_from / _TEMPLATES).is_dir()
    )
    source = (tokenizer_from if tokenizer_from is not None and brings_own else base) / _TEMPLATES
    for path in sorted(source.glob("*.jinja")):
        (output / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, output / _TEMPLATES / path.name)


def _state(path: Path, dtype: str, vocabulary: int, untied: bool) -> None:
    """config.json says what became of the weights; everything else in it stays as the base has it.

    Args:
        path: the file.
        dtype: the precision its weights are loaded in; "auto" where it is the base's.
        vocabulary: rows of the embeddings where they became longer, else 0.
        untied: whether the embeddings are two tensors now.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(config)
    config.pop("quantization_config", None)  # what was stored quantised is written as ordinary weights
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    text.pop("quantization_config", None)
    if dtype != "auto":
        for key in ("torch_dtype", "dtype"):
            if key in config or key == "dtype":
                config[key] = dtype
    if vocabulary:
        for part in (config, text):
            if "vocab_size" in part or part is text:
                part["vocab_size"] = vocabulary
    if untied:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if json.dumps(config) != before:
        write_json(path, config)
