"""Kimi-Linear: linear attention beside latent attention, routed and shared experts."""

from finetune.families.family import EXPERTS, GLU, PER_EXPERT_W, QKVO, TWIN_DEEPSEEK, TWIN_MLA, Family

FAMILY = Family(
    name="kimi_linear",
    model_types=("kimi_linear",),
    attention=(*QKVO, "q_a_proj", "q_b_proj", "b_proj", "g_a_proj", "g_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    mlp=GLU,
    licence="MIT.",
    never=("forget_gate.f_a_proj", "forget_gate.f_b_proj"),
    optional=("q_a_proj", "q_b_proj"),
    experts=EXPERTS,
    stored=PER_EXPERT_W,
    renamed=(("mlp.", "block_sparse_moe."),),
    moe_blocks=("KimiLinearMoE",),
    layers=("KimiLinearDecoderLayer",),
    stop=("<|im_end|>", "[EOS]"),
    tools="<|tool_call_begin|> around each call.",
    twin={
        **TWIN_DEEPSEEK,
        **TWIN_MLA,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_attn_config": {
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "kda_layers": [1],
            "full_attn_layers": [2],
        },
    },
)
