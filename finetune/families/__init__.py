"""One file per model family: the facts its config.json does not state. To add one, copy a file and add a line."""

from __future__ import annotations

from finetune.errors import RecipeError
from finetune.families.family import Family
from finetune.registry import resolve

FAMILIES = {
    "llama": "finetune.families.llama:FAMILY",
    "qwen2": "finetune.families.qwen2:FAMILY",
    "qwen2_moe": "finetune.families.qwen2_moe:FAMILY",
    "qwen3": "finetune.families.qwen3:FAMILY",
    "qwen3_moe": "finetune.families.qwen3_moe:FAMILY",
    "qwen3_next": "finetune.families.qwen3_next:FAMILY",
    "qwen3_5": "finetune.families.qwen3_5:FAMILY",
    "qwen3_5_moe": "finetune.families.qwen3_5_moe:FAMILY",
    "deepseek_v2": "finetune.families.deepseek_v2:FAMILY",
    "deepseek_v3": "finetune.families.deepseek_v3:FAMILY",
    "deepseek_v32": "finetune.families.deepseek_v32:FAMILY",
    "glm4": "finetune.families.glm4:FAMILY",
    "glm4_moe": "finetune.families.glm4_moe:FAMILY",
    "glm4_moe_lite": "finetune.families.glm4_moe_lite:FAMILY",
    "glm_moe_dsa": "finetune.families.glm_moe_dsa:FAMILY",
    "hunyuan": "finetune.families.hunyuan:FAMILY",
    "hunyuan_moe": "finetune.families.hunyuan_moe:FAMILY",
    "hy_v3": "finetune.families.hy_v3:FAMILY",
    "gpt_oss": "finetune.families.gpt_oss:FAMILY",
    "mistral": "finetune.families.mistral:FAMILY",
    "mixtral": "finetune.families.mixtral:FAMILY",
    "gemma": "finetune.families.gemma:FAMILY",
    "phi": "finetune.families.phi:FAMILY",
    "phi3": "finetune.families.phi3:FAMILY",
    "kimi_linear": "finetune.families.kimi_linear:FAMILY",
    "minimax_m2": "finetune.families.minimax_m2:FAMILY",
    "ernie4_5": "finetune.families.ernie4_5:FAMILY",
    "ernie4_5_moe": "finetune.families.ernie4_5_moe:FAMILY",
    "seed_oss": "finetune.families.seed_oss:FAMILY",
    "mimo_v2_flash": "finetune.families.mimo_v2_flash:FAMILY",
}


def match(name: str, model_type: str) -> Family | None:
    """The family a recipe names, or with `auto` the one that `model_type` belongs to; None when no file knows it.

    Raises:
        RecipeError: `name` is neither `auto`, nor in FAMILIES, nor importable, or what it names is no family.
    """
    if name != "auto":
        family = resolve("family", name, FAMILIES)
        if not isinstance(family, Family):
            raise RecipeError(f"model.family: {name} is a {type(family).__name__}, not a finetune Family")
        return family
    for key in FAMILIES:
        family = resolve("family", key, FAMILIES)
        if model_type in family.model_types:
            return family
    return None
