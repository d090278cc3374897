"""DeepSeek-V3.2: as V3, with an indexer that picks what attention sees."""

from finetune.families.family import EXPERTS, GLU, MLA, MLA_OPTIONAL, PER_EXPERT, TWIN_DEEPSEEK, TWIN_MLA, Family

FAMILY = Family(
    name="deepseek_v32",
    model_types=("deepseek_v32",),
    attention=MLA,
    mlp=GLU,
    licence="MIT.",
    never=("indexer.wq_b", "indexer.wk", "indexer.weights_proj"),
    optional=MLA_OPTIONAL,
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("DeepseekV32MoE",),
    layers=("DeepseekV32DecoderLayer",),
    stop=("<｜end▁of▁sentence｜>",),
    thinking="<think> before the answer, dropped from earlier turns.",
    twin={**TWIN_DEEPSEEK, **TWIN_MLA, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 16},
)
