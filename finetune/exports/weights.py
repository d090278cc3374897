"""Whole trained weights, from full fine-tuning: an ordinary Hugging Face folder, reopened and compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.files import staged_folder, write_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    stops: Iterable[int] = (),
    state: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Save a fully trained model with its tokenizer.

    Args:
        model: the trained model, unwrapped.
        tokenizer: saved beside it.
        folder: where to; must not exist.
        card: the model card's text.
        stops: ids that trained answers end with; generation_config.json will name them.
        state: the trained weights by name, whole, of a model of which this process holds only a part.
        figures: what the run reached, for manifest.json, which holds every file's size and hash.

    Returns:
        `tensors`, `parameters` and `bytes`; `stops_added` to generation_config.json.

    Raises:
        ExportError: what stands in the files is not what was trained.
    """
    from finetune.model.generation import state_stops

    known: set[int] = set()  # a tied weight counts, and is compared, once
    everything: Mapping[str, Tensor] = dict(model.named_parameters()) if state is None else state
    trained: dict[str, Tensor] = {}
    for name, one in everything.items():
        if id(one) not in known:
            known.add(id(one))
            trained[name] = one
    manifest: dict[str, Any] = {"figures": figures or {}}
    with staged_folder(folder, manifest) as staging:
        model.save_pretrained(str(staging), **({} if state is None else {"state_dict": state}))
        tokenizer.save_pretrained(str(staging))
        write_text(staging / "README.md", card)
        added = state_stops(staging, stops)
        files = sorted(staging.glob("*.safetensors"))
        written = manifest["proof"] = {
            "tensors": _compare(model, trained, staging, files),
            "parameters": sum(parameter.numel() for parameter in trained.values()),
            "bytes": sum(file.stat().st_size for file in files),
            "stops_added": list(added),
        }
    return written


def _compare(model: PreTrainedModel, trained: Mapping[str, Tensor], folder: Path, files: list[Path]) -> int:
    """Every weight stands in the files bit for bit, under the names that files give it; how many tensors they hold.

    Raises:
        ExportError: one does not.
    """
    import torch
    from safetensors import safe_open

    from finetune.model.change import Whole
    from finetune.model.conversions import layout_of
    from finetune.model.folder import safetensors_header
    from finetune.model.layout import on_disk

    where = {name: file for file in files for name in safetensors_header(file)}
    layout = layout_of(model, where)
    elsewhere: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        parts = on_disk({name: Whole(parameter.detach())}, where.keys(), layout)
        if not parts.keys() <= where.keys():  # put together from others by a rule that has no name here
            elsewhere[name] = parameter
            continue
        for stored, part in parts.items():
            assert isinstance(part, Whole), "a whole tensor becomes whole tensors"
            with safe_open(where[stored], framework="pt") as opened:
                _refuse_other(stored, opened.get_tensor(stored), part.value)
    if elsewhere:
        again, report = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if lost := sorted(set(report["missing_keys"]) & elsewhere.keys()):
            raise ExportError(f"the saved model lacks {len(lost)} trained weights, as {lost[0]}")
        for name, parameter in elsewhere.items():
            _refuse_other(name, again.get_parameter(name).to(parameter.dtype), parameter.detach())
    return len(where)


def _refuse_other(name: str, found: Tensor, trained: Tensor) -> None:
    import torch

    if found.dtype != trained.dtype or not torch.equal(found, trained.cpu()):
        raise ExportError(f"the saved model is not the trained one: {name} has other values")
