"""Step-3.7, the part for text: gated attention, dense first layers, routed and shared experts above."""

from finetune.families.family import EXPERTS, GLU, QKVO, TWIN_EXPERTS, TWIN_VISION, Family

FAMILY = Family(
    name="step3p7",
    model_types=("step3p7",),
    attention=QKVO,
    mlp=GLU,
    licence="See the model card.",
    never=("self_attn.g_proj",),  # one number a head
    experts=EXPERTS,
    stored={
        "mlp.experts.gate_up_proj": ("moe.gate_proj.weight", "moe.up_proj.weight"),
        "mlp.experts.down_proj": ("moe.down_proj.weight",),
    },
    renamed=(
        ("model.language_model.", "model."),
        ("mlp.shared_experts.", "share_expert."),
    ),
    moe_blocks=("Step3p7SparseMoeBlock",),
    layers=("Step3p7DecoderLayer",),
    twin={
        **TWIN_EXPERTS,
        "share_expert_dim": 32,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "vision_config": TWIN_VISION,
    },
)
