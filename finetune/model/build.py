"""The model that is trained: the base, loaded, with its adapter attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.families.family import Family
from finetune.model.adapt import attach
from finetune.model.coverage import measure, refuse_unaccepted
from finetune.model.folder import Base
from finetune.model.kinds import places
from finetune.model.load import Precision, load_base, quantized_modules
from finetune.model.targets import resolve_targets
from finetune.recipe.sections import AdapterOptions, ModelOptions


@dataclass(frozen=True)
class Built:
    """A model ready to train.

    Attributes:
        model: the base with its adapter, or the base alone for full fine-tuning.
        base: what the base is, in words.
        trains: what is trained, in words.
        note: what was assumed, and which kinds of blocks stay frozen; empty when neither.
        targets: leaf names of the adapted modules; empty for full fine-tuning.
        quantized: full names of the modules held in 4 or 8 bits.
        trained: how many parameters are trained.
    """

    model: Any
    base: str
    trains: str
    note: str
    targets: tuple[str, ...]
    quantized: tuple[str, ...]
    trained: int


def build(
    options: ModelOptions,
    adapter: AdapterOptions,
    base: Base,
    family: Family | None,
    kept: Precision,
    attn: str,
    device: torch.device | None,
) -> Built:
    """Load the base and attach a fresh adapter. Seed torch before calling.

    Args:
        options: the model section.
        adapter: the adapter section.
        base: the fetched base.
        family: its family; None when no file knows it.
        kept: the precisions.
        attn: the attention kernel's name.
        device: where the weights go; None leaves them to the trainer.

    Raises:
        ModelError: weights are missing, or the targets are not what the model has.
    """
    model: Any = load_base(options, base, kept, attn, device)
    quantized = quantized_modules(model)
    size = "" if quantized else f"{count(sum(p.numel() for p in model.parameters()))} parameters, "
    note = ""
    leaves: tuple[str, ...] = ()
    if adapter.method != "none":
        found = places(model, family)
        targets = resolve_targets(model, adapter, family)
        model = attach(model, adapter, targets, options.name_or_path, options.revision)
        coverage = measure(found, model)
        refuse_unaccepted(coverage, adapter)
        leaves = targets.short()
        note = "; ".join(filter(None, [targets.assumed, *coverage.sentences()]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"{adapter.method} r={adapter.r} on {', '.join(leaves)}" if leaves else "every weight"
    return Built(
        model=model,
        base=f"{options.name_or_path}: {base.model_type}, {size}{kept.base}, attention {attn}",
        trains=f"{what}: {count(trained)} parameters, {kept.trained}; optimizer state {kept.optimizer}",
        note=note,
        targets=leaves,
        quantized=quantized,
        trained=trained,
    )


def count(number: int) -> str:
    """A number for a reader: 4.9 million."""
    for size, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
