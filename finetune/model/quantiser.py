"""transformers' quantisers for bitsandbytes, with what they lack: routed experts, and weights that are rounded first.

A load gives its quantiser the precision of all matrix products, and quantises what it has read in that. A proof in
float32, or an evaluation in another precision than training's, would so hold other bytes than those that were trained
on. Here the weights that are quantised are read in float32, whatever the rest of the model is read in, and rounded to
what training had read them in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig, QuantizationMethod

from finetune.model.quantise_experts import pack

# The quantisers' names in transformers' table.
NF4, INT8 = "finetune_nf4", "finetune_int8"


def quantiser_of(
    config: BitsAndBytesConfig, experts: Iterable[str] = (), held: torch.dtype | None = None
) -> BitsAndBytesConfig:
    """The configuration, for one load that does what a quantiser of this module does.

    Args:
        config: of the linear layers; once the load has begun it is again as it was.
        experts: full names of parameters of routed experts, which are quantised as well; in 4 bits alone.
        held: what weights are rounded to before they are quantised; None for the precision of matrix products.
    """
    config.quant_method = INT8 if config.load_in_8bit else NF4
    config.experts, config.held = frozenset(experts), held
    return config


class _Told:
    """What the quantisers of this module share."""

    def __init__(self, quantization_config: Any, **how: Any) -> None:
        """Take what `quantiser_of` has told off the configuration, which the model keeps and which must be JSON.

        Args:
            quantization_config: from `quantiser_of`.
            how: as transformers says it.
        """
        told = vars(quantization_config)
        self.experts: frozenset[str] = told.pop("experts")
        self.held: torch.dtype | None = told.pop("held")
        self.whole: set[str] = set()
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
        super().__init__(quantization_config, **how)  # type: ignore[call-arg]

    def preprocess_model(self, model: Any, *args: Any, **how: Any) -> Any:
        """Have the weights that are to be rounded read in float32."""
        found = super().preprocess_model(model, *args, **how)  # type: ignore[misc]
        if self.held is not None:
            needed: Any = self
            names = (name for name, _ in model.named_parameters() if needed.param_needs_quantization(model, name))
            self.whole = {re.escape(name) for name in names} - model._keep_in_fp32_modules_strict
            model._keep_in_fp32_modules_strict |= self.whole
        return found

    def postprocess_model(self, model: Any, *args: Any, **how: Any) -> Any:
        """Take back what was said of float32: nothing of it is left."""
        model._keep_in_fp32_modules_strict -= self.whole
        return super().postprocess_model(model, *args, **how)  # type: ignore[misc]


def _rounded(quantiser: _Told, value: Tensor | list[Tensor]) -> Tensor:
    """A weight as training had read it."""
    tensor = value[0] if isinstance(value, list) else value
    return tensor if quantiser.held is None else tensor.to(quantiser.held)


class _Pack4(Bnb4bitQuantize):
    """Quantises a parameter as it comes from the files."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **how: Any) -> dict[str, Tensor]:
        """Of experts the packed parameter by its full name; of other weights what bitsandbytes makes of them."""
        compute = self.hf_quantizer.quantization_config.bnb_4bit_compute_dtype
        found: dict[str, Tensor] = {}
        for full, value in input_dict.items():
            tensor = _rounded(self.hf_quantizer, value)
            if full in self.hf_quantizer.experts:
                place, _, name = full.rpartition(".")
                found[full] = pack(model.get_submodule(place), name, tensor, compute)
            else:
                found |= super().convert({full: [tensor]}, model=model, **how)
        return found


class _Pack8(Bnb8bitQuantize):
    """Quantises a parameter as it comes from the files."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **how: Any) -> dict[str, Tensor]:
        """What bitsandbytes makes of weights that are as training had read them."""
        given = {full: [_rounded(self.hf_quantizer, value)] for full, value in input_dict.items()}
        made: dict[str, Tensor] = super().convert(given, model=model, **how)
        return made


@register_quantizer(NF4)
class _Quantiser4(_Told, Bnb4BitHfQuantizer):
    """transformers' quantiser for 4 bits, and the experts beside."""

    def param_needs_quantization(self, model: Any, param_name: str, **how: Any) -> bool:
        """Whether a parameter is to be quantised as it is loaded."""
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **how)

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        """What quantises one parameter."""
        return _Pack4(self)


@register_quantizer(INT8)
class _Quantiser8(_Told, Bnb8BitHfQuantizer):
    """transformers' quantiser for 8 bits."""

    def get_quantize_ops(self) -> Bnb8bitQuantize:
        """What quantises one parameter."""
        return _Pack8(self)
