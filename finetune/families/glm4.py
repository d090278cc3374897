"""GLM-4, dense: gate and up are one fused layer."""

from finetune.families.family import Family

FAMILY = Family(
    name="glm4",
    model_types=("glm", "glm4"),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    mlp=("gate_up_proj", "down_proj"),
    licence="MIT for GLM-4-0414; earlier ones carry the GLM-4 licence.",
)
