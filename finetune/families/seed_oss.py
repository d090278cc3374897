"""Seed-OSS."""

from finetune.families.family import GLU, QKVO, Family

FAMILY = Family(
    name="seed_oss",
    model_types=("seed_oss",),
    attention=QKVO,
    mlp=GLU,
    licence="Apache-2.0.",
    layers=("SeedOssDecoderLayer",),
    stop=("<seed:eos>",),
    thinking="<seed:think> in the answer, with a budget that the system message states.",
    tools="<seed:tool_call> with <function=…> and <parameter=…>.",
)
