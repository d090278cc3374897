"""Rows on which two models are compared, and how alike their logits are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PROBE_ROWS = 8
PROBE_TOKENS = 256
_AT_ONCE = 32  # positions whose divergence is computed together, in float64: float32 sums are wrong by 1e-7 nats

# Used where a run left no rows of its own: several scripts, code and numbers, so that most of a vocabulary is near.
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog while 1,234 people watch from the riverbank.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    '{"name": "Ada", "year": 1815, "topics": ["mathematics", "computing"]}',
    "人工智能正在改变我们的工作方式。请用一句话总结下面的内容。",
    "Question: which planet is the largest in the solar system?\nAnswer: Jupiter, by mass and by volume.",
)


@dataclass(frozen=True)
class Gap:
    """How far two models' next-token distributions are apart over the probe.

    Attributes:
        max_logit: largest absolute difference of logits.
        mean_kl: mean Kullback-Leibler divergence in nats, first model against second.
        top1: share of positions where both prefer the same token.
        positions: how many positions were compared.
    """

    max_logit: float
    mean_kl: float
    top1: float
    positions: int

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@torch.no_grad()
def logits_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 logits (T, V) of each probe row on the CPU, one row at a time, so that nothing is padded."""
    model.eval()
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([list(row)], device=device), use_cache=False).logits[0].float().cpu()
        for row in rows
    ]


def gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Gap:
    """Compare two models' logits on the same rows; each is a list of (T, V) float32."""
    largest, divergence, same, positions = 0.0, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        largest = max(largest, float((a - b).abs().max()))
        for some_a, some_b in zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True):
            log_a, log_b = functional.log_softmax(some_a.double(), -1), functional.log_softmax(some_b.double(), -1)
            divergence += float((log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        positions += a.shape[0]
    return Gap(largest, divergence / max(1, positions), same / max(1, positions), positions)


def probe_rows(rows: Sequence[Sequence[int]] | None, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """The run's own probe rows (token ids), or the built-in texts where it left none."""
    chosen = [list(row) for row in rows or []] or [encode(text) for text in PROBE_TEXTS]
    return [row[:PROBE_TOKENS] for row in chosen[:PROBE_ROWS] if row]
