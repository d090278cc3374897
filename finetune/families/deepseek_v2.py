"""DeepSeek-V2 and V2-Lite: latent attention, routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, MLA, MLA_OPTIONAL, PER_EXPERT, TWIN_DEEPSEEK, TWIN_MLA, Family

FAMILY = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    attention=MLA,
    mlp=GLU,
    licence="DeepSeek model licence: use restrictions that must be passed on.",
    optional=MLA_OPTIONAL,
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("DeepseekV2Moe",),
    layers=("DeepseekV2DecoderLayer",),
    stop=("<｜end▁of▁sentence｜>",),
    twin={**TWIN_DEEPSEEK, **TWIN_MLA},
)
