"""What a model family's config.json does not state, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts about one model family.

    Attributes:
        name: short name, the key in FAMILIES.
        model_types: the `model_type` values of config.json that belong to it.
        attention: leaf names of the attention projections that LoRA adapts.
        mlp: leaf names of the feed-forward projections that LoRA adapts.
        never: leaf names of linear layers that must not be adapted (routers, gates of one output).
        licence: what using the weights obliges to, in one sentence.
    """

    name: str
    model_types: tuple[str, ...]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    licence: str
    never: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Leaf names that `adapter.target_modules: auto` adapts."""
        return self.attention + self.mlp
