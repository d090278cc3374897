"""Routed experts in NF4: each expert's matrix quantised by itself, and multiplied with without its whole in memory.

bitsandbytes quantises linear layers, and the experts of a layer are one parameter of three dimensions, which it leaves
as it is: most of a mixture-of-experts model would stay in 16 bits. Here such a parameter becomes packed bytes with
their scales (NF4 with double quantisation, QLoRA, arXiv 2305.14314), layer by layer while the files are read, so that
the unquantised model is never in memory. A forward takes only the experts that tokens were sent to out of their bytes,
one after the other, and the backward pass takes them out again instead of keeping them.

bitsandbytes' own `replace_parameter_4bit` gives the whole parameter back at each forward, which autograd then keeps;
and PEFT 0.21.2 does not take its LoRA off a parameter that is parametrised already, so that each forward would add it
once more (tests/test_compat.py). PEFT's side of this module is model/quantise_lora.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share a scale of their own


@dataclass(frozen=True)
class Slice:
    """One expert's matrix, as it lies in memory.

    Attributes:
        packed: uint8, two weights to a byte.
        absmax: uint8, the scale of each block, quantised.
        nested_absmax: float32, the scale of each block of scales.
        offset: float32, a single number: the mean that was taken off the scales.
        shape: (rows, columns) of the matrix as stored.
        dtype: what it was quantised from, and is taken out in.
        transposed: whether it is stored (in, out) instead of (out, in).
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False

    def whole(self) -> Tensor:
        """The matrix in `dtype`, shaped `shape`."""
        code, nested_code = _codes(self.packed.device)
        nested = bnb.QuantState(self.nested_absmax, code=nested_code, blocksize=SCALES, dtype=torch.float32)
        state = bnb.QuantState(
            self.absmax, torch.Size(self.shape), code, BLOCK, "nf4", self.dtype, self.offset, nested
        )  # fmt: skip
        return bnb.dequantize_4bit(self.packed.reshape(-1, 1), state)


@lru_cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values that 4 bits of a weight, and 8 bits of a scale, stand for."""
    return bnb.get_4bit_type("nf4", device=device), bnb.create_dynamic_map().to(device)


def quantised(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix as (packed, absmax, nested_absmax, offset) of `Slice`."""
    packed, state = bnb.quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )
    assert state.state2 is not None, "bitsandbytes quantises scales where it is asked to"
    assert state.state2.blocksize == SCALES, "bitsandbytes quantises scales by 256"
    return packed.reshape(-1), state.absmax, state.state2.absmax, state.offset.reshape(())


def replayed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of one expert through the quantisation and back, in `dtype`."""
    start = matrix.to(dtype)
    return Slice(*quantised(start), (start.shape[0], start.shape[1]), dtype).whole()


def _scales_of(name: str) -> tuple[str, str, str]:
    """What the parameters beside a packed one are called (finetune/model/kinds.py counts them with it)."""
    return f"{name}_absmax", f"{name}_nested_absmax", f"{name}_offset"


def packed_bytes(shape: Iterable[int]) -> int:
    """What a parameter (experts, rows, columns) takes in NF4, in bytes: weights, scales, scales of scales, offsets."""
    experts, rows, columns = shape
    blocks = math.ceil(rows * columns / BLOCK)
    return experts * (math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / SCALES) + 4)


class _Product(torch.autograd.Function):
    """x (tokens, in) times a quantised matrix, (tokens, out); nothing of the matrix's size is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Slice) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        whole = weight.whole().to(x.dtype)
        return x @ (whole if weight.transposed else whole.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        whole = ctx.weight.whole().to(ctx.dtype)
        return grad.to(ctx.dtype) @ (whole.mT if ctx.weight.transposed else whole), None


@dataclass(frozen=True)
class Factors:
    """LoRA of all experts of a parameter: what is added to it is `scale * left @ right`.

    Attributes:
        left: (experts, rows, r).
        right: (experts, r, columns).
        scale: a factor.
    """

    left: Tensor
    right: Tensor
    scale: float


class ExpertsNF4(nn.Module):
    """What an experts module of transformers becomes: its parameters packed, its forward expert by expert.

    Its class keeps the methods of the class it had (activation, gate). `updates` holds, while a forward runs, the LoRA
    of each parameter (model/quantise_lora.py puts it there). Weights are quantised from `held_dtype`, and products are
    taken in `compute_dtype`, which is the same but in a proof and in an evaluation in another precision.
    """

    updates: dict[str, list[Factors]]
    shapes: dict[str, tuple[int, int, int]]
    compute_dtype: torch.dtype
    held_dtype: torch.dtype

    def slice_of(self, name: str, expert: int) -> Slice:
        """The matrix of one expert in the parameter `name`."""
        packed, absmax, nested, offset = (getattr(self, one)[expert] for one in (name, *_scales_of(name)))
        _, rows, columns = self.shapes[name]
        return Slice(packed, absmax, nested, offset, (rows, columns), self.held_dtype, bool(self.is_transposed))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts of transformers: hidden_states (tokens, hidden), the others (tokens, experts per token)."""
        width = top_k_index.size(-1)
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        tokens = hidden_states[order // width].to(self.compute_dtype)
        counts = torch.bincount(experts, minlength=self.num_experts).tolist()
        answers = [self._one(expert, rows) for expert, rows in enumerate(tokens.split(counts)) if len(rows)]
        weighted = torch.cat(answers) * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)

    def _one(self, expert: int, rows: Tensor) -> Tensor:
        """What one expert answers to its tokens, (tokens, hidden)."""
        if self.has_gate:
            inner = self._apply_gate(self._linear("gate_up_proj", expert, rows))
        else:
            inner = self.act_fn(self._linear("up_proj", expert, rows))
        return self._linear("down_proj", expert, inner)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        x = x.to(self.compute_dtype)
        y: Tensor = _Product.apply(x, self.slice_of(name, expert))
        for update in self.updates.get(name, ()):
            left, right = update.left[expert], update.right[expert]
            low = x @ left @ right if self.is_transposed else x @ right.mT @ left.mT
            y = y + update.scale * low
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


def can_be_packed(module: nn.Module) -> bool:
    """Whether an experts module computes as `ExpertsNF4` does: transformers' common form, and nothing behind it."""
    return hasattr(module, "is_transposed") and not getattr(module, "has_post_expert_norm", True)


def pack(module: nn.Module, name: str, value: Tensor, compute: torch.dtype | None = None) -> nn.Parameter:
    """Put the scales of a parameter into its module and turn that into `ExpertsNF4`; gives the packed parameter.

    Args:
        module: an experts module that `can_be_packed`.
        name: of the parameter.
        value: (experts, rows, columns), in the precision that it is quantised from.
        compute: the precision of matrix products; None for the same.
    """
    if not isinstance(module, ExpertsNF4):
        kind = type(module)
        module.__class__ = type(f"{kind.__name__}NF4", (ExpertsNF4, kind), {"__module__": kind.__module__})
        module.updates, module.shapes = {}, {}
    module.held_dtype, module.compute_dtype = value.dtype, compute or value.dtype
    module.shapes[name] = (value.shape[0], value.shape[1], value.shape[2])
    packed, *scales = (torch.stack(parts) for parts in zip(*map(quantised, value), strict=True))
    for called, scale in zip(_scales_of(name), scales, strict=True):
        # Parameters, not buffers: those would be sent to every process again at each forward of data parallelism.
        held = nn.Parameter(scale, requires_grad=False)
        held._is_hf_initialized = True  # transformers draws what is not marked
        module.register_parameter(called, held)
    return nn.Parameter(packed, requires_grad=False)
