"""Hunyuan, dense."""

from finetune.families.family import Family

FAMILY = Family(
    name="hunyuan",
    model_types=("hunyuan_v1_dense",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    licence="Tencent Hunyuan Community License: territory and user limits, attribution.",
)
