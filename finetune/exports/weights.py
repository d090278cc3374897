"""Whole trained weights, from full fine-tuning: an ordinary Hugging Face folder, reopened and compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.files import staged_folder, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str, stops: Iterable[int] = ()
) -> dict[str, Any]:
    """Save a fully trained model with its tokenizer.

    Args:
        model: the trained model, unwrapped.
        tokenizer: saved beside it.
        folder: where to; must not exist.
        card: the model card's text.
        stops: ids that trained answers end with; generation_config.json will name them.

    Returns:
        `tensors`, `parameters` and `bytes`; `stops_added` to generation_config.json.

    Raises:
        ExportError: what stands in the files is not what was trained.
    """
    import torch
    from safetensors import safe_open

    from finetune.model.generation import state_stops

    trained = dict(model.named_parameters())
    with staged_folder(folder) as staging:
        model.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        write_text(staging / "README.md", card)
        added = state_stops(staging, stops)
        files = sorted(staging.glob("*.safetensors"))
        seen: set[str] = set()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    seen.add(name)
                    if name not in trained:
                        continue
                    found, wanted = opened.get_tensor(name), trained[name].detach().cpu()
                    if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                        raise ExportError(f"the saved model is not the trained one: {name} has other values")
        if missing := sorted(trained.keys() - seen):
            raise ExportError(f"the saved model lacks {len(missing)} trained weights, as {missing[0]}")
        return {
            "tensors": len(seen),
            "parameters": sum(parameter.numel() for parameter in trained.values()),
            "bytes": sum(file.stat().st_size for file in files),
            "stops_added": list(added),
        }
