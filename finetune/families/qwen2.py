"""Qwen2, Qwen2.5 and R1-Distill-Qwen."""

from finetune.families.family import Family

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    licence="Most sizes are Apache-2.0; Qwen2.5 3B and 72B carry the Qwen licence.",
)
