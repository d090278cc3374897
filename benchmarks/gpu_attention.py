"""Attention over documents end to end on a GPU: torch's varlen_attn against one call per document.

    python benchmarks/gpu_attention.py            # says so and ends where there is no CUDA device; about a minute

Checks values and gradients of `finetune.model.attention` in bfloat16 (one kernel for all documents) against float32
(one call per run of documents of a length), with and without a sliding window; then times forward and backward of both
ways in bfloat16 on a batch of chats and on one long document.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from finetune.model import attention
from finetune.model.attention import attend

HEADS, KEY_HEADS, WIDTH = 16, 4, 128
TOLERANCE = 0.02  # relative, root mean square: bfloat16 has 8 bits
ROUNDS = 20


class Layer(nn.Module):
    """What a model's attention layer tells."""

    is_causal = True


def chats(count: int, longest: int, seed: int = 1) -> list[int]:
    """Lengths of chats, the longest first, as the collator lays them."""
    drawn = np.exp(np.random.default_rng(seed).normal(5.3, 0.8, count))
    return sorted(np.clip(drawn, 8, longest).astype(int).tolist(), reverse=True)


def states(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values (1, heads, tokens, width) that want gradients."""
    draw = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, heads, tokens, WIDTH, device="cuda", generator=draw).to(dtype).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def call(lengths: list[int], dtype: torch.dtype, window: int | None) -> Callable[[], list[Tensor]]:
    """Forward and backward of one layer on documents of these lengths."""
    given = states(sum(lengths), dtype)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    towards = torch.randn(
        1, sum(lengths), HEADS, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )

    def run() -> list[Tensor]:
        out, _ = attend(
            Layer(), given[0], given[1], given[2], None, sliding_window=window, cu_seq_lens_q=starts,
            max_length_q=max(lengths), kernel="sdpa",
        )  # fmt: skip
        return [out, *torch.autograd.grad(out, given, towards.to(dtype))]

    return run


def seconds(run: Callable[[], list[Tensor]]) -> float:
    """Median over ROUNDS, after three to warm up."""
    found = []
    for at in range(ROUNDS + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if at >= 3:
            found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2]


def main() -> int:
    """Check, then time; exit code 1 where a difference is too large."""
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked or timed")
        return 0
    if attention._varlen_attn() is None:
        print(
            f"torch {torch.__version__} has no varlen_attn with windows, scale and grouped heads: nothing was checked"
        )
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {HEADS}/{KEY_HEADS} heads of {WIDTH}")
    worst = 0.0
    for window in (None, 200):
        exact, ours = (call(chats(24, 1024), dtype, window)() for dtype in (torch.float32, torch.bfloat16))
        for name, a, b in zip(("values", "dq", "dk", "dv"), exact, ours, strict=True):
            apart = float((b.float() - a).norm() / a.norm())
            worst = max(worst, apart)
            print(f"window {window}: {name} differ by {apart:.4f} of their size")
    for title, lengths in (("64 chats", chats(64, 1024)), ("one document of 16,384", [16_384])):
        varlen = seconds(call(lengths, torch.bfloat16, None))
        kept, attention._varlen_takes = attention._varlen_takes, lambda *_: False  # type: ignore[assignment]
        try:
            apart = seconds(call(lengths, torch.bfloat16, None))
        finally:
            attention._varlen_takes = kept
        print(f"{title}, {sum(lengths):,} tokens: varlen_attn {varlen * 1e3:.2f} ms, per length {apart * 1e3:.2f} ms")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
