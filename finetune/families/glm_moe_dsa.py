"""GLM-5: latent attention with an indexer, routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, MLA, MLA_OPTIONAL, PER_EXPERT, TWIN_DEEPSEEK, TWIN_MLA, Family

FAMILY = Family(
    name="glm_moe_dsa",
    model_types=("glm_moe_dsa",),
    attention=MLA,
    mlp=GLU,
    licence="MIT.",
    never=("indexer.wq_b", "indexer.wk", "indexer.weights_proj"),
    optional=MLA_OPTIONAL,
    experts=EXPERTS,
    stored=PER_EXPERT,
    moe_blocks=("GlmMoeDsaMoE",),
    layers=("GlmMoeDsaDecoderLayer",),
    stop=("<|user|>", "<|endoftext|>", "<|observation|>"),
    thinking="<think> in the answer, or reasoning_content; the template drops it from earlier turns.",
    tools="<tool_call> with <arg_key> and <arg_value>.",
    twin={**TWIN_DEEPSEEK, **TWIN_MLA, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 16},
)
