"""A merged model: an ordinary Hugging Face folder whose weights are base plus adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.files import write_json, write_text

if TYPE_CHECKING:
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


def write(
    base: Base,
    adapter: Path,
    output: Path,
    dtype: str,
    max_shard_size: str,
    card: str,
    facts: dict[str, Any],
    tokenizer_from: Path | None,
    family_name: str = "auto",
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
        family_name: model.family of the recipe.

    Returns:
        The merge's report as plain data.

    Raises:
        ExportError: the base is quantised on disk, or the adapter does not fit.
    """
    from finetune.families import match
    from finetune.model.generation import state_stops
    from finetune.model.merge import merge_weights
    from finetune.model.requantise import requantiser
    from finetune.model.update import read_adapter

    if base.config.get("quantization_config"):
        raise ExportError(f"{base.name} is stored quantised; merge onto its unquantised weights")
    config, updates = read_adapter(adapter)
    requantise = requantiser(facts.get("quantization") or {})
    family = match(family_name, base.model_type)
    report = merge_weights(base, updates, output, dtype, max_shard_size, requantise, family)
    assert base.folder is not None, "a base is fetched before it is merged"
    _copy_files(base.folder, output)
    if tokenizer_from is not None:
        _copy_files(tokenizer_from, output, only_tokenizer=True)
    if dtype != "auto":
        _state_dtype(output / "config.json", dtype)
    added = state_stops(output, (facts.get("stops") or {}).get("ends") or ())
    write_text(output / "README.md", card)
    return {
        "merged_tensors": len(report.merged),
        "copied_tensors": report.copied,
        "bytes": report.bytes,
        "files": report.files,
        "kept_of_update": report.kept_of_update,
        "r": config.get("r"),
        "stops_added": list(added),
    }


def _copy_files(source: Path, output: Path, only_tokenizer: bool = False) -> None:
    """Config, tokenizer, template, generation config and licence, byte for byte."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix in _NOT_COPIED or path.name in _NOT_COPIED_NAMES:
            continue
        if path.name.endswith(".index.json") or (only_tokenizer and not path.name.startswith(_TOKENIZER)):
            continue
        shutil.copyfile(path, output / path.name)


def _state_dtype(path: Path, dtype: str) -> None:
    """config.json names the precision its weights are loaded in; everything else in it stays as the base has it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("torch_dtype", "dtype"):
        if key in config or key == "dtype":
            config[key] = dtype
    write_json(path, config)
