"""Mistral and Ministral, dense."""

from finetune.families.family import Family

FAMILY = Family(
    name="mistral",
    model_types=("mistral", "ministral"),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    licence="Most open sizes are Apache-2.0; some carry the Mistral Research License.",
)
