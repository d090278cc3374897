"""MiniMax-M3 as it is published, with a tower that sees; the part for text."""

from finetune.families.family import PER_EXPERT_W, TWIN_VISION, Family
from finetune.families.minimax_m3 import FAMILY as TEXT

FAMILY = Family(
    name="minimax_m3_vl",
    model_types=("minimax_m3_vl",),
    attention=TEXT.attention,
    mlp=TEXT.mlp,
    licence=TEXT.licence,
    never=TEXT.never,
    experts=TEXT.experts,
    stored={
        **PER_EXPERT_W,
        "shared_experts.gate_up_proj.weight": ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight"),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    },
    renamed=(
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("mlp.shared_experts.", "block_sparse_moe.shared_experts."),
    ),
    moe_blocks=TEXT.moe_blocks,
    layers=TEXT.layers,
    twin={**TEXT.twin, "vision_config": TWIN_VISION},
)
