"""Rows become batches: padded, or packed with each row attending only to itself.

Shapes: B rows, T tokens. Padding is on the right, and which token pads does not matter: attention and labels come from
lengths, so a pad token that is also the end-of-turn token stays trained where it ends a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from finetune.data.encode import UNTRAINED
from finetune.data.pack import join

Feature = Mapping[str, Any]
Batch = dict[str, torch.Tensor]
MaskKind = Literal["boolean", "additive", "none"]


def _padded(rows: Sequence[Sequence[int]], fill: int, length: int) -> torch.Tensor:
    """(B, T) int64, filled up on the right."""
    tensor = torch.full((len(rows), length), fill, dtype=torch.int64)
    for index, row in enumerate(rows):
        tensor[index, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return tensor


def _width(rows: Sequence[Feature], multiple: int | None) -> int:
    """The longest row, rounded up to a multiple."""
    longest = max(len(row["input_ids"]) for row in rows)
    return longest if multiple is None else -(-longest // multiple) * multiple


@dataclass(frozen=True)
class Collator:
    """Pads token rows to the longest of them.

    Attributes:
        pad_token_id: fills `input_ids`.
        pad_to_multiple_of: round the length up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Feature]) -> Batch:
        """`input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels`, each (B, T) int64."""
        length = _width(rows, self.pad_to_multiple_of)
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_token_id, length),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], 0, length),
            "labels": _padded([row["labels"] for row in rows], UNTRAINED, length),
        }


def mask_kind(attn_implementation: str) -> MaskKind:
    """The mask that keeps packed rows apart under an attention kernel.

    sdpa takes booleans; eager adds the mask to its scores; the flash and flex kernels take no dense mask and find the
    rows by position_ids, provided the model runs with use_cache=False.
    """
    if attn_implementation == "sdpa":
        return "boolean"
    return "additive" if attn_implementation == "eager" else "none"


@dataclass(frozen=True)
class PackedCollator:
    """Batches packed rows (see pack.join) so that no row sees another.

    The dense mask takes B x T x T elements: 4 MiB as booleans for one sequence of 2,048 tokens, 1 GiB for 32,768.
    It replaces a model's own mask, sliding windows included, so such a model must have a window of at least the
    longest row.

    Attributes:
        pad_token_id: fills `input_ids`.
        mask: see mask_kind.
        dtype: of an additive mask; that of the model's activations.
        pad_to_multiple_of: round the length up to a multiple of this.
    """

    pad_token_id: int
    mask: MaskKind = "boolean"
    dtype: torch.dtype = torch.float32
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Feature]) -> Batch:
        """`input_ids`, `labels` and `position_ids` (0 at the start of each row), each (B, T) int64.

        Unless the mask is `none`, also `attention_mask` (B, 1, T, T): true where a query may look, or 0 there and the
        lowest number elsewhere.
        """
        length = _width(rows, self.pad_to_multiple_of)
        positions = torch.zeros((len(rows), length), dtype=torch.int64)
        documents = torch.zeros((len(rows), length), dtype=torch.int64)
        labels = _padded([row["labels"] for row in rows], UNTRAINED, length)
        for index, row in enumerate(rows):
            start = 0
            # Padding is a document too, so that it has something to attend to: a row of no scores would be NaN.
            rest = length - sum(row["seq_lengths"])
            for number, size in enumerate([*row["seq_lengths"], *([rest] if rest else [])]):
                positions[index, start : start + size] = torch.arange(size)
                documents[index, start : start + size] = number
                labels[index, start] = UNTRAINED
                start += size
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_token_id, length),
            "labels": labels,
            "position_ids": positions,
        }
        if self.mask == "none":
            return batch
        allowed = torch.tril(documents[:, :, None] == documents[:, None, :])[:, None]
        if self.mask == "additive":
            hidden = torch.zeros(allowed.shape, dtype=self.dtype)
            batch["attention_mask"] = hidden.masked_fill_(~allowed, torch.finfo(self.dtype).min)
        else:
            batch["attention_mask"] = allowed
        return batch


@torch.no_grad()
def isolation_gap(model: torch.nn.Module, collator: PackedCollator, rows: Sequence[Feature]) -> float:
    """How far packing changes a model's answers: the largest difference of logits between rows packed and rows alone.

    Rounding gives about 1e-6 in float32; rows that see each other give far more than 1e-3.

    Args:
        model: a causal language model; its training mode is restored.
        collator: the one that training uses.
        rows: at least two token rows (`input_ids`, `labels`).
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        batch = {key: value.to(device) for key, value in collator([join(rows)]).items() if key != "labels"}
        together = model(**batch, use_cache=False).logits[0]
        gap, start = 0.0, 0
        for row in rows:
            ids = torch.as_tensor(row["input_ids"], dtype=torch.int64, device=device)
            alone = model(input_ids=ids[None], use_cache=False).logits[0]
            gap = max(gap, (together[start : start + len(ids)] - alone).abs().max().item())
            start += len(ids)
    finally:
        model.train(training)
    return gap


@torch.no_grad()
def leak(model: torch.nn.Module, collator: PackedCollator, row: Feature) -> float:
    """How far the logits of a packed row's last document move when the documents before it change.

    Shapes and places stay the same, so without a leak not one bit differs, whatever the precision.

    Args:
        model: a causal language model; its training mode is restored.
        collator: the one that training uses.
        row: a packed row (see pack.join) of at least two documents.
    """
    device = next(model.parameters()).device
    last = row["seq_lengths"][-1]
    ids = list(row["input_ids"])
    before = len(ids) - last
    known = model.get_input_embeddings().num_embeddings
    changed = {**row, "input_ids": [*((token + 1) % known for token in ids[:before]), *ids[before:]]}
    training = model.training
    model.eval()
    try:
        found = []
        for version in (row, changed):
            batch = {key: value.to(device) for key, value in collator([version]).items() if key != "labels"}
            found.append(model(**batch, use_cache=False).logits[0, before : before + last])
    finally:
        model.train(training)
    return float((found[0] - found[1]).abs().max())
