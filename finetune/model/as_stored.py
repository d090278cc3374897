"""Weights in the dtype of their files, in a model of another: mapped from them, to be widened where they are laid down.

A base that is trained whole is float32, and its files mostly hold bfloat16. Where each process will keep only a part of
it, a float32 copy of all of it in each process would be what takes most memory of the host. So weights stay mapped from
their files, one copy for all processes of a host, and each is widened when its parts are laid down
(finetune/run/spread.py): the same numbers, as every bfloat16 and float16 number is one in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def kept_as_stored() -> Iterator[None]:
    """Have transformers load 16-bit weights of a float32 model as they are, inside the `with`.

    Loading the model in 16 bits would not do: what it computes when it is built (scales of embeddings, frequencies)
    would be rounded, too. Changes the one function in which transformers 5 gives a tensor its dtype.
    """
    import transformers.core_model_loading as loading

    stock = loading._materialize_copy

    def as_stored(tensor: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        found: torch.Tensor = tensor[...]
        return stock(found, device, found.dtype if dtype == torch.float32 and found.dtype in NARROW else dtype)

    loading._materialize_copy = as_stored
    try:
        yield
    finally:
        loading._materialize_copy = stock


def widen_buffers(model: nn.Module) -> None:
    """Make float32 what a model keeps beside its weights and files hold in 16 bits, as biases of routers."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype in NARROW:
                setattr(module, name, buffer.float())
