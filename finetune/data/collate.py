"""Rows become batches: laid end to end without padding, or padded where a model cannot take them so.

Shapes: T tokens, D documents, B rows. Which token pads does not matter: attention and labels come from lengths, so a
pad token that is also the end-of-turn token stays trained where it ends a turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.data.encode import UNTRAINED

Feature = Mapping[str, Any]
Batch = dict[str, Any]

_NOTHING: Feature = {"input_ids": np.zeros(1, np.int32), "labels": np.full(1, UNTRAINED, np.int32)}


@dataclass(frozen=True)
class FlatCollator:
    """Lays documents end to end, the longest first, so that attention finds those of like length side by side."""

    def __call__(self, documents: Sequence[Feature]) -> Batch:
        """The batch of any number of documents; none give one token that is not trained.

        Returns:
            `input_ids`, `labels` and `position_ids` (0 at the start of each document), each (1, T) int64;
            `cu_seq_lens_q` = `cu_seq_lens_k`, where documents begin and the last one ends, (D+1,) int32;
            `max_length_q` = `max_length_k`, tokens of the longest. The first label of a document is -100: its
            prediction would come from the end of another.
        """
        ordered = sorted(documents or [_NOTHING], key=lambda row: -len(row["input_ids"]))
        lengths = np.array([len(row["input_ids"]) for row in ordered], np.int64)
        ends = np.cumsum(lengths)
        labels = np.concatenate([row["labels"] for row in ordered], dtype=np.int64, casting="unsafe")
        labels[ends - lengths] = UNTRAINED
        ids = np.concatenate([row["input_ids"] for row in ordered], dtype=np.int64, casting="unsafe")
        starts = torch.from_numpy(np.concatenate([np.zeros(1, np.int32), ends.astype(np.int32)]))
        longest = int(lengths[0])
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(ends - lengths, lengths))[None],
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
        }


@dataclass(frozen=True)
class PaddedCollator:
    """Pads documents on the right to the longest of them.

    Attributes:
        pad_token_id: fills `input_ids`.
    """

    pad_token_id: int

    def __call__(self, documents: Sequence[Feature]) -> Batch:
        """`input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels`, each (B, T) int64."""
        rows = documents or [_NOTHING]
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        ids = np.full(shape, self.pad_token_id, np.int64)
        mask = np.zeros(shape, np.int64)
        labels = np.full(shape, UNTRAINED, np.int64)
        for at, row in enumerate(rows):
            size = len(row["input_ids"])
            ids[at, :size], mask[at, :size], labels[at, :size] = row["input_ids"], 1, row["labels"]
        arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


Collate = FlatCollator | PaddedCollator
