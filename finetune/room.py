"""Is there room in this host's memory for the base of each of its processes?

Without it the system would kill one of them while it loads, with no word of why.
"""

from __future__ import annotations

import os

from finetune.advice import accepted
from finetune.errors import HardwareError
from finetune.preflight import Checked
from finetune.ready import Process
from finetune.recipe.loaded import LoadedRecipe
from finetune.supply import Supplies


def refuse_little_memory(loaded: LoadedRecipe, checked: Checked, process: Process, supplies: Supplies) -> None:
    """Compare what loading takes at least with what this host has left, before any of its processes loads.

    Raises:
        HardwareError: it is more, with both figures and what takes less.
    """
    from finetune.model.memory import copied_bytes, dtypes, most_bytes
    from finetune.plan.hardware import memory_left

    options, kept, base = loaded.recipe.model, process.kept, supplies.base
    left = memory_left()
    if left is None:
        return
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or process.launched.size)
    in_host = process.hardware.device == "cpu" or (checked.mode.spreads and options.quantization == "none")
    as_stored = checked.mode.spreads and loaded.recipe.adapter.method == "none"
    needed = copied_bytes(options, base, kept, in_host, as_stored)
    if needed * count <= left:
        return
    needed = min(needed, most_bytes(options, base, kept))  # files may hold more than text needs
    if needed * count <= left:
        return
    each, advice = "the process loads", []
    if count > 1:
        each = f"each of the {count} processes of this host loads"
        advice.append(f"start at most {left // needed} on this host" if left >= needed else "")

    def goes(key: str, value: str) -> bool:
        device = process.hardware.device
        return accepted({key: value}, loaded, base, checked.mode, process.shape.processes, device)

    if options.quantization == "none":
        held = dtypes(base)
        how = f"in {kept.base}, a copy of files in {held}"
        if loaded.recipe.adapter.method == "none":
            if goes("adapter.method", "lora"):
                advice.append("train an adapter (adapter.method: lora), whose base can stay in the dtype of its files")
        elif held in ("bfloat16", "float16") and goes("model.dtype", held):
            advice.append(f"write model.dtype: {held}, in which the weights are mapped from their files")
        if process.hardware.device == "cpu" and goes("model.quantization", "nf4"):
            advice.append("write model.quantization: nf4")
    else:
        how = f"in {options.quantization}"
    advice += ["take a host with more memory, or a smaller base"]
    raise HardwareError(
        f"model.name_or_path: {each} {base.name} {how}: {needed / 1e9:.1f} GB"
        + (f", {needed * count / 1e9:.1f} GB together" if count > 1 else "")
        + f", and this host has {left / 1e9:.1f} GB left; {'; or '.join(filter(None, advice))}"
    )
