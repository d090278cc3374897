"""gpt-oss: every feed-forward block is of routed experts, stored experts x in x out."""

from finetune.families.family import EXPERTS, QKVO, TWIN_EXPERTS, Family

FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    attention=QKVO,
    mlp=(),
    licence="Apache-2.0.",
    experts=EXPERTS,
    transposed=True,
    moe_blocks=("GptOssMLP",),
    layers=("GptOssDecoderLayer",),
    stop=("<|return|>", "<|endoftext|>", "<|call|>"),
    thinking="The channel `analysis` before the channel `final` (harmony); dropped from earlier turns.",
    tools="The channel `commentary`, addressed to functions.NAME, ended by <|call|>.",
    twin=TWIN_EXPERTS,
    hub=((r"gpt-oss-.*", "gptoss"),),
    published=((r"gpt-oss-(20b|120b)", "mxfp4"),),
)
