"""MiMo-V2-Flash: dense first layer, routed experts above."""

from finetune.families.family import EXPERTS, GLU, PER_EXPERT, QKVO, TWIN_DEEPSEEK, Family

FAMILY = Family(
    name="mimo_v2_flash",
    model_types=("mimo_v2_flash",),
    attention=QKVO,
    mlp=GLU,
    licence="MIT.",
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("MiMoV2FlashMoE",),
    layers=("MiMoV2FlashDecoderLayer",),
    twin=TWIN_DEEPSEEK,
)
