"""What the trainer is fed: prepared rows of training and validation, packed or not, and what batches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.collate import Collator, PackedCollator, leak, mask_kind
from finetune.data.pack import packed
from finetune.data.prepare import Prepared, prepare, shared_rows
from finetune.errors import ModelError
from finetune.recipe.sections import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PROBE_ROWS = 8


@dataclass(frozen=True)
class Feed:
    """Prepared rows.

    Attributes:
        options: the data section.
        train: rows to train on.
        validation: rows whose loss is measured; None without any.
        seed: orders packed sequences.
    """

    options: DataOptions
    train: Prepared
    validation: Prepared | None
    seed: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence a batch can hold."""
        return self.options.max_length if self.options.packing else max(map(len, self.train.rows["input_ids"]))

    def rows(self) -> tuple[Dataset, Dataset | None]:
        """Training and validation rows as the trainer takes them; with packing, packed sequences."""
        validation = self.validation.rows if self.validation else None
        if not self.options.packing:
            return self.train.rows, validation
        length, seed = self.options.max_length, self.seed
        return packed(self.train.rows, length, seed), packed(validation, length, seed) if validation else None

    def probe(self) -> list[list[int]]:
        """Token ids of a few training rows."""
        found: list[list[int]] = self.train.rows[:PROBE_ROWS]["input_ids"]
        return found

    def lines(self) -> list[str]:
        """What preparing did, in sentences."""
        said = self.train.report.lines()
        if self.validation is None:
            return said
        said += [f"validation: {line}" for line in self.validation.report.lines()]
        if shared := shared_rows(self.train, self.validation):
            source, row = shared[0]
            said.append(
                f"warning: {len(shared)} validation rows are trained on too, the first is row {row} of {source}, from 0"
            )
        return said


def feed(options: DataOptions, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], seed: int) -> Feed:
    """Prepare all rows of a recipe.

    Raises:
        FinetuneError: as `finetune.data.prepare.prepare`.
    """
    train = prepare(options, options.train, tokenizer, stop_ids, seed)
    validation = prepare(options, options.validation, tokenizer, stop_ids, seed) if options.validation else None
    return Feed(options, train, validation, seed)


def collator(options: DataOptions, pad_id: int, attn: str, compute: str) -> Collator | PackedCollator:
    """What makes batches of the rows.

    Args:
        options: the data section.
        pad_id: fills up `input_ids`.
        attn: the attention kernel's name.
        compute: the precision of activations, by torch's name.
    """
    if options.packing:
        return PackedCollator(pad_id, mask_kind(attn), getattr(torch, compute))
    return Collator(pad_id)


def refuse_leak(model: Any, collate: Collator | PackedCollator, rows: Dataset) -> None:
    """Packed rows must not see each other on this very model, kernel and collator.

    Raises:
        ModelError: they do.
    """
    if not isinstance(collate, PackedCollator):
        return
    row = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    seen = leak(model, collate, row) if row is not None else 0.0
    if seen > 0:
        raise ModelError(
            f"data.packing: rows packed together see each other on this model (logits move by {seen:.2g}); set "
            "data.packing: false, or model.attn_implementation to eager or sdpa"
        )
