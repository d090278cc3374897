"""The adapter folder: PEFT's own layout, reopened and compared before it counts.

adapter_config.json, adapter_model.safetensors    as peft writes them; plain peft loads them
finetune.json                                     the base's hashes, and how it was quantised: a merge needs both
README.md                                         the model card
manifest.json                                     what the run reached, and every file's size and hash
tokenizer files                                   where the recipe's chat template or new tokens changed the tokenizer
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError
from finetune.files import staged_folder, write_json, write_text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

FACTS = "finetune.json"
_COPIED = ("base_layer", "original_module")  # what PEFT's wrappers call the base's own modules


def write(
    model: PeftModel,
    folder: Path,
    card: str,
    facts: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    state: dict[str, Any] | None = None,
    figures: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Save a trained adapter.

    Args:
        model: the trained model, unwrapped.
        folder: where to; must not exist.
        card: the model card's text.
        facts: what finetune.json says.
        tokenizer: saved beside it when given.
        state: the trained weights by name, whole, of a model of which this process holds only a part.
        figures: what the run reached, for manifest.json.

    Returns:
        `tensors`, `parameters` and `bytes` of the adapter.

    Raises:
        ExportError: what stands in the file is not what was trained.
    """
    from peft import get_peft_model_state_dict

    # By itself PEFT asks the hub whether the embeddings are longer than the base's, and if so adds copies of them.
    expected = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    manifest: dict[str, Any] = {"figures": figures or {}}
    with staged_folder(folder, manifest) as staging:
        model.save_pretrained(str(staging), state_dict=state, save_embedding_layers=False)
        written = manifest["proof"] = _compare(expected, staging / "adapter_model.safetensors")
        write_json(staging / FACTS, facts)
        write_text(staging / "README.md", card)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
    return written


def _compare(expected: dict[str, Any], path: Path) -> dict[str, Any]:
    """Every tensor that was trained stands in the file, bit for bit, and none more."""
    import torch
    from safetensors.torch import load_file

    found = load_file(path)
    copies = [
        name for name in sorted(found) if "lora_" not in name and any(part in name.split(".") for part in _COPIED)
    ]
    faults = [f"  {name}: a copy of the base's" for name in copies]
    faults += [f"  {name}: not in the file" for name in sorted(expected.keys() - found.keys())]
    faults += [f"  {name}: in the file, not trained" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        tensor = expected[name].detach().cpu()
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            kinds = [f"{value.dtype} {tuple(value.shape)}" for value in (found[name], tensor)]
            faults.append(f"  {name}: {kinds[0]}, not {kinds[1]}")
        elif not torch.equal(found[name], tensor):
            faults.append(f"  {name}: other values")
        elif tensor.numel() == 0 or ("lora_B" in name and not bool(torch.any(tensor != 0))):
            faults.append(f"  {name}: empty or all zero")
    if faults:
        raise ExportError("the saved adapter is not the trained one:\n" + "\n".join(faults[:10]))
    return {
        "tensors": len(found),
        "parameters": sum(tensor.numel() for tensor in found.values()),
        "bytes": path.stat().st_size,
    }
