"""GLM-4.7-Flash: latent attention, routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, MLA, MLA_OPTIONAL, PER_EXPERT, TWIN_DEEPSEEK, TWIN_MLA, Family

FAMILY = Family(
    name="glm4_moe_lite",
    model_types=("glm4_moe_lite",),
    attention=MLA,
    mlp=GLU,
    licence="MIT.",
    optional=MLA_OPTIONAL,
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("Glm4MoeLiteMoE",),
    layers=("Glm4MoeLiteDecoderLayer",),
    stop=("<|user|>", "<|endoftext|>", "<|observation|>"),
    thinking="<think> in the answer, or reasoning_content; the template drops it from earlier turns.",
    tools="<tool_call> with <arg_key> and <arg_value>.",
    twin={**TWIN_DEEPSEEK, **TWIN_MLA},
)
