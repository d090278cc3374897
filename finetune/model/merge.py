"""Fold a LoRA adapter into the weights of its base, tensor by tensor, file to file.

No model is built: a weight is read from the base's safetensors files, gets `scale * B @ A` added in float32, is rounded
once and written. What the adapter does not touch is copied as it is. Every adapter weight must find its tensor, so a
merge that would quietly leave a part out cannot happen.

For QLoRA the trained base is the quantised one: its weights are quantised and dequantised again here, for exactly the
modules that were quantised in training. (Merged onto the unquantised base the result is not what was trained: on a
small Qwen3, mean KL 1.2e-2 against 7e-5.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import ExportError
from finetune.files import write_json
from finetune.model.folder import INDEX, SINGLE, Base, safetensors_header

_PREFIX = "base_model.model."
_UNITS = {"MB": 10**6, "GB": 10**9}
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight.

    Attributes:
        a: (r, in) float32.
        b: (out, r) float32.
        scale: lora_alpha / r, or lora_alpha / sqrt(r).
        magnitude: (out,) float32 for DoRA, else None.
        transposed: whether the weight is stored (in, out).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    transposed: bool = False

    def apply(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The merged weight in float32, and how far it is from `weight` (float32)."""
        delta = self.scale * (self.b @ self.a)
        if self.transposed:
            delta = delta.T
        merged = weight + delta
        if self.magnitude is not None:
            # DoRA (arXiv 2402.09353): rows of the sum are scaled to the learnt magnitude.
            merged = merged * (self.magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged, merged - weight


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


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Update]]:
    """An adapter's config, and its updates by the name of the tensor they belong to.

    Raises:
        ExportError: the folder is no LoRA adapter, or one whose merge is not known to be right.
    """
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ExportError(f"{folder} is no adapter: {path.name} is missing; name a run or adapter folder")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        safetensors_header(weights_path)
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder}: the adapter is damaged: {error}; take another copy") from error
    _refuse_unknown(folder, config)
    tensors = {name.removeprefix(_PREFIX): value.float() for name, value in load_file(weights_path).items()}
    updates: dict[str, Update] = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(f"{module}.lora_B.weight", None)
        if b is None:
            raise ExportError(f"{folder}: {module} has lora_A and no lora_B; the adapter is incomplete")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ExportError(f"{folder}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}")
        magnitude = tensors.pop(f"{module}.lora_magnitude_vector", None)
        updates[f"{module}.weight"] = Update(
            a, b, _scale(config, module, a.shape[0]), magnitude, bool(config.get("fan_in_fan_out"))
        )
    if tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise ExportError(f"{folder}: weights that are no LoRA matrices are not merged here: {some}")
    if not updates:
        raise ExportError(f"{folder}: the adapter holds no LoRA matrices")
    return config, updates


def _refuse_unknown(folder: Path, config: dict[str, Any]) -> None:
    """Settings under which `scale * B @ A` is not the whole truth."""
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{folder}: {config.get('peft_type')} adapters cannot be merged here; only LoRA and DoRA")
    initial = config.get("init_lora_weights", True)
    wrong = {
        "bias": config.get("bias", "none") != "none",
        "lora_bias": bool(config.get("lora_bias")),
        "layer_replication": bool(config.get("layer_replication")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "trainable_token_indices": bool(config.get("trainable_token_indices")),
        "target_parameters": bool(config.get("target_parameters")),
        "init_lora_weights": isinstance(initial, str) and initial.lower() not in ("gaussian", "orthogonal", "eva"),
        "use_dora with fan_in_fan_out": bool(config.get("use_dora")) and bool(config.get("fan_in_fan_out")),
    }
    faults = [name for name, bad in wrong.items() if bad]
    if faults:
        raise ExportError(f"{folder}: adapters with {', '.join(faults)} are not merged here; merge with peft")


def _scale(config: dict[str, Any], module: str, r: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name, or its end, as PEFT looks patterns up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def requantiser(facts: dict[str, Any]) -> Callable[[str, Tensor], Tensor]:
    """A function that gives a base weight the values it had in training.

    Args:
        facts: `quantization` of the adapter's finetune.json: `kind`, `compute_dtype`, `modules`.
    """
    if not facts:
        return lambda name, weight: weight
    kind, modules = facts["kind"], set(facts["modules"])
    dtype = getattr(torch, facts["compute_dtype"])
    import bitsandbytes.functional as bnb

    def through(name: str, weight: Tensor) -> Tensor:
        if name.removesuffix(".weight") not in modules:
            return weight
        if kind == "nf4":
            packed, state = bnb.quantize_4bit(weight.to(dtype), compress_statistics=True, quant_type="nf4")
            return bnb.dequantize_4bit(packed, state)
        rows, statistics, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return rows.float() * statistics[:, None] / 127.0

    return through


def merge_weights(
    base: Base,
    updates: dict[str, Update],
    output: Path,
    dtype: str,
    max_shard_size: str,
    requantise: Callable[[str, Tensor], Tensor],
) -> MergeReport:
    """Write the merged weights into `output`, with an index when there are several files.

    Args:
        base: a local base.
        updates: from `read_adapter`.
        output: an existing folder.
        dtype: "auto" keeps each tensor's own, else the name of a torch dtype for all floating-point tensors.
        max_shard_size: as "5GB".
        requantise: from `requantiser`.

    Raises:
        ExportError: an adapter weight finds no tensor, or one of another shape.
    """
    where = {name: (path, entry) for path in base.weights for name, entry in safetensors_header(path).items()}
    _refuse_left_over(updates, where)
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


def _refuse_left_over(updates: dict[str, Update], where: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    faults = []
    for name, update in updates.items():
        if name not in where:
            faults.append(f"  {name}: no such tensor in the base")
            continue
        shape = (update.b.shape[0], update.a.shape[1])
        stored = tuple(where[name][1]["shape"])
        if stored != (shape[::-1] if update.transposed else shape):
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
    requantise: Callable[[str, Tensor], Tensor],
    report: MergeReport,
) -> Tensor:
    dtype = target if target is not None and weight.is_floating_point() else weight.dtype
    trained_on = requantise(name, weight)
    if update is None:
        report.copied += 1
        return trained_on.to(dtype)
    start = trained_on.float()
    merged, change = update.apply(start)
    stored = merged.to(dtype)
    report.merged.append(name)
    report.count(change, stored.float() - start)
    return stored
