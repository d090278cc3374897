"""DeepSeek-V3, V3.1 and R1, Moonlight and others of that architecture."""

from finetune.families.family import EXPERTS, GLU, MLA, MLA_OPTIONAL, PER_EXPERT, TWIN_DEEPSEEK, TWIN_MLA, Family

FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    attention=MLA,
    mlp=GLU,
    licence="R1, V3-0324 and later: MIT. The first V3: DeepSeek model licence (use restrictions).",
    optional=MLA_OPTIONAL,
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("DeepseekV3MoE",),
    layers=("DeepseekV3DecoderLayer",),
    stop=("<｜end▁of▁sentence｜>",),
    thinking="R1 and V3.1: <think> before the answer, dropped from earlier turns. V3: none.",
    tools="<｜tool▁calls▁begin｜> around each call.",
    twin={**TWIN_DEEPSEEK, **TWIN_MLA},
    hub=((r"deepseek-(v3(\.1)?|r1)(-(?!distill).*)?", "deepseekv3"),),
    published=((r"deepseek-(v3(-base|-0324)?|v3\.1(-base|-terminus)?|r1(-zero|-0528)?)", "fp8"),),
)
