"""Llama 2 and 3, R1-Distill-Llama, SmolLM and the many models that share the architecture."""

from finetune.families.family import Family

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_proj", "up_proj", "down_proj"),
    licence="Llama 2 and 3: Llama Community License (attribution, use policy). SmolLM and many others: Apache-2.0.",
)
