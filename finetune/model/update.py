"""What a LoRA adapter adds to the weights of its base, read from PEFT's files and refused where it is not all known."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.errors import ExportError
from finetune.model.folder import safetensors_header

_PREFIX = "base_model.model."
# Parameters of a module that PEFT adapts as such, in the order in which modules hold them.
_ORDER = ("weight", "gate_up_proj", "down_proj")
# Settings of PEFT's LoRA variants whose forward is not base + scale * B @ A.
_OTHER_MATHS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"
)  # fmt: skip


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight, or to the weights of all experts of a layer.

    Attributes:
        a: (r, in) float32; of experts (experts, r, in).
        b: (out, r) float32; of experts (experts, out, r).
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
            delta = delta.mT
        merged = weight + delta
        if self.magnitude is not None:
            # DoRA (arXiv 2402.09353): rows of the sum are scaled to the learnt magnitude.
            merged = merged * (self.magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged, merged - weight


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Update]]:
    """An adapter's config, and its updates by the name of the tensor they belong to in the model.

    Raises:
        ExportError: the folder is no LoRA adapter, or one whose merge is not known to be right.
    """
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ExportError(f"{folder} is no adapter: {path.name} is missing; name a run or adapter folder")
    try:
        config = dict(json.loads(config_path.read_text(encoding="utf-8")))
        if not isinstance(config.get("lora_alpha"), int | float) and config.get("peft_type") == "LORA":
            raise ValueError("adapter_config.json has no lora_alpha")
        safetensors_header(weights_path)
    except (ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{folder}: the adapter is damaged: {error}; take another copy") from error
    _refuse_unknown(folder, config)
    dora = bool(config.get("use_dora"))
    tensors = {name.removeprefix(_PREFIX): value.float() for name, value in load_file(weights_path).items()}
    updates: dict[str, Update] = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = tensors.pop(name), tensors.pop(f"{module}.lora_B.weight", None)
        if b is None:
            raise ExportError(f"{folder}: {module} has lora_A and no lora_B; the adapter is incomplete")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ExportError(f"{folder}: {module} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}")
        parameter = _parameter(folder, config, module)
        if parameter and not parameter.endswith(".weight"):
            updates[parameter] = _of_experts(folder, config, parameter, a, b)
            continue
        magnitude = tensors.pop(f"{module}.lora_magnitude_vector", None)
        if dora != (magnitude is not None):
            what = "has no lora_magnitude_vector" if dora else "has a lora_magnitude_vector and no use_dora"
            raise ExportError(f"{folder}: {module} {what}; the adapter is incomplete")
        updates[f"{module}.weight"] = Update(
            a, b, _scale(config, parameter or module, a.shape[0]), magnitude, bool(config.get("fan_in_fan_out"))
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
        "init_lora_weights": isinstance(initial, str) and initial.lower() not in ("gaussian", "orthogonal", "eva"),
        **{name: bool(config.get(name)) for name in _OTHER_MATHS},
        "use_dora with fan_in_fan_out": bool(config.get("use_dora")) and bool(config.get("fan_in_fan_out")),
    }
    faults = [name for name, bad in wrong.items() if bad]
    if faults:
        raise ExportError(f"{folder}: adapters with {', '.join(faults)} are not merged here; merge with peft")


def _parameter(folder: Path, config: dict[str, Any], module: str) -> str | None:
    """The full name of the parameter that a module's matrices adapt; None where they adapt the module itself.

    PEFT wraps the parameters of a module around each other in the module's own order, the first innermost, and names
    their matrices by that nesting: experts.base_layer.lora_A, experts.lora_A. (peft 0.21, BaseTuner._inject_parameters)

    Raises:
        ExportError: there are other parameters than those whose order is known.
    """
    place = module.replace(".base_layer", "")
    inside = {
        leaf
        for target in config.get("target_parameters") or ()
        for leaf in [target.rsplit(".", 1)[-1]]
        # A bare `down_proj` means that of every module that has one as a parameter, which are the experts.
        if f".{place}.{leaf}".endswith(f".{target}") and ("." in target or place.endswith("experts"))
    }
    if not inside:
        return None
    depth = module.count(".base_layer")
    ordered = [leaf for leaf in _ORDER if leaf in inside]
    if len(ordered) != len(inside) or depth >= len(ordered):
        raise ExportError(f"{folder}: {place} has adapted parameters ({', '.join(sorted(inside))}) that are not known")
    return f"{place}.{ordered[-1 - depth]}"


def _of_experts(folder: Path, config: dict[str, Any], parameter: str, a: Tensor, b: Tensor) -> Update:
    """PEFT's matrices of all experts in one, A (experts * r, in) and B (out, r * experts), as (experts, …) each."""
    r = int(_by_pattern(config.get("rank_pattern"), parameter, config.get("r", 0)))
    if r < 1 or a.shape[0] % r:
        raise ExportError(f"{folder}: {parameter} has lora_A {tuple(a.shape)}, which is no multiple of r = {r}")
    experts = a.shape[0] // r
    stacked_a = a.reshape(experts, r, a.shape[1])
    stacked_b = b.reshape(b.shape[0], r, experts).permute(2, 0, 1)
    return Update(stacked_a, stacked_b, _scale(config, parameter, r))


def _scale(config: dict[str, Any], module: str, r: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name, or its end, as PEFT looks patterns up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
