"""Load the base model and its tokenizer, with every precision stated rather than inherited."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from finetune.compat import flatten_8bit_inputs, fp8_blocks_of, keep_4bit_unpacked
from finetune.errors import EnvironmentFault, ModelError
from finetune.families import match
from finetune.model.as_stored import kept_as_stored, widen_buffers
from finetune.model.attention import EAGER_UP_TO
from finetune.model.auto import auto_class
from finetune.model.folder import Base
from finetune.model.quantise import plan, refuse_transposed
from finetune.model.skeleton import skeleton
from finetune.model.stored import facts_of, stored
from finetune.model.tokenizer import NOT_LOADABLE, load_tokenizer, not_loaded
from finetune.recipe.sections import ModelOptions

__all__ = ["load_tokenizer"]  # stands beside the base that it belongs to

# What reads a stored format as ordinary weights, by `quant_method` of config.json.
_DEQUANTISING: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}


@dataclass(frozen=True)
class Precision:
    """The dtype of everything that has one, by torch's names.

    Attributes:
        compute: matrix products (autocast where it differs from the weights).
        base: the base weights in memory; "nf4" or "int8" when quantised.
        trained: the weights that are trained: the adapter, or the whole base.
        optimizer: the optimizer's state.
        quantised_from: what weights are rounded to before they are quantised, where that is not `compute`; empty where
            it is. The proof of a merge computes in float32 what training had quantised from bfloat16.
    """

    compute: str
    base: str
    trained: str = "float32"
    optimizer: str = "float32"
    quantised_from: str = ""

    def facts(self) -> dict[str, str]:
        """As a resolved recipe states them."""
        return {
            "dtype of matrix products": self.compute,
            "dtype of the base": self.base,
            "dtype of the trained weights": self.trained,
            "dtype of the optimizer state": self.optimizer,
        }


def precision(options: ModelOptions, method: str, compute: str) -> Precision:
    """What each part is kept in.

    Trained weights are float32 whatever the base is: a bfloat16 weight has 8 bits of mantissa, so an update below 1/256
    of its size is lost, which freezes small updates.

    Args:
        options: the model section.
        method: the adapter's method; "none" trains the base itself.
        compute: the precision of matrix products, resolved.
    """
    if method == "none":
        return Precision(compute=compute, base="float32")
    base = compute if options.quantization == "none" else options.quantization
    return Precision(compute=compute, base=base)


def held_as(facts: Mapping[str, Any], compute: str) -> Precision:
    """How the base of an adapter is held as in training, to the bit, wherever it is loaded again.

    Args:
        facts: `quantization` of the adapter's finetune.json; empty for a base that was not quantised.
        compute: the precision of matrix products, by torch's name.
    """
    kind, before = facts.get("kind", "none"), facts.get("compute_dtype", compute)
    if kind == "none":
        return Precision(compute=compute, base=compute)
    return Precision(compute=compute, base=kind, quantised_from=before if before != compute else "")


@dataclass(frozen=True)
class Attention:
    """How a model attends.

    Attributes:
        own: the model's own implementation, by transformers' name: for rows alone and for padded batches.
        inside: what is computed inside each document where documents are laid end to end (see model/attention.py).
    """

    own: str
    inside: str


def attention(options: ModelOptions, device: str, longest: int) -> Attention:
    """The attention kernels for rows of at most `longest` tokens on a device type."""
    if options.attn_implementation != "auto":
        return Attention(options.attn_implementation, options.attn_implementation)
    if device != "cpu":
        return Attention("sdpa", "sdpa")
    return Attention("eager" if longest <= EAGER_UP_TO else "sdpa", "eager")


def _quantization(options: ModelOptions, base: Base, kept: Precision, sharded: bool) -> BitsAndBytesConfig | None:
    """What transformers is told to quantise, and to leave whole, as it reads the files.

    FSDP shards numbers that could have a gradient, and leaves bytes whole on each process: where it is to shard 4-bit
    weights, they are stored as numbers of the compute dtype, the same bits under another name.
    """
    if options.quantization == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401 - only its presence is asked here
    except ImportError as error:
        raise EnvironmentFault(
            f"model.quantization: {options.quantization} needs bitsandbytes: pip install 'finetune-recipes[quant]'"
        ) from error
    compute = kept.compute
    held = getattr(torch, kept.quantised_from) if kept.quantised_from else None
    bare = skeleton(options, base, compute)
    planned = plan(bare, match(options.family, bare.config.model_type), options.quantization)
    if options.quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=planned.skip_patterns())
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute),
            bnb_4bit_quant_storage=getattr(torch, compute) if sharded else torch.uint8,
            llm_int8_skip_modules=planned.skip_patterns(),
        )
    if not planned.experts and held is None:
        return config
    from finetune.model.quantiser import quantiser_of

    return quantiser_of(config, planned.experts, held)


def load_base(
    options: ModelOptions,
    base: Base,
    kept: Precision,
    attn_implementation: str,
    device: torch.device | None = None,
    sharded: bool = False,
    as_stored: bool = False,
) -> PreTrainedModel:
    """The base model in memory.

    Args:
        options: the model section.
        base: the fetched base.
        kept: the precisions, from `precision`.
        attn_implementation: the model's own kernel, from `attention`.
        device: where to put the weights; None leaves them where the trainer moves them from.
        sharded: whether FSDP will shard them.
        as_stored: whether weights of a float32 model stay in 16 bits where their files hold them so.

    Raises:
        ModelError: the weights cannot be loaded, or some are missing from the files.
        EnvironmentFault: bitsandbytes, or the package of an attention kernel, is needed and not installed.
    """
    assert base.folder is not None, "a base is fetched before it is loaded"
    held = stored(options.name_or_path, base.config, options.quantization)
    if held is not None and not held.dequantised:
        refuse_transposed(options.name_or_path, skeleton(options, base, kept.base), held)
    quantization = _quantization(options, base, kept, sharded)
    dtype = getattr(torch, kept.compute if quantization is not None else kept.base)
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": options.trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in the report, and refused below by name
    }
    if held is not None and held.dequantised:
        arguments["quantization_config"] = _DEQUANTISING[held.method](dequantize=True)
    elif quantization is not None:
        arguments["quantization_config"] = quantization
    if held is not None or quantization is not None:
        arguments["device_map"] = {"": device if device is not None else "cpu"}
    try:
        config = AutoConfig.from_pretrained(base.folder, trust_remote_code=options.trust_remote_code)
        fp8 = held is not None and held.method == "fp8"
        blocks = fp8_blocks_of(facts_of(base.config) or {}) if fp8 else nullcontext()
        with blocks, kept_as_stored() if as_stored else nullcontext():
            model, report = auto_class(config).from_pretrained(base.folder, **arguments)
    except NOT_LOADABLE as error:
        if isinstance(error, ImportError) and "flash" in str(error).lower():
            raise EnvironmentFault(
                f"model.attn_implementation: {attn_implementation} needs a package that is not installed, or a GPU "
                f"({str(error).splitlines()[0]}); install it, or write auto"
            ) from error
        raise not_loaded(options, "model", error) from error
    _refuse_missing(options.name_or_path, report)
    if held is not None and held.dequantised and dtype == torch.float32:
        model.float()  # transformers leaves some of it in the files' bfloat16, which no product takes beside float32
    if as_stored:
        widen_buffers(model)
    keep_4bit_unpacked(model)
    flatten_8bit_inputs(model)
    if "device_map" not in arguments and device is not None:
        model.to(device)
    return model


def _refuse_missing(name: str, report: dict[str, Any]) -> None:
    """transformers fills weights that no file holds with random numbers; that is never what a user wants."""
    lines = [f"  {key}: in no file" for key in sorted(report["missing_keys"])]
    lines += [
        f"  {key}: {tuple(stored)} in its file, {tuple(needed)} by config.json"
        for key, stored, needed in sorted(report["mismatched_keys"])
    ]
    if lines:
        raise ModelError(
            f"the base model {name} lacks {len(lines)} weights, which would be random:\n"
            + "\n".join(lines[:10])
            + "\ndownload the model again, or name the right one"
        )


def stop_ids(tokenizer: Tokenizer, base: Base) -> frozenset[int]:
    """The token ids that end an answer: the tokenizer's, the config's and the generation config's end tokens.

    Raises:
        ModelError: the generation config is damaged.
    """
    return base.stop_ids(tokenizer.eos_token_id)
