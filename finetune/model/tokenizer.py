"""Load a base's tokenizer. transformers can do that without torch, in a third of the memory."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from finetune.errors import ModelError
from finetune.model.folder import Base
from finetune.recipe.sections import ModelOptions

# What transformers raises on a folder it cannot make a model of. RuntimeError is not among them: it may be memory.
NOT_LOADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError, StrictDataclassError
)  # fmt: skip


def load_tokenizer(options: ModelOptions, base: Base) -> Tokenizer:
    """The tokenizer of a fetched base.

    Raises:
        ModelError: it cannot be loaded.
    """
    assert base.folder is not None, "a base is fetched before it is loaded"
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(base.folder, trust_remote_code=options.trust_remote_code)
    except NOT_LOADABLE as error:
        raise not_loaded(options, "tokenizer", error) from error
    if tokenizer.pad_token_id is None:
        # Only padding positions carry it, and those are masked by position, never by this id.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def not_loaded(options: ModelOptions, part: str, error: Exception) -> ModelError:
    """The error of a base of which `part` cannot be loaded."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ModelError(
        f"model.name_or_path: cannot load the {part} of {options.name_or_path} ({reason}); check that it is a causal "
        "language model that the installed transformers knows, and that the folder holds all of it"
    )
