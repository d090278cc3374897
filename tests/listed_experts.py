"""A model with routed experts that are modules of their own, in a list, as models with code of their own have them.

transformers keeps the experts of all its families in one parameter. This file is saved beside such a model's weights
and run by `model.trust_remote_code`; it is a Qwen3 but for that.
"""

from torch import Tensor, nn
from torch.nn.functional import softmax
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3MLP

EXPERTS = 32  # so many that the rows of two processes are sent to different ones


class ListedConfig(Qwen3Config):
    """Under a name of its own, so that no conversion of weights is known for it."""

    model_type = "listed_moe"


class ListedMoE(nn.Module):
    """Only experts that a token is sent to are run, which differ from process to process."""

    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Qwen3MLP(config) for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        """Of (batch, length, hidden) the same."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = softmax(self.gate(flat), dim=-1).max(dim=-1)
        out = flat.new_zeros(flat.shape)
        for number in chosen.unique().tolist():
            (rows,) = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, self.experts[number](flat[rows]) * weights[rows, None])
        return out.reshape(hidden.shape)


class ListedForCausalLM(Qwen3ForCausalLM):
    """Its blocks of experts are of that kind."""

    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedMoE(config)
        self.post_init()


ListedConfig.register_for_auto_class()
ListedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
