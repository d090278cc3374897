"""Fold a LoRA adapter into the weights of its base, tensor by tensor, file to file.

No model is built: a weight is read from the base's safetensors files, gets `scale * B @ A` added in float32, is rounded
once and written. What the adapter does not touch is copied as it is. Every adapter weight must find its tensor, so a
merge that would quietly leave a part out cannot happen.

For QLoRA the trained base is the quantised one: its weights go through that quantisation again (see requantise.py), for
exactly the modules that were quantised in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.errors import ExportError
from finetune.families.family import Family
from finetune.files import write_json
from finetune.model.folder import INDEX, SINGLE, Base, safetensors_header
from finetune.model.layout import on_disk
from finetune.model.requantise import Requantiser
from finetune.model.update import Update

_UNITS = {"MB": 10**6, "GB": 10**9}
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


@dataclass
class MergeReport:
    """What a merge did.

    Attributes:
        merged: names of the tensors that changed.
        copied: how many tensors were copied as they are.
        bytes: size of the written weights.
        kept_of_update: share of the update that survived rounding to the output's precision (1.0 is all of it).
        files: names of the written weight files.
    """

    merged: list[str] = field(default_factory=list)
    copied: int = 0
    bytes: int = 0
    kept_of_update: float = 1.0
    files: list[str] = field(default_factory=list)
    _along: float = 0.0
    _whole: float = 0.0

    def count(self, update: Tensor, stored: Tensor) -> None:
        """Add one tensor's update (float32) and what of it is stored (float32) to the share that survived."""
        self._along += float((update * stored).sum(dtype=torch.float64))
        self._whole += float((update * update).sum(dtype=torch.float64))
        self.kept_of_update = self._along / self._whole if self._whole else 1.0


def merge_weights(
    base: Base,
    updates: dict[str, Update],
    output: Path,
    dtype: str,
    max_shard_size: str,
    requantise: Requantiser,
    family: Family | None = None,
) -> MergeReport:
    """Write the merged weights into `output`, with an index when there are several files.

    Args:
        base: a local base.
        updates: from `read_adapter`.
        output: an existing folder.
        dtype: "auto" keeps each tensor's own, else the name of a torch dtype for all floating-point tensors.
        max_shard_size: as "5GB".
        requantise: from `requantiser`.
        family: the base's family, which knows what files call its experts; None when no file knows it.

    Raises:
        ExportError: an adapter weight finds no tensor, or one of another shape, or its sum overflows.
    """
    where = {name: (path, entry) for path in base.weights for name, entry in safetensors_header(path).items()}
    updates = on_disk(updates, where.keys(), family)
    _refuse_left_over(updates, requantise, where)
    target = None if dtype == "auto" else getattr(torch, dtype)
    shards = _plan_shards({name: _size(entry, target) for name, (_, entry) in where.items()}, max_shard_size)
    report = MergeReport()
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, weight in _read(names, {name: where[name][0] for name in names}):
            tensors[name] = _merge_one(name, weight, updates.get(name), target, requantise, report)
        save_file(tensors, output / file, metadata={"format": "pt"})
        report.files.append(file)
        report.bytes += (output / file).stat().st_size
    if len(shards) > 1:
        total = sum(_size(entry, target) for _, entry in where.values())
        weight_map = {name: file for file, names in zip(report.files, shards, strict=True) for name in names}
        write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return report


def _refuse_left_over(
    updates: dict[str, Update], requantise: Requantiser, where: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    quantised = sorted(f"{module}.weight" for module in requantise.modules)
    faults = [f"  {name}: quantised in training, no such tensor in the base" for name in quantised if name not in where]
    for name, update in updates.items():
        if name not in where:
            faults.append(f"  {name}: no such tensor in the base")
            continue
        out, into = update.b.shape[-2], update.a.shape[-1]
        shape = (*update.a.shape[:-2], *((into, out) if update.transposed else (out, into)))
        stored = tuple(where[name][1]["shape"])
        if stored != shape:
            faults.append(f"  {name}: {stored} in the base, {shape} in the adapter")
        if where[name][1]["dtype"] not in _FLOATS:
            faults.append(f"  {name}: stored as {where[name][1]['dtype']}; dequantise the base first")
    if faults:
        raise ExportError(
            f"{len(faults)} adapter weights do not fit the base, so the merge would leave them out:\n"
            + "\n".join(faults[:10])
            + "\nname the base the adapter was trained on"
        )


def _size(entry: dict[str, Any], target: torch.dtype | None) -> int:
    start, end = entry["data_offsets"]
    if target is None or entry["dtype"] not in _FLOATS:
        return int(end - start)
    return int((end - start) // _FLOATS[entry["dtype"]] * target.itemsize)


def _plan_shards(sizes: dict[str, int], max_shard_size: str) -> list[list[str]]:
    """Names in their order, split so that no file exceeds the limit (a single larger tensor gets a file)."""
    limit = float(max_shard_size[:-2]) * _UNITS[max_shard_size[-2:]]
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read(names: list[str], where: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        with safe_open(where[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def _merge_one(
    name: str,
    weight: Tensor,
    update: Update | None,
    target: torch.dtype | None,
    requantise: Requantiser,
    report: MergeReport,
) -> Tensor:
    castable = weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    dtype = target if target is not None and castable else weight.dtype
    trained_on = requantise(name, weight)
    if update is None:
        report.copied += 1
        return _finite(name, trained_on.to(dtype)) if dtype != weight.dtype else trained_on.to(dtype)
    start = trained_on.float()
    merged, change = update.apply(start)
    stored = _finite(name, merged.to(dtype)).contiguous()
    report.merged.append(name)
    report.count(change, stored.float() - start)
    return stored


def _finite(name: str, stored: Tensor) -> Tensor:
    if not bool(torch.isfinite(stored).all()):
        raise ExportError(
            f"{name}: not every number is finite in {str(stored.dtype).removeprefix('torch.')}; float16 ends at "
            "65504, so merge with --dtype bfloat16; with any other precision the adapter or the base is damaged"
        )
    return stored
