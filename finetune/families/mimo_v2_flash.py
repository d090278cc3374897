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
    stop=("<|im_end|>", "<|endoftext|>"),
    thinking="<think> in the answer, or reasoning_content; the template drops it from earlier turns.",
    tools="<tool_call> with JSON of name and arguments.",
    twin=TWIN_DEEPSEEK,
)
