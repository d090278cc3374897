"""Greedy answers of a model to prompts, in batches of like length."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], Any] | None = None,
) -> tuple[list[list[int]], float]:
    """Greedy continuations.

    Args:
        model: a causal language model, or a PEFT model around one.
        prompts: token ids of each prompt, as a server would send them.
        stop_ids: tokens that end an answer.
        pad_id: fills the left of shorter prompts; masked, so that any id does.
        max_new_tokens: longest answer.
        batch_size: prompts at once.
        progress: called with (answered, total) after each batch.

    Returns:
        The new token ids of each prompt, in the prompts' order, up to and without the stop token; and seconds taken.
    """
    model.eval()
    device = next(model.parameters()).device
    # What is not stated here, generate takes from the model's own generation config: a penalty is not greedy.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,  # stands above a min_length
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=sorted(stop_ids) or -1,
        pad_token_id=pad_id,
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # like lengths need little padding
    found: list[list[int]] = [[] for _ in prompts]
    started = time.monotonic()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            prompt = torch.tensor(list(prompts[index]))
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        for row, index in enumerate(batch):
            found[index] = _until_stop(made[row, width:].tolist(), stop_ids)
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return found, time.monotonic() - started


def _until_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[:position]
    return ids
