"""Hunyuan 3: routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, PER_EXPERT, QKVO, TWIN_DEEPSEEK, Family

FAMILY = Family(
    name="hy_v3",
    model_types=("hy_v3",),
    attention=QKVO,
    mlp=GLU,
    licence="See the model card: terms of the Hunyuan licences differ by release.",
    experts=EXPERTS,
    stored=PER_EXPERT,
    renamed=(("mlp.shared_experts.", "mlp.shared_mlp."),),
    moe_blocks=("HYV3MoE",),
    layers=("HYV3DecoderLayer",),
    twin=TWIN_DEEPSEEK,
)
