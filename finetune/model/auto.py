"""Which of transformers' classes builds a model for text, whatever else its checkpoint can do."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config: PretrainedConfig) -> Any:
    """AutoModelForCausalLM; AutoModelForImageTextToText for the configs that it alone knows.

    Of Kimi K2.5, Mistral 4 and others transformers registers the whole model only, which takes text alone as well.
    """
    return _class_for(type(config))


def class_name(model_type: str) -> str:
    """The name of that class, for one who is told how to load a model.

    Args:
        model_type: of a config.json.
    """
    known = model_type in CONFIG_MAPPING
    return str((_class_for(CONFIG_MAPPING[model_type]) if known else AutoModelForCausalLM).__name__)


def _class_for(kind: type[PretrainedConfig]) -> Any:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
