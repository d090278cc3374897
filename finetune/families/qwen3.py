"""Qwen3, dense."""

from finetune.families.family import Family

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    licence="Apache-2.0.",
)
