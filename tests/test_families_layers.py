"""Every family of the table names layers that its models have, and leaves none out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from finetune.families import FAMILIES, match
from finetune.families.family import Family
from finetune.recipe.sections import AdapterOptions
from finetune.registry import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
KNOWN: list[Family] = [resolve("family", name, FAMILIES) for name in FAMILIES]
TYPES = [(family, model_type) for family in KNOWN for model_type in family.model_types]


def twin(model_type: str) -> PreTrainedModel:
    """A tiny random model of an architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE))


def test_families_are_found_under_their_own_names() -> None:
    assert len(TYPES) >= 8
    assert [family.name for family in KNOWN] == list(FAMILIES)
    types = [model_type for _, model_type in TYPES]
    assert len(set(types)) == len(types), "a model type belongs to one family"
    assert all(family.licence.endswith(".") for family in KNOWN)


@pytest.mark.parametrize(("family", "model_type"), TYPES, ids=lambda value: getattr(value, "name", value))
def test_auto_adapts_every_linear_layer_that_may_be(family: Family, model_type: str) -> None:
    from finetune.model.adapt import resolve_targets

    model = twin(model_type)
    found = match("auto", model_type)
    assert found is family
    targets = resolve_targets(model, AdapterOptions(), found)
    every = resolve_targets(model, AdapterOptions(target_modules="all-linear"), None)
    left_out = {name.rsplit(".", 1)[-1] for name in set(every.modules) - set(targets.modules)}
    assert left_out == set(family.never)
    assert len(targets.modules) == SHAPE["num_hidden_layers"] * len(family.targets)
    assert not targets.assumed
